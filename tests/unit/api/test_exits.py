"""The exit codes: distinct, never one that Python, a shell or a signal uses, and documented."""

import re
from pathlib import Path

import pytest
from finetune_api.exits import OOM_KILLED, PERMANENT, REASONS, ExitCode

DOCS = Path(__file__).parents[3] / "docs" / "exit-codes.md"
ROW = re.compile(r"^\| (\d+) \| (\w+) \|.*\|$", re.MULTILINE)


def documented() -> dict[int, str]:
    return {int(code): reason for code, reason in ROW.findall(DOCS.read_text())}


def test_no_two_exits_have_the_same_code() -> None:
    assert len(ExitCode.__members__) == len({int(code) for code in ExitCode}) >= 10


@pytest.mark.parametrize("code", ExitCode)
def test_no_code_is_one_of_pythons_a_shells_or_a_signals(code: ExitCode) -> None:
    assert code not in (1, 2, 120)
    assert code < 126


@pytest.mark.parametrize("code", ExitCode)
def test_each_code_has_a_camel_case_reason(code: ExitCode) -> None:
    assert re.fullmatch(r"([A-Z][a-z]+)+", REASONS[code])


def test_no_two_codes_have_the_same_reason() -> None:
    assert len(set(REASONS.values())) == len(ExitCode)


def test_the_docs_name_each_code_with_its_reason_and_no_other() -> None:
    assert documented() == {int(code): reason for code, reason in REASONS.items()} | {OOM_KILLED: "OOMKilled"}


def test_what_a_retry_cant_mend_is_permanent() -> None:
    assert set(PERMANENT) == {ExitCode.SPEC, ExitCode.DATA, ExitCode.ACCESS, ExitCode.PROOF, ExitCode.QUALITY}


@pytest.mark.parametrize("code", [code for code in ExitCode if code is not ExitCode.SUCCEEDED])
def test_the_docs_say_that_permanent_failures_are_not_retried(code: ExitCode) -> None:
    (retried,) = re.findall(rf"^\| {code.value} \|[^|]*\|[^|]*\| ([^|]*) \|", DOCS.read_text(), re.MULTILINE)
    assert retried.startswith("no") == (code in PERMANENT)
