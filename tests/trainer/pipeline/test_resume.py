"""A run that is stopped anywhere and started again ends with the weights of one that was not, bit for bit, and does nothing twice."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer import base_model, checkpoints, destinations, machine, phases, pipeline, plan
from finetune_trainer.errors import Checkpointed, InfrastructureError, NotPublishedError
from finetune_trainer.finished import tree_digest
from finetune_trainer.reporting.progress import ProgressMeter
from finetune_trainer.reporting.reporter import RunReporter
from finetune_trainer.results import summary
from finetune_trainer.stages import convert, evaluate, verify
from safetensors.torch import load_file, save_file
from support.power_loss import recorded_disk
from support.tiny_jobs import STEPS, finetune, run, tiny_job
from support.tiny_model import save_tiny_model, sums, write_jsonl

ADAPTER = "lora_model/adapter_model.safetensors"
EVERY_100: dict[str, Any] = {"training": {"checkpointEvery": 100}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the process may handle it."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(tiny_job(folder), folder / "work")
    return (folder / "work" / ADAPTER).read_bytes()


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: int, act: Callable[[], None]) -> list[int]:
    """Acts once the step is done; returns the list of the steps that were done."""
    steps: list[int] = []
    original = ProgressMeter.step_done

    def step_done(self: ProgressMeter, step: int, *args: Any) -> None:
        steps.append(step)
        original(self, step, *args)
        if step == wanted:
            act()

    monkeypatch.setattr(ProgressMeter, "step_done", step_done)
    return steps


def before_micro_batch(monkeypatch: pytest.MonkeyPatch, wanted: int, act: Callable[[], None]) -> None:
    """Acts before that micro-batch of the training, counted from 1."""
    count, original = iter(range(1, 1000)), phases.Phases.drop_step_if_asked

    def drop_step_if_asked(self: phases.Phases) -> None:
        if next(count) == wanted:
            act()
        original(self)

    monkeypatch.setattr(phases.Phases, "drop_step_if_asked", drop_step_if_asked)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(("step", "number"), [*((step, signal.SIGTERM) for step in range(1, STEPS)), (2, signal.SIGINT)])
def test_sigterm_or_ctrl_c_saves_the_step_and_the_next_run_goes_on(
    step: int, number: signal.Signals, undisturbed: bytes, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(number))
        with pytest.raises(Checkpointed, match=f"after step {step} of {STEPS}"):
            run(job, tmp_path / "work")
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        report = run(job, tmp_path / "work")
    assert steps == list(range(step + 1, STEPS + 1))
    assert report["training"]["resumedFrom"] == step
    assert (tmp_path / "work" / ADAPTER).read_bytes() == undisturbed


def test_ctrl_c_does_not_reach_a_training_that_a_script_started_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        steps = at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
        run(tiny_job(tmp_path), tmp_path / "work")
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == list(range(1, STEPS + 1))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_job(tmp_path), tmp_path / "work")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_killed_run_goes_on_from_the_last_sealed_checkpoint(step: int, undisturbed: bytes, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, {"training": {"checkpointEvery": 2}})
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            run(job, tmp_path / "work")
    report = run(job, tmp_path / "work")
    assert report["training"]["resumedFrom"] == (step - 1) // 2 * 2  # the step is reported before its checkpoint is written
    assert (tmp_path / "work" / ADAPTER).read_bytes() == undisturbed


@pytest.mark.parametrize(("scheme", "dropout"), [("int8-int4", 0.0), ("none", 0.2)])
def test_sigterm_between_two_micro_batches_drops_the_step_in_hand(
    scheme: str, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random numbers too, which a model's own dropout has drawn by then."""
    monkeypatch.setattr(plan, "MICRO_BATCH_TOKENS", 64)
    changes = EVERY_100 | {"quantization": {"scheme": scheme}}
    for name in ("undisturbed", "stopped"):
        save_tiny_model(tmp_path / name / "model", attention_dropout=dropout)
    run(tiny_job(tmp_path / "undisturbed", changes), tmp_path / "undisturbed" / "work")
    job = tiny_job(tmp_path / "stopped", changes)
    with pytest.MonkeyPatch.context() as patch:
        before_micro_batch(patch, 12, lambda: signal.raise_signal(signal.SIGTERM))  # a step has eight, of a row each
        with pytest.raises(Checkpointed, match=f"after step 1 of {STEPS}"):
            run(job, tmp_path / "stopped" / "work")
    assert run(job, tmp_path / "stopped" / "work")["training"]["resumedFrom"] == 1
    assert (tmp_path / "stopped" / "work" / ADAPTER).read_bytes() == (tmp_path / "undisturbed" / "work" / ADAPTER).read_bytes()


def test_sigterm_before_the_first_step_says_that_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MICRO_BATCH_TOKENS", 64)
    before_micro_batch(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Checkpointed, match="before a first step was done"):
        run(tiny_job(tmp_path), tmp_path / "work")
    assert not list((tmp_path / "work" / "outputs").glob("checkpoint-*"))


def test_sigterm_while_the_checkpoint_of_the_switch_is_saved_measures_nothing_any_more(undisturbed: bytes, tmp_path: Path) -> None:
    """Measuring and choosing the rounding take minutes, and Kubernetes kills what does not end in time."""
    job, seal, fit = tiny_job(tmp_path), checkpoints.seal, phases.measure
    asked: list[bool] = []

    def sealed(folder: Path, *args: Any) -> None:
        seal(folder, *args)
        if folder.name == f"checkpoint-{STEPS // 2}":
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "seal", sealed)
        patch.setattr(phases, "measure", lambda *args, **options: asked.append(True) or fit(*args, **options))
        with pytest.raises(Checkpointed, match=f"after step {STEPS // 2} of {STEPS}"):
            run(job, tmp_path / "work")
    assert not asked
    assert run(job, tmp_path / "work")["training"]["resumedFrom"] == STEPS // 2
    assert (tmp_path / "work" / ADAPTER).read_bytes() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_switch_is_measured_costs_no_step(number: signal.Signals, undisturbed: bytes, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, EVERY_100)

    def measure(*_: Any, **__: Any) -> None:
        signal.raise_signal(number)
        raise AssertionError("the signal did not stop the measurement")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "measure", measure)
        with pytest.raises(Checkpointed):
            run(job, tmp_path / "work")
    report = run(job, tmp_path / "work")
    assert report["training"]["resumedFrom"] == 2
    assert report["losses"]["tuned"] is not None
    assert (tmp_path / "work" / ADAPTER).read_bytes() == undisturbed


def test_a_checkpoint_that_was_never_sealed_is_passed_over(undisturbed: bytes, tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    original = checkpoints.seal

    def seal(folder: Path, *args: Any) -> None:
        if folder.name == "checkpoint-3":
            raise Killed
        original(folder, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases.checkpoints, "seal", seal)
        with pytest.raises(Killed):
            run(job, tmp_path / "work")
    assert run(job, tmp_path / "work")["training"]["resumedFrom"] == 2
    assert (tmp_path / "work" / ADAPTER).read_bytes() == undisturbed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job, and the working directory of its run that was stopped after step 3."""
    folder = tmp_path_factory.mktemp("stopped")
    job = tiny_job(folder)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Checkpointed):
            run(job, folder / "work")
    return job, folder / "work"


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "adapter_model.safetensors").write_bytes(content)


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file cut off": (lambda checkpoint: os.truncate(checkpoint / "optimizer.pt", 100), "optimizer.pt is damaged"),
    "a flipped bit": (flip_a_bit, "adapter_model.safetensors is damaged"),
    "a missing file": (lambda checkpoint: (checkpoint / "rng_state.pth").unlink(), "rng_state.pth is damaged"),
    "an empty folder": (empty, "it was never completed"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_the_one_before_is_used(
    damage: Callable[[Path], object],
    said: str,
    stopped: tuple[Path, Path],
    undisturbed: bytes,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job, work = stopped[0], Path(shutil.copytree(stopped[1], tmp_path / "work"))
    damage(work / "outputs" / "checkpoint-3")
    assert run(job, work)["training"]["resumedFrom"] == 2
    assert f"Checkpoint checkpoint-3 is passed over: {said}." in capfd.readouterr().out
    assert (work / ADAPTER).read_bytes() == undisturbed


def test_the_losses_at_the_switch_survive_a_restart_behind_it(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(tiny_job(whole), whole / "work")["losses"]
    job = tiny_job(stopped)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Checkpointed):
            run(job, stopped / "work")
    assert run(job, stopped / "work")["losses"] == expected


def test_the_adapter_at_the_switch_is_part_of_every_later_checkpoint(tmp_path: Path) -> None:
    run(tiny_job(tmp_path), tmp_path / "work")
    kept = {step: tmp_path / "work" / "outputs" / f"checkpoint-{step}" for step in (3, 4)}
    job = tiny_job(tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Checkpointed):
            run(job, tmp_path / "stopped" / "work")
    at_switch = load_file(tmp_path / "stopped" / "work" / "outputs" / "checkpoint-2" / "adapter_model.safetensors")
    for folder in kept.values():
        found = {
            name.removeprefix("adapter/").replace(".default", ""): value
            for name, value in load_file(folder / "switch.safetensors").items()
            if name.startswith("adapter/")
        }
        assert found.keys() == at_switch.keys()
        assert all(torch.equal(value, at_switch[name]) for name, value in found.items())


def test_without_a_teacher_the_run_ends_elsewhere_and_resumes_as_exactly(undisturbed: bytes, tmp_path: Path) -> None:
    alone: dict[str, Any] = {"quantization": {"distill": False}}
    run(tiny_job(tmp_path / "whole", alone), tmp_path / "whole" / "work")
    expected = (tmp_path / "whole" / "work" / ADAPTER).read_bytes()
    assert expected != undisturbed
    job = tiny_job(tmp_path / "killed", alone)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, kill)
        with pytest.raises(Killed):
            run(job, tmp_path / "killed" / "work")
    assert run(job, tmp_path / "killed" / "work")["training"]["resumedFrom"] == 3
    assert (tmp_path / "killed" / "work" / ADAPTER).read_bytes() == expected


def test_an_edited_dataset_is_trained_anew_from_the_first_step(tmp_path: Path) -> None:
    run(tiny_job(tmp_path), tmp_path / "work")
    job = tiny_job(tmp_path, rows=sums(41)[1:])
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        run(job, tmp_path / "work")
    assert steps == list(range(1, STEPS + 1))


def test_checkpoints_of_another_training_neither_count_nor_stay(tmp_path: Path) -> None:
    run(tiny_job(tmp_path, {"training": {"epochs": 3}}), tmp_path / "work")
    report = run(tiny_job(tmp_path), tmp_path / "work")
    assert report["training"] | {"lastLoss": 0} == {"backend": "native", "steps": STEPS, "resumedFrom": 0, "lastLoss": 0}
    assert sorted(path.name for path in (tmp_path / "work" / "outputs").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    first = run(job, tmp_path / "work")
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        assert run(job, tmp_path / "work") == first
    assert steps == []


@pytest.mark.parametrize("stopped", [False, True])
def test_another_base_model_at_the_same_place_is_trained_anew(stopped: bool, tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    with pytest.MonkeyPatch.context() as patch, nullcontext() if not stopped else pytest.raises(Killed):
        at_step(patch, 2 if stopped else 0, kill)
        run(job, tmp_path / "work")
    (tmp_path / "model" / "README.md").write_text("Read me.")
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        run(job, tmp_path / "work")
        assert steps == (list(range(2, STEPS + 1)) if stopped else []), "nothing that is loaded has changed"
    (tmp_path / "work" / "report.json").unlink(missing_ok=stopped)
    save_tiny_model(tmp_path / "model", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        run(job, tmp_path / "work")
    assert steps == list(range(1, STEPS + 1))


def test_a_finished_model_of_another_base_is_not_published_again(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    first = run(job, tmp_path / "work")
    save_tiny_model(tmp_path / "model", seed=1)
    second = run(job, tmp_path / "work")
    assert first["identities"]["model"] != second["identities"]["model"]
    assert first["identities"] | {"model": ""} == second["identities"] | {"model": ""}
    assert first["losses"]["base"] != second["losses"]["base"]


def test_whatever_a_seal_or_the_report_speaks_of_is_on_the_disk_before_it(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with recorded_disk() as disk:
        run(tiny_job(tmp_path, {"outputs": {"artifacts": ["adapter", "quantized"]}}), work)
    seals = [path for path in disk.unsynced if path.name == checkpoints.SEAL]
    assert len(seals) == STEPS
    assert not any(disk.unsynced[path] for path in seals)
    weights = [work / name for name in (ADAPTER, "model-torchao/model.safetensors", "proof/reference.safetensors")]
    assert all(path.is_file() for path in weights)
    assert not [path for path in disk.unsynced[work / "report.json"] if path.parent in {item.parent for item in weights}]


def test_a_second_run_in_the_same_working_directory_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    job, seen = tiny_job(tmp_path), []

    def again() -> None:
        seen.append(sorted((tmp_path / "work" / "outputs").rglob("*")))
        with pytest.raises(InfrastructureError, match=r"Another run is at work in .*; wait for its end, or choose another --workdir"):
            run(job, tmp_path / "work")
        seen.append(sorted((tmp_path / "work" / "outputs").rglob("*")))

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, again)
        run(job, tmp_path / "work")
    assert seen[0] == seen[1]


def test_after_a_failed_upload_no_optimizer_step_is_repeated(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)

    def refuse(*_: Any) -> None:
        raise InfrastructureError("The disk of the destination is away.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destinations.files, "publish", refuse)
        with pytest.raises(NotPublishedError, match="is away"):
            run(job, tmp_path / "work")
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        run(job, tmp_path / "work")
    assert steps == []
    assert json.loads((tmp_path / "published" / "manifest.json").read_text())["files"]


def test_a_stage_behind_training_that_was_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(tmp_path)
    calls: list[int] = []
    original = evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    run(job, tmp_path / "work")
    (tmp_path / "work" / "report.json").unlink()
    run(job, tmp_path / "work")
    assert calls == [1]


def test_a_model_that_was_lost_is_made_and_proved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(tmp_path, {"outputs": {"artifacts": ["adapter", "quantized"]}})
    proofs: list[int] = []
    original = verify.run
    monkeypatch.setattr(verify, "run", lambda ctx: proofs.append(1) or original(ctx))
    run(job, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "model-torchao")
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        run(job, tmp_path / "work")
    assert steps == []
    assert proofs == [1, 1]


def test_an_adapter_that_is_shipped_later_is_measured_without_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate holds it against the base model; without a measurement it would let any pass."""
    only = run(tiny_job(tmp_path, {"outputs": {"artifacts": ["quantized"]}}), tmp_path / "work")
    assert only["losses"]["adapter"] is None
    steps = at_step(monkeypatch, 0, kill)
    both = run(tiny_job(tmp_path, {"outputs": {"artifacts": ["adapter", "quantized"]}}), tmp_path / "work")
    assert steps == []
    assert both["losses"]["adapter"] is not None
    assert both["losses"]["adapter_over_base"] is not None


def test_what_another_machine_has_converted_is_converted_and_proved_again_without_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp_path, {"outputs": {"artifacts": ["adapter", "quantized"]}})
    did: list[str] = []
    for stage in (convert, verify):
        monkeypatch.setattr(
            stage, "run", lambda *args, stage=stage, original=stage.run: did.append(stage.__name__.rpartition(".")[2]) or original(*args)
        )

    def stop(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run", stop)
        with pytest.raises(Killed):
            run(job, tmp_path / "work")
    # Its logits, as a machine computes them that rounds otherwise.
    reference = tmp_path / "work" / "proof" / "reference.safetensors"
    recorded = load_file(reference)
    save_file(recorded | {"logits": recorded["logits"] + 1e-6}, reference)
    marker = tmp_path / "work" / "stages" / "converting.json"
    kept = json.loads(marker.read_text())
    marker.write_text(json.dumps(kept | {"made": tree_digest((tmp_path / "work" / "model-torchao", tmp_path / "work" / "proof"))}))
    monkeypatch.setattr(machine, "description", lambda _: "another machine")
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        report = run(job, tmp_path / "work")
    assert steps == []
    assert did == ["convert", "convert", "verify"]
    assert report["proof"]["holds"]


def test_a_checkpoint_of_another_dtype_is_not_gone_on_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As of a pod with a GPU, whose next one has none."""
    job = tiny_job(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(base_model, "training_dtype", lambda *_, **__: torch.bfloat16)
        at_step(patch, 3, kill)
        run(job, tmp_path / "work")
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        run(job, tmp_path / "work")
    assert steps == list(range(1, STEPS + 1))
    assert "The model, its dtype or the data has changed since the checkpoint of step 2" in capfd.readouterr().out


def test_a_finished_model_that_has_changed_since_its_proof_is_not_published(tmp_path: Path) -> None:
    job, weights = tiny_job(tmp_path), tmp_path / "work" / ADAPTER

    def refuse(*_: Any) -> None:
        raise InfrastructureError("The disk of the destination is away.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destinations.files, "publish", refuse)
        with pytest.raises(NotPublishedError):
            run(job, tmp_path / "work")
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(patch, 0, kill)
        run(job, tmp_path / "work")
    assert steps == []
    assert (tmp_path / "published" / ADAPTER).read_bytes() == good


def test_a_changed_input_has_every_stage_behind_it_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    run(tiny_job(tmp_path), tmp_path / "work")
    for changes in ({"training": {"seed": 7}}, {"lora": {"rank": 8}}, {"quantization": {"qatPercent": 25}}):
        with pytest.MonkeyPatch.context() as patch:
            steps = at_step(patch, 0, kill)
            run(tiny_job(tmp_path, changes), tmp_path / "work")
        assert steps == list(range(1, STEPS + 1))
    assert calls == [1] * 4


def test_a_finished_run_with_held_out_data_of_its_own_is_not_done_again(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", sums(5))
    job = tiny_job(tmp_path, {"dataset": {"evaluation": {"source": f"file://{held_out}"}}})
    first = run(job, tmp_path / "work")
    assert first["sources"]["heldOut"].startswith(f"file://{held_out}")
    assert run(job, tmp_path / "work") == first


@pytest.mark.parametrize(("place", "name"), [(pipeline, "remove_mirror"), (RunReporter, "end"), (summary, "print_summary")])
def test_sigterm_behind_the_publication_ends_a_run_well(place: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another pod would train it again: its checkpoints are gone by then."""
    monkeypatch.setattr(place, name, lambda *_: signal.raise_signal(signal.SIGTERM))
    assert finetune("run", str(tiny_job(tmp_path)), "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")) == 0


def test_sigterm_outside_of_training_ends_at_once_with_the_code_of_a_checkpointed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_run(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("SIGTERM did not stop the stage")

    monkeypatch.setattr(evaluate, "run", evaluate_run)
    with pytest.raises(Checkpointed, match="Evaluating"):
        run(tiny_job(tmp_path), tmp_path / "work")
