"""A training that is published already is taken up from there: no optimizer step is made for another destination."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.stages import train
from support.run_contexts import write_files
from support.s3_server import S3Server
from support.tiny_jobs import STEPS, run, tiny_job

BOTH = ["adapter", "quantized"]


def outputs(server: S3Server, bucket: str, *more: dict[str, Any], artifacts: list[str] = BOTH) -> dict[str, Any]:
    return {"outputs": {"artifacts": artifacts, "destinations": [{"uri": f"s3://{bucket}/bot", "endpoint": server.endpoint}, *more]}}


@pytest.fixture
def published(s3_laptop: S3Server, bucket: str, tmp_path: Path) -> dict[str, Any]:
    """The report of a run that is published, whose working directory is gone."""
    report = run(tiny_job(tmp_path, outputs(s3_laptop, bucket)), tmp_path / "work")
    shutil.rmtree(tmp_path / "work")
    return report


@pytest.fixture
def no_training(published: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it trained again")

    monkeypatch.setattr(train, "run", refuse)


@pytest.mark.usefixtures("no_training")
def test_another_destination_costs_no_step(s3_laptop: S3Server, bucket: str, published: dict[str, Any], tmp_path: Path) -> None:
    more = {"uri": f"file://{tmp_path}/elsewhere"}
    report = run(tiny_job(tmp_path, outputs(s3_laptop, bucket, more)), tmp_path / "work")
    assert report == published
    for name in ("lora_model/adapter_model.safetensors", "model-torchao/model.safetensors", "proof/reference.safetensors", "manifest.json"):
        assert (tmp_path / "elsewhere" / name).is_file()
    assert leftovers(tmp_path / "work") == []


def leftovers(work: Path) -> list[str]:
    return [path.name for path in work.rglob("*") if "restored" in path.name or path.name.endswith((".partial", ".replaced"))]


def test_another_training_is_not_taken_up(s3_laptop: S3Server, bucket: str, published: dict[str, Any], tmp_path: Path) -> None:
    changes = outputs(s3_laptop, bucket) | {"training": {"seed": 7}}
    report = run(tiny_job(tmp_path, changes), tmp_path / "work")
    assert report["training"]["steps"] == STEPS
    assert report["trainDigest"] != published["trainDigest"]


@pytest.mark.usefixtures("published")
def test_a_file_that_is_not_what_the_manifest_says_is_not_taken_up(s3_laptop: S3Server, bucket: str, inside: Any, tmp_path: Path) -> None:
    inside.put({"bot/lora_model/adapter_model.safetensors": b"other bytes"})
    run(tiny_job(tmp_path, outputs(s3_laptop, bucket, {"uri": f"file://{tmp_path}/elsewhere"})), tmp_path / "work")
    assert (tmp_path / "work" / "stages").is_dir()  # made here, not fetched
    assert (
        inside.read()["bot/lora_model/adapter_model.safetensors"]
        == (tmp_path / "elsewhere" / "lora_model" / "adapter_model.safetensors").read_bytes()
    )


@pytest.mark.usefixtures("published")
def test_a_publication_that_has_lost_a_file_is_made_again(s3_laptop: S3Server, bucket: str, inside: Any, tmp_path: Path) -> None:
    inside.client.delete_object(Bucket=bucket, Key="bot/model-torchao/model.safetensors")
    run(tiny_job(tmp_path, outputs(s3_laptop, bucket)), tmp_path / "work")
    assert (tmp_path / "work" / "stages").is_dir()  # made here, not fetched
    assert "bot/model-torchao/model.safetensors" in inside.read()
    assert leftovers(tmp_path / "work") == []


def test_an_artifact_that_was_not_published_is_made(s3_laptop: S3Server, bucket: str, tmp_path: Path) -> None:
    run(tiny_job(tmp_path, outputs(s3_laptop, bucket, artifacts=["adapter"])), tmp_path / "work")
    shutil.rmtree(tmp_path / "work")
    run(tiny_job(tmp_path, outputs(s3_laptop, bucket)), tmp_path / "work")
    assert (tmp_path / "work" / "model-torchao").is_dir()


def test_a_download_that_was_killed_takes_no_room_from_a_training(s3_laptop: S3Server, bucket: str, tmp_path: Path) -> None:
    write_files(tmp_path / "work", {".restored.partial/lora_model/a": b"half", "restored/other/a": b"whole"})
    run(tiny_job(tmp_path, outputs(s3_laptop, bucket, artifacts=["adapter"])), tmp_path / "work")
    assert leftovers(tmp_path / "work") == []
