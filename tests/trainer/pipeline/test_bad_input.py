"""Bad input on a laptop: each ends before training, with the exit code of its class and one sentence that names the thing and the mend.

`finetune preflight` refuses the same with the same words, without a weight.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.exits import ExitCode
from finetune_trainer.reporting.progress import ProgressMeter
from safetensors.torch import load_file, save_file
from support.tiny_jobs import finetune, tiny_job
from support.tiny_model import tiny_tokenizer

Prepare = Callable[[Path], dict[str, Any] | None]


def no_dataset(folder: Path) -> dict[str, Any]:
    return {"dataset": {"source": f"file://{folder}/nowhere.jsonl"}}


def empty_dataset(folder: Path) -> dict[str, Any]:
    (folder / "empty.jsonl").write_text("")
    return {"dataset": {"source": f"file://{folder}/empty.jsonl"}}


def broken_line(folder: Path) -> dict[str, Any]:
    (folder / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    return {"dataset": {"source": f"file://{folder}/broken.jsonl"}}


def wrong_column(folder: Path) -> dict[str, Any]:
    (folder / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    return {"dataset": {"source": f"file://{folder}/columns.jsonl"}}


def nothing_is_left(folder: Path) -> dict[str, Any]:
    (folder / "long.jsonl").write_text('{"instruction": "%s", "output": "b"}\n' % ("a" * 200))
    return {"dataset": {"source": f"file://{folder}/long.jsonl"}}


def no_config(folder: Path) -> dict[str, Any]:
    (folder / "model" / "config.json").unlink()
    return {}


def damaged_weights(folder: Path) -> dict[str, Any]:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return {}


def missing_weights(folder: Path) -> dict[str, Any]:
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    return {}


def other_shapes(folder: Path) -> dict[str, Any]:
    return edit_config(folder, intermediate_size=96)


def unknown_architecture(folder: Path) -> dict[str, Any]:
    return edit_config(folder, model_type="nonesuch")


def not_a_language_model(folder: Path) -> dict[str, Any]:
    return edit_config(folder, model_type="vit")


def code_of_its_own(folder: Path) -> dict[str, Any]:
    return edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})


def edit_config(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return {}


def no_tokenizer(folder: Path) -> dict[str, Any]:
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()
    return {}


def no_chat_template(folder: Path) -> dict[str, Any]:
    tiny_tokenizer(chat=False).save_pretrained(folder / "model")
    (folder / "model" / "chat_template.jinja").unlink()
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 4)
    return {"dataset": {"source": f"file://{folder}/chat.jsonl"}}


def foreign_tokenizer(folder: Path) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["unused", " make "])
    tokenizer.save_pretrained(folder / "model")
    return {}


def gate_without_held_out_rows(folder: Path) -> dict[str, Any]:
    (folder / "single.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    return {"dataset": {"source": f"file://{folder}/single.jsonl"}, "quality": {"maxLossIncreasePercent": "5"}}


def group_that_nothing_fits(_: Path) -> dict[str, Any]:
    return {"quantization": {"groupSize": 256}}


def pickled_weights(folder: Path) -> dict[str, Any]:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")
    return {}


def scheme_that_covers_little(_: Path) -> dict[str, Any]:
    return {"quantization": {"scheme": "fp8-int4"}}


def unknown_module(_: Path) -> dict[str, Any]:
    return {"lora": {"targetModules": "no_such_proj"}}


def output_head(_: Path) -> dict[str, Any]:
    return {"lora": {"targetModules": "q_proj,lm_head"}}


def foreign_destination(folder: Path) -> dict[str, Any]:
    (folder / "published").mkdir()
    (folder / "published" / "thesis.txt").write_text("years of work")
    return {}


@pytest.mark.parametrize(
    ("prepare", "code", "named"),
    [
        (no_dataset, ExitCode.DATA, ["nowhere.jsonl", "does not exist"]),
        (empty_dataset, ExitCode.DATA, ["empty.jsonl", "at least one row"]),
        (broken_line, ExitCode.DATA, ["broken.jsonl", "line 2", "not JSON"]),
        (wrong_column, ExitCode.DATA, ["columns.jsonl", "line 1", "question"]),
        (nothing_is_left, ExitCode.DATA, ["long.jsonl", "maxLength"]),
        (no_config, ExitCode.DATA, ["config.json"]),
        (damaged_weights, ExitCode.DATA, ["does not load"]),
        (missing_weights, ExitCode.DATA, ["lacks 1 weights", "layers.1.mlp.up_proj", "download it again"]),
        (other_shapes, ExitCode.DATA, ["does not load"]),
        (pickled_weights, ExitCode.DATA, ["safetensors"]),
        (unknown_architecture, ExitCode.DATA, ["does not load", "nonesuch"]),
        (not_a_language_model, ExitCode.DATA, ["does not load", "causal language model"]),
        (code_of_its_own, ExitCode.SPEC, ["spec.model.trustRemoteCode"]),
        (no_tokenizer, ExitCode.DATA, ["The tokenizer", "does not load"]),
        (no_chat_template, ExitCode.DATA, ["chat.jsonl", "no chat template"]),
        (foreign_tokenizer, ExitCode.DATA, ["token 260, but the model knows 260 tokens only"]),
        (gate_without_held_out_rows, ExitCode.DATA, ["single.jsonl", "quality.maxLossIncreasePercent"]),
        (group_that_nothing_fits, ExitCode.SPEC, ["spec.quantization.groupSize", "256"]),
        (scheme_that_covers_little, ExitCode.SPEC, ["fp8-int4", "only 22%", "input size 64", "scheme int4"]),
        (unknown_module, ExitCode.SPEC, ["no_such_proj", "targetModules"]),
        (output_head, ExitCode.SPEC, ["spec.lora.targetModules", "lm_head", "leave it out"]),
        (foreign_destination, ExitCode.SPEC, ["spec.outputs.destinations[0].uri", "not an earlier publication"]),
    ],
)
def test_bad_input_ends_in_one_sentence(
    prepare: Prepare, code: ExitCode, named: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(tmp_path)
    job = tiny_job(tmp_path, prepare(tmp_path))
    folders = "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")
    assert finetune("run", str(job), *folders) == code
    said = capfd.readouterr().err.strip().splitlines()[-1]
    for word in named:
        assert word in said
    assert "Traceback" not in said
    assert finetune("preflight", str(job), *folders) == code
    assert capfd.readouterr().err.strip().splitlines()[-1] == said
    assert not (tmp_path / "work" / "lora_model").exists()
    assert not (tmp_path / "work" / "report.json").exists()
    assert not (tmp_path / "published" / "manifest.json").exists()


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


@pytest.mark.parametrize(("prepare", "command"), [(no_dataset, "preflight"), (broken_line, "run"), (no_config, "preflight")])
def test_what_the_cheap_checks_refuse_needs_no_torch(prepare: Prepare, command: str, tmp_path: Path) -> None:
    tiny_job(tmp_path)
    job = tiny_job(tmp_path, prepare(tmp_path))
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
