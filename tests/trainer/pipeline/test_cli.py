"""The command line: verdicts, exit codes, and what a wrong call is told."""

import io
import json
import signal
from pathlib import Path

import pytest
from finetune_api.exits import ExitCode
from support.tiny_jobs import finetune

ROOT = Path(__file__).parents[3]
PRODUCTION = ROOT / "examples" / "production.yaml"


def test_a_valid_file_is_said_to_be_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("validate", str(PRODUCTION)) == 0
    assert capsys.readouterr().out == f"{PRODUCTION}: valid\n"


def test_every_problem_of_every_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(PRODUCTION.read_text().replace("rank: 32", "rank: 0").replace("epochs: 1", "epoch: 1"))
    second.write_text("kind: Job\n")
    assert finetune("validate", str(first), str(second)) == ExitCode.SPEC
    said = capsys.readouterr().err
    assert f"{first}: spec.lora.rank: found 0" in said
    assert "rename it to epochs" in said
    assert f"{second}: " in said


def test_a_minus_is_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PRODUCTION.read_text()))
    assert finetune("validate", "-") == 0
    assert capsys.readouterr().out == "-: valid\n"


def test_a_laptop_allows_what_a_cluster_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    laptop = str(ROOT / "examples" / "laptop.yaml")
    assert finetune("validate", laptop) == ExitCode.SPEC
    assert "file:// works only on a laptop" in capsys.readouterr().err
    assert finetune("validate", "--local", laptop) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml can't be read"),
        (["run"], "name a YAML file"),
        (["preflight"], "name a YAML file"),
        (["run", "--nope"], "No such option"),
        (["tune"], "No such command"),
        (["validate"], "Missing"),
    ],
)
def test_a_wrong_call_is_a_wrong_spec_and_shows_no_traceback(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(*arguments) == ExitCode.SPEC
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_pods_job_comes_from_its_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FINETUNE_JOB", json.dumps({"name": "x"}))
    assert finetune("run") == ExitCode.SPEC
    assert "FINETUNE_JOB" in capsys.readouterr().err


def test_sigterm_before_a_run_has_begun_ends_as_a_stopped_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Standard(io.StringIO):
        def read(self, _: int | None = -1) -> str:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("SIGTERM was not heard")

    monkeypatch.setattr("sys.stdin", Standard())
    assert finetune("run", "-") == ExitCode.CHECKPOINTED


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("--version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
