"""What a run says while it works: the termination message, /progress and /metrics, and its lines or its bar."""

import json
import os
import pty
import socket
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from finetune_api import termination
from finetune_api.progress import ProgressReport
from finetune_api.status import Progress, Stage
from finetune_trainer.errors import DataError
from finetune_trainer.failures import classify
from finetune_trainer.memory import shrink
from finetune_trainer.reporting.progress import ProgressMeter
from finetune_trainer.reporting.reporter import LogScreen, RunReporter, TerminalScreen
from finetune_trainer.reporting.server import Endpoint, serving
from finetune_trainer.reporting.session import ENV_TERMINATION_LOG, reporting
from finetune_trainer.results import hints, summary
from support.run_contexts import context, run_spec
from support.tiny_jobs import description, finetune, run, tiny_job

PROGRESS = Progress(summary="1/4", step=1, total_steps=4, loss="2.314", tokens_per_second=300)


def all_that_came(master: int) -> str:
    """What was written to a terminal whose other end is closed; closes this one."""
    pieces = []
    with os.fdopen(master, "rb", buffering=0) as terminal, suppress(OSError):  # which is how Linux says that no more will come
        while piece := terminal.read(4096):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_the_termination_message_follows_each_stage_and_tells_the_end() -> None:
    written: list[str] = []
    reporter = RunReporter("digest", write_termination=written.append)
    reporter.enter(Stage.TRAINING)
    reporter.step(PROGRESS)
    reporter.end(DataError("Line 2 is not JSON."))
    messages = [termination.parse(text) for text in written]
    assert all(messages)
    assert [message.stage for message in messages if message] == [Stage.TRAINING, Stage.TRAINING]
    last = messages[-1]
    assert last is not None
    assert (last.exit_code, last.reason, last.message, last.step) == (11, "InvalidData", "Line 2 is not JSON.", 1)


def test_an_address_that_is_too_long_for_a_status_is_cut() -> None:
    written: list[str] = []
    RunReporter("digest", write_termination=written.append).know(model=f"s3://bucket/{'a' * 1024}?etags=1", dataset="here")
    message = termination.parse(written[-1])
    assert message is not None
    assert (len(message.model), message.dataset) == (1024, "here")


def test_an_error_that_nobody_foresaw_tells_no_credential_that_it_quotes() -> None:
    written: list[str] = []
    quoted = "GET https://me:hush-canary@hub.example.com/x: 500, sent Bearer hf_CanaryCanaryCanaryCanary01"
    RunReporter("digest", write_termination=written.append).end(classify(RuntimeError(quoted)))
    (message,) = [termination.parse(text) for text in written]
    assert message is not None
    assert "RuntimeError: GET https://***@hub.example.com/x: 500" in message.message
    assert "anary" not in message.message


def test_a_finished_run_leaves_its_results_in_the_termination_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination-log"))
    run(tiny_job(tmp_path), tmp_path / "work")
    message = termination.parse((tmp_path / "termination-log").read_text())
    assert message is not None
    assert message.exit_code == 0
    assert message.quality is not None
    assert message.quality.base_loss
    assert [artifact.kind for artifact in message.artifacts] == ["adapter"]
    assert message.dataset.startswith("file://")


def test_what_made_a_run_slow_is_in_the_report_the_summary_and_the_termination_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination-log"))
    monkeypatch.setattr(hints, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(hints, "CPU_SECONDS", 0.0)
    monkeypatch.setattr(hints, "LARGE_SHARE", 0.0)
    assert finetune("run", str(tiny_job(tmp_path)), "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")) == 0
    reported = json.loads((tmp_path / "work" / "report.json").read_text())["hints"]
    message = termination.parse((tmp_path / "termination-log").read_text())
    assert message is not None
    assert message.message == " ".join(reported)
    assert any(sentence.startswith("Measuring held-out losses took") for sentence in reported)
    assert any(sentence.startswith("Fetching and tokenizing the data took") for sentence in reported)
    assert "Measuring held-out losses took" in capfd.readouterr().out


def test_what_the_rounding_took_and_micro_batches_of_short_memory_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(hints, "LARGE_SHARE", 1e-9)  # whatever took any time at all
    monkeypatch.setattr(hints.Measured, "trained_long", True)
    job = tiny_job(tmp_path)
    cut = {"trainDigest": description(job).train_digest, "micro_batch": 2, "reduced": True}
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / shrink.FILE).write_text(json.dumps(cut))
    reported = run(job, tmp_path / "work")["hints"]
    assert any(sentence.startswith("A step took up to 4 micro-batches where 1 would do") for sentence in reported)
    assert any(sentence.startswith("Choosing scales and rounding of the weights took") for sentence in reported)
    assert not any(sentence.startswith("Mirroring") for sentence in reported)


def test_progress_and_metrics_are_served() -> None:
    endpoint = Endpoint()
    endpoint.update(ProgressReport(train_digest="digest", stage=Stage.TRAINING, progress=PROGRESS))
    with serving(endpoint, "127.0.0.1", 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
            report = ProgressReport.model_validate_json(answer.read())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            metrics = answer.read().decode()
    assert report.progress == PROGRESS
    assert "finetune_loss 2.314" in metrics
    assert 'finetune_stage{stage="Training"} 1.0' in metrics


def test_a_connection_that_asks_nothing_holds_up_neither_others_nor_the_end() -> None:
    with socket.socket() as idle, serving(Endpoint(), "127.0.0.1", 0) as port:
        idle.connect(("127.0.0.1", port))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
            assert answer.read() == b"{}"


def test_each_step_is_one_structured_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = RunReporter("digest", screen=LogScreen())
    reporter.enter(Stage.TRAINING)
    reporter.step(PROGRESS)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["stage", "step"]
    assert lines[1] | {"loss": "2.314", "step": 1, "total_steps": 4} == lines[1]


def test_ctrl_c_leaves_the_terminal_with_its_cursor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with pytest.raises(KeyboardInterrupt), reporting(context(tmp_path, run_spec()).job) as reporter:
            reporter.enter(Stage.TRAINING)
            reporter.step(PROGRESS)
            raise KeyboardInterrupt
    shown = all_that_came(master)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_the_speed_of_a_resumed_run_is_that_of_its_own_steps() -> None:
    shown: list[Progress] = []
    reporter = RunReporter("digest", screen=LogScreen())
    reporter.on_change = lambda report: shown.append(report.progress)
    meters = [ProgressMeter(reporter, 10, resumed_from=resumed) for resumed in (0, 5)]
    for meter in meters:
        meter._started -= 10.0
        meter.step_done(6, 1.0, 0.5, tokens=1000)
    assert [progress.tokens_per_second for progress in shown] == [100, 100]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        reporter = RunReporter("digest")
        reporter.enter(Stage.TRAINING)
        reporter.step(PROGRESS)
        reporter.end(None)
    assert isinstance(reporter.screen, TerminalScreen)
    shown = all_that_came(master)
    assert "1/4" in shown
    assert "loss 2.314" in shown


def test_what_a_model_writes_is_shown_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    """It may look like rich's markup, of which [/INST] would close what was never opened, behind everything that is published."""
    summary._print_table([("the shipped model writes", "The [/INST] answer is [b]bold[/b] :smile:")])
    assert "The [/INST] answer is [b]bold[/b] :smile:" in capfd.readouterr().out
