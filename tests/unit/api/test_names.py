"""Names and labels: valid for every FineTuneJob name, the same for the same run, different for another."""

import re

import pytest
from finetune_api.names import job_label, run_label, training_job_name
from hypothesis import example, given
from hypothesis import strategies as st

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
PREFLIGHT = "-pre"
LIMIT = 63

UID = "5f0c8a52-6f0e-4d4e-9c51-0b8a0f6f3f77"
OTHER_UID = "00000000-0000-4000-8000-000000000000"
DIGEST = "ab" * 32
OTHER_DIGEST = "cd" * 32

PARTS = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,60}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(".".join).filter(lambda name: len(name) <= 253)


@given(NAMES)
@example("a")
@example("x" * 63)
@example("x" * 253)
@example("a." * 126 + "a")
@example("a" * 47 + "." + "b" * 20)
def test_a_job_and_its_preflight_have_names_that_are_dns_labels(name: str) -> None:
    job = training_job_name(name, UID, DIGEST)
    assert DNS_LABEL.fullmatch(job)
    assert len(job + PREFLIGHT) <= LIMIT


@given(NAMES)
def test_the_same_run_has_the_same_job(name: str) -> None:
    assert training_job_name(name, UID, DIGEST) == training_job_name(name, UID, DIGEST)


def test_a_jobs_name_never_changes_between_versions() -> None:
    assert training_job_name("support-bot", UID, DIGEST) == "support-bot-82d0a8aa3e"


@pytest.mark.parametrize(("uid", "digest"), [(OTHER_UID, DIGEST), (UID, OTHER_DIGEST)])
def test_another_object_or_another_run_has_another_job(uid: str, digest: str) -> None:
    assert training_job_name("bot", uid, digest) != training_job_name("bot", UID, DIGEST)


@pytest.mark.parametrize(("one", "other"), [("a.b", "a-b"), ("x" * 200 + "a", "x" * 200 + "b")])
def test_names_that_are_shortened_alike_have_different_jobs(one: str, other: str) -> None:
    assert training_job_name(one, UID, DIGEST) != training_job_name(other, UID, DIGEST)


@given(NAMES)
@example("x" * 63)
@example("x" * 64)
@example("x" * 253)
@example("a" * 51 + "." + "b" * 20)
def test_a_jobs_label_is_a_valid_value(name: str) -> None:
    label = job_label(name)
    assert LABEL_VALUE.fullmatch(label)
    assert len(label) <= LIMIT


@pytest.mark.parametrize("name", ["a", "support-bot.v2", "x" * 63])
def test_a_short_name_is_its_own_label(name: str) -> None:
    assert job_label(name) == name


def test_long_names_that_begin_alike_have_different_labels() -> None:
    assert job_label("x" * 253) != job_label("x" * 252)


def test_a_runs_label_is_the_beginning_of_its_digest() -> None:
    label = run_label(DIGEST)
    assert DIGEST.startswith(label)
    assert LABEL_VALUE.fullmatch(label)
