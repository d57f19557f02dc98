"""Finished stages: not done again for the same inputs, done again with all that follow for others, and never taken on trust."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from finetune_api.status import Stage
from finetune_trainer.finished import FOLDER, FinishedStages, digest_of, tree_digest
from support.run_contexts import write_files

LINE = (Stage.EVALUATING, Stage.CONVERTING, Stage.VERIFYING)


@dataclass(frozen=True)
class Result:
    value: int


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write_files(tmp_path / "model", {"config.json": b"{}", "nested/weights": b"123"})


def run_line(workdir: Path, made: Path, inputs: str = "a", *, dies: Stage | None = None) -> list[Stage]:
    """Runs the stages and returns those that did some work."""
    worked: list[Stage] = []
    stages = FinishedStages(workdir / FOLDER, inputs)

    def work(stage: Stage) -> Callable[[], Result]:
        def do() -> Result:
            worked.append(stage)
            if stage is dies:
                raise Killed
            return Result(len(stage))

        return do

    for stage in LINE:
        folders = () if stage is Stage.EVALUATING else (made,)
        assert stages.once(stage, Result, work(stage), made=folders) == Result(len(stage))
    return worked


def test_what_is_finished_is_not_done_again(tmp_path: Path, made: Path) -> None:
    assert run_line(tmp_path, made) == list(LINE)
    assert run_line(tmp_path, made) == []


def test_other_inputs_are_worked_on_anew(tmp_path: Path, made: Path) -> None:
    run_line(tmp_path, made)
    assert run_line(tmp_path, made, "b") == list(LINE)
    assert run_line(tmp_path, made, "a") == list(LINE)


@pytest.mark.parametrize("dies", LINE)
def test_a_stage_that_was_killed_is_done_again_and_those_before_it_are_not(dies: Stage, tmp_path: Path, made: Path) -> None:
    with pytest.raises(Killed):
        run_line(tmp_path, made, dies=dies)
    assert run_line(tmp_path, made) == list(LINE[LINE.index(dies) :])


CHANGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: (folder / "nested" / "weights").write_bytes(b"023"),
    "a file cut off": lambda folder: (folder / "nested" / "weights").write_bytes(b"12"),
    "a file gone": lambda folder: (folder / "config.json").unlink(),
    "a file more": lambda folder: (folder / "more").write_bytes(b""),
    "another name": lambda folder: (folder / "config.json").rename(folder / "other.json"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_made_and_has_changed_since_is_made_and_proved_again(change: Callable[[Path], object], tmp_path: Path, made: Path) -> None:
    run_line(tmp_path, made)
    change(made)
    assert run_line(tmp_path, made) == [Stage.CONVERTING, Stage.VERIFYING]


def test_a_stage_that_is_done_again_takes_those_behind_it_along(tmp_path: Path, made: Path) -> None:
    run_line(tmp_path, made)
    (tmp_path / FOLDER / "evaluating.json").unlink()
    assert run_line(tmp_path, made) == list(LINE)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"inputs": "a"}', '{"inputs": "a", "made": "", "result": {"other": 1}}'])
def test_a_marker_that_can_not_be_read_counts_for_nothing(text: str, tmp_path: Path, made: Path) -> None:
    run_line(tmp_path, made)
    (tmp_path / FOLDER / "evaluating.json").write_text(text)
    assert run_line(tmp_path, made) == list(LINE)


def test_a_marker_says_what_it_was_made_from(tmp_path: Path, made: Path) -> None:
    run_line(tmp_path, made)
    kept = json.loads((tmp_path / FOLDER / "converting.json").read_text())
    assert kept == {"inputs": "a", "made": tree_digest((made,)), "result": {"value": len(Stage.CONVERTING)}}


def test_the_parts_of_an_input_do_not_run_into_each_other(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab")
    assert len({digest_of("a", "b"), digest_of("ab"), digest_of("b", "a"), digest_of("", "ab")}) == 4
    assert digest_of(tmp_path / "file") == digest_of("ab")
