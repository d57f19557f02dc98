"""Bad input on a laptop: each ends before training, with the exit code of its class and one sentence that names the thing and the mend.

`finetune preflight` refuses the same with the same words, without a weight.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from finetune_api.exits import REASONS, ExitCode
from finetune_trainer.reporting.progress import ProgressMeter
from safetensors.torch import load_file, save_file
from support.bad_inputs import ACCESS, BAD_INPUTS, CONFIG, DATA, MACHINE, MODEL, BadInput, Ground, was_run
from support.run_contexts import read_files
from support.tiny_jobs import finetune, tiny_job

# What to do begins a clause of the sentence.
MEND = re.compile(
    r"(^|; )(add|change|check|choose|convert|correct|create|download|give|leave|name|put|raise|remove|rename|save|set|upload|use|write)( |$)|must (be|name)\b"
)


@pytest.fixture
def ground(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    """A folder with a good job, and the servers that a row needs."""
    tiny_job(tmp_path)
    needs = request.node.callspec.params["bad"].needs
    if needs == "s3":
        return Ground(tmp_path, monkeypatch, request.getfixturevalue("s3_laptop"), request.getfixturevalue("bucket"))
    return Ground(tmp_path, monkeypatch, hub=request.getfixturevalue("hub") if needs else None)


def spoilt(bad: BadInput, ground: Ground) -> Path:
    """The job file, with the mistake made."""
    changes = bad.spoil(ground)
    if isinstance(changes, dict):
        return tiny_job(ground.folder, changes)
    (ground.folder / "job.yaml").write_text(changes)
    return ground.folder / "job.yaml"


def test_the_table_has_rows_of_every_kind() -> None:
    assert len(BAD_INPUTS) == sum(map(len, (DATA, MODEL, CONFIG, ACCESS, MACHINE))) >= 60
    assert {bad.code for bad in BAD_INPUTS.values()} >= {ExitCode.DATA, ExitCode.SPEC, ExitCode.ACCESS, ExitCode.CAPACITY}


@pytest.mark.parametrize("bad", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_every_row_names_the_mend(bad: BadInput) -> None:
    assert any(MEND.search(words) for words in bad.words)


@pytest.mark.parametrize("bad", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_ends_in_one_sentence(bad: BadInput, ground: Ground, capfd: pytest.CaptureFixture[str]) -> None:
    job, folder = spoilt(bad, ground), ground.folder
    before = {path: content for path, content in read_files(folder).items() if path.startswith("published/")}
    folders = "--workdir", str(folder / "work"), "--cache", str(folder / "cache")
    repositories = deepcopy(ground.hub.repositories) if ground.hub else {}
    assert finetune("run", str(job), *folders) == bad.code
    ran = capfd.readouterr()
    said = ran.err.strip().splitlines()[-1]
    for word in bad.words:
        assert word in said
    assert said.startswith(f"{REASONS[bad.code]}: ")
    assert finetune("preflight", str(job), *folders) == bad.code
    asked = capfd.readouterr()
    assert asked.err.strip().splitlines()[-1] == said
    assert not [text for text in (*ran, *asked) if "Traceback" in text]
    assert not was_run(folder)
    assert not [name for name in ("lora_model", "model-torchao", "report.json") if (folder / "work" / name).exists()]
    assert {path: content for path, content in read_files(folder).items() if path.startswith("published/")} == before
    if ground.s3:
        assert not ground.s3.client().list_objects_v2(Bucket=ground.bucket).get("Contents")
    if ground.hub:
        assert ground.hub.repositories == repositories


@pytest.mark.parametrize("name", ["a line that is cut off", "pickled weights", "a misspelt field"])
def test_the_command_itself_says_the_same(name: str, tmp_path: Path) -> None:
    bad = BAD_INPUTS[name]
    tiny_job(tmp_path)
    job = spoilt(bad, Ground(tmp_path, pytest.MonkeyPatch()))
    command = [sys.executable, "-m", "finetune_trainer.cli", "run", str(job), "--workdir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == bad.code
    assert len(done.stderr.strip().splitlines()) == 1
    for word in bad.words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("model.embed_tokens.weight", float("nan")),
        ("model.norm.weight", float("inf")),
        ("model.layers.1.mlp.up_proj.weight", float("-inf")),
    ],
)
@pytest.mark.parametrize("scheme", ["int8-int4", "none"])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    name: str, bad: float, scheme: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Preflight reads no weights; a run does not end with a loss that is not finite, which a lower learning rate would not mend."""
    job = tiny_job(tmp_path, {"quantization": {"scheme": scheme}, "outputs": {"artifacts": ["adapter"]}})
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[name].view(-1)[3] = bad
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert finetune("run", str(job), "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")) == ExitCode.DATA
    assert f"The model's weight {name} has values that are not finite" in capfd.readouterr().err


def test_code_of_its_own_runs_once_it_is_asked_for(tmp_path: Path) -> None:
    tiny_job(tmp_path)
    BAD_INPUTS["code of its own"].spoil(Ground(tmp_path, pytest.MonkeyPatch()))
    job = tiny_job(tmp_path, {"model": {"trustRemoteCode": True}})
    assert finetune("preflight", str(job), "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")) == ExitCode.DATA
    assert was_run(tmp_path)  # so the rows above would have noticed


def test_an_architecture_that_transformers_knows_needs_no_code_of_the_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Many a model brings the code from before its architecture was taken up."""
    job = tiny_job(tmp_path)
    config = tmp_path / "model" / "config.json"
    BAD_INPUTS["code of its own"].spoil(Ground(tmp_path, pytest.MonkeyPatch()))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    assert finetune("preflight", str(job), "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")) == ExitCode.SUCCEEDED
    assert "which is not run: transformers' own llama is" in capfd.readouterr().out
    assert not was_run(tmp_path)


def test_a_working_directory_that_can_not_be_made_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code = finetune("run", str(tiny_job(tmp_path)), "--workdir", str(tmp_path / "file" / "work"), "--cache", str(tmp_path / "cache"))
    assert code == ExitCode.CAPACITY
    assert "is not writable" in capfd.readouterr().err


Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a disk of its own, with these mount options, and returns where."""
    if os.geteuid() != 0:
        pytest.skip("a disk of its own takes root, to mount it")
    target = tmp_path / "disk"

    def mount(options: str) -> Path:
        target.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", target], check=True)
        return target

    yield mount
    subprocess.run(["umount", "--lazy", target], check=True)


def test_a_read_only_disk_is_named(disk: Disk, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = disk("ro") / "work"
    assert finetune("run", str(tiny_job(tmp_path)), "--workdir", str(work), "--cache", str(tmp_path / "cache")) == ExitCode.CAPACITY
    assert f"{work} is not writable (Read-only file system)" in capfd.readouterr().err


def test_a_full_disk_is_seen_before_anything_is_loaded(disk: Disk, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = disk("size=8m") / "work"
    assert finetune("run", str(tiny_job(tmp_path)), "--workdir", str(work), "--cache", str(tmp_path / "cache")) == ExitCode.CAPACITY
    assert f"{work} has 8 MiB left" in capfd.readouterr().err


def test_a_disk_that_fills_up_while_training_keeps_what_is_complete(
    disk: Disk, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original = disk("size=80m"), ProgressMeter.step_done

    def step_done(self: ProgressMeter, step: int, *args: Any) -> None:
        original(self, step, *args)
        if step == 2:  # and from its checkpoint on nothing more can be written
            fill(folder)

    monkeypatch.setattr(ProgressMeter, "step_done", step_done)
    code = finetune("run", str(tiny_job(tmp_path)), "--workdir", str(folder / "work"), "--cache", str(tmp_path / "cache"))
    assert code == ExitCode.CAPACITY
    assert "No space is left on the disk" in capfd.readouterr().err
    assert [path.parent.name for path in (folder / "work" / "outputs").glob("checkpoint-*/sealed.json")] == ["checkpoint-1"]
    assert not (folder / "work" / "lora_model").exists()


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(2**20))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("no dataset", "preflight"),
        ("a line that is cut off", "run"),
        ("no config.json", "preflight"),
    ],
)
def test_what_the_cheap_checks_refuse_needs_no_torch(name: str, command: str, tmp_path: Path) -> None:
    tiny_job(tmp_path)
    job = spoilt(BAD_INPUTS[name], Ground(tmp_path, pytest.MonkeyPatch()))
    script = (
        "import sys\n"
        f"sys.argv = ['finetune', {command!r}, {str(job)!r}, '--workdir', {str(tmp_path / 'work')!r}, '--cache', {str(tmp_path / 'cache')!r}]\n"
        "from finetune_trainer.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    _, code, torch_was_loaded = done.stdout.splitlines()[-1].split()
    assert int(code) == ExitCode.DATA
    assert torch_was_loaded == "False"


def test_a_learning_rate_that_explodes_stops_at_once_and_leaves_no_adapter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path, {"training": {"learningRate": "1e30", "epochs": 2}})
    code = finetune("run", str(job), "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache"))
    said = capfd.readouterr().err
    assert code == ExitCode.DATA
    assert "is not finite at training.learningRate 1e30; lower it" in said
    assert not (tmp_path / "work" / "lora_model").exists()
