"""The termination message: it always fits, what matters survives shortening, and whatever is not one is None."""

import json
from typing import Any

import pytest
from finetune_api.exits import REASONS
from finetune_api.status import PublishedArtifact, Qat, Quality, Stage
from finetune_api.termination import MAX_BYTES, TerminationMessage, parse
from hypothesis import given
from hypothesis import strategies as st

CODES = st.sampled_from(sorted(REASONS))
TEXTS = st.text(max_size=1024) | st.sampled_from(["€" * 1024, "\x00" * 1024, "😀" * 1024, '"\\' * 512])
SHORTS = st.text(max_size=256) | st.sampled_from(["😀" * 256, "\x00" * 256])
LOSSES = st.text(max_size=16)
COUNTS = st.integers(0, 2**53)
ARTIFACTS = st.builds(PublishedArtifact, kind=SHORTS, uri=TEXTS, digest=SHORTS, bytes=COUNTS)
MESSAGES = st.builds(
    TerminationMessage,
    stage=st.sampled_from(Stage),
    reason=CODES.map(REASONS.__getitem__) | SHORTS,
    message=TEXTS,
    exit_code=CODES.map(int),
    step=COUNTS,
    total_steps=COUNTS,
    model=TEXTS,
    dataset=TEXTS,
    quality=st.none() | st.builds(Quality, base_loss=LOSSES, tuned_loss=LOSSES, recovered=SHORTS, shipped_matches_trained=st.booleans()),
    qat=st.none() | st.builds(Qat, scheme=SHORTS, layers=COUNTS, coverage=SHORTS),
    artifacts=st.lists(ARTIFACTS, max_size=32).map(tuple),
)

SMALL: dict[str, Any] = {"stage": "Training", "exitCode": 11, "reason": "InvalidData", "message": "row 3 is no object"}


@given(MESSAGES)
def test_a_message_always_fits(message: TerminationMessage) -> None:
    assert len(message.encode().encode()) <= MAX_BYTES


@given(MESSAGES)
def test_how_and_where_it_ended_survives_every_shortening(message: TerminationMessage) -> None:
    read = parse(message.encode())
    assert read is not None
    assert (read.exit_code, read.stage, read.reason) == (message.exit_code, message.stage, message.reason)


@given(MESSAGES)
def test_the_sentence_keeps_its_beginning(message: TerminationMessage) -> None:
    read = parse(message.encode())
    assert read is not None
    assert message.message.startswith(read.message[:100])


def test_a_message_that_fits_is_read_back_whole() -> None:
    message = TerminationMessage(
        stage=Stage.PUBLISHING,
        reason="Succeeded",
        message="Published to s3://models/tiny.",
        exit_code=0,
        step=400,
        total_steps=400,
        model="hf://acme/tiny@0123",
        dataset="s3://corpora/rows.jsonl",
        quality=Quality(base_loss="2.310", tuned_loss="1.234", shipped_matches_trained=True),
        qat=Qat(scheme="int8-int4", layers=210, coverage="100%"),
        artifacts=(PublishedArtifact(kind="adapter", uri="s3://models/tiny/adapter", digest="ab" * 32, bytes=1),),
    )
    assert parse(message.encode()) == message


def test_artifacts_go_before_the_sentence_is_cut() -> None:
    artifacts = tuple(PublishedArtifact(kind="adapter", uri=f"s3://models/{index}/{'x' * 500}") for index in range(32))
    read = parse(TerminationMessage(stage=Stage.PUBLISHING, message="y" * 1024, artifacts=artifacts).encode())
    assert read is not None
    assert read.message == "y" * 1024
    assert 0 < len(read.artifacts) < len(artifacts)


def test_the_smallest_message_is_a_stage() -> None:
    assert parse('{"stage": "Loading"}') == TerminationMessage(stage=Stage.LOADING)


NO_MESSAGES: dict[str, str] = {
    "nothing": "",
    "a line of a log": "Traceback (most recent call last):",
    "several lines of a log": "step 1\nstep 2\n{}",
    "a message behind a line of a log": f"step 1\n{json.dumps(SMALL)}",
    "another version": json.dumps(SMALL | {"version": 2}),
    "an extra key": json.dumps(SMALL | {"owner": "me"}),
    "an extra key below": json.dumps(SMALL | {"qat": {"owner": "me"}}),
    "no stage": json.dumps({"exitCode": 11}),
    "an unknown stage": json.dumps(SMALL | {"stage": "Dreaming"}),
    "a cut message": json.dumps(SMALL)[:-1],
    "the end of a long message": json.dumps(SMALL)[5:],
    "a list": "[]",
    "null": "null",
    "a number in quotes": json.dumps(SMALL | {"exitCode": "11"}),
    "a truth for a number": json.dumps(SMALL | {"step": True}),
    "a negative count": json.dumps(SMALL | {"step": -1}),
    "a count that the API server can't hold": json.dumps(SMALL | {"qat": {"layers": 2**63}}),
    "an exit code that can't be": json.dumps(SMALL | {"exitCode": 256}),
    "a name of Python's": json.dumps({"stage": "Training", "exit_code": 11}),
    "a sentence that is too long": json.dumps(SMALL | {"message": "x" * 1025}),
    "a message with too much white space": json.dumps(SMALL) + " " * MAX_BYTES,
    "characters that are no text": "\ud800",
    "a deep nest": "[" * 4000,
}


@pytest.mark.parametrize("text", NO_MESSAGES.values(), ids=NO_MESSAGES.keys())
def test_what_is_not_exactly_a_message_is_none(text: str) -> None:
    assert parse(text) is None


def test_the_untouched_message_of_this_table_is_read() -> None:
    assert parse(json.dumps(SMALL)) is not None


@given(st.text(st.characters(exclude_categories=())))
def test_reading_any_text_never_raises(text: str) -> None:
    assert parse(text) is None


@given(
    st.dictionaries(
        st.sampled_from(["version", "stage", "message", "step", "quality", "artifacts", "x"]),
        st.from_type(type(None)) | st.integers() | st.text(max_size=9) | st.just([]) | st.just({}),
    )
)
def test_reading_any_object_never_raises(value: dict[str, Any]) -> None:
    read = parse(json.dumps(value))
    assert read is None or read.stage == value["stage"]
