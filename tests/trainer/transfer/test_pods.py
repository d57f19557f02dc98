"""Runs in pods that leave nothing behind but their mirror, on a real S3 server: what the next pod need not do again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api.job import JobDescription
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer import pipeline
from finetune_trainer.destinations import s3
from finetune_trainer.errors import InfrastructureError, NotPublishedError
from finetune_trainer.mirror import DEFAULT_FOLDER
from finetune_trainer.reporting import reporter, session
from finetune_trainer.stages import publish
from support.run_contexts import read_files
from support.s3_server import S3Server
from support.tiny_model import save_tiny_model, sums, write_jsonl

STEPS = 4


@pytest.fixture
def pod(
    s3_here: S3Server, inside: Any, mount: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[int]]:
    """Runs the job in a pod with empty folders; returns the optimizer steps that it made."""
    save_tiny_model(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", sums(40))
    inside.put({f"base/{name}": content for name, content in read_files(tmp_path / "model").items()})
    inside.put({"rows.jsonl": (tmp_path / "rows.jsonl").read_bytes()})
    for role in ("model", "dataset", "destination-0"):
        mount(role, AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY=s3_here.secret_key)
    there = {"endpoint": s3_here.endpoint, "credentials": {"secretName": "keys"}}
    spec = {
        "model": {"source": f"s3://{inside.name}/base", **there},
        "dataset": {"source": f"s3://{inside.name}/rows.jsonl", "evaluation": {"percent": 20}, **there},
        "lora": {"rank": 4},
        "quantization": {"scheme": "int8-int4"},
        "training": {"batchSize": 8, "maxLength": 64, "learningRate": "1e-3", "checkpointEvery": 1},
        "outputs": {"artifacts": ["adapter"], "destinations": [{"uri": f"s3://{inside.name}/bot", **there}]},
        "resources": {"gpus": 0},
    }
    job = JobDescription.of({"name": "bot", "namespace": "team", "uid": "1"}, FineTuneJobSpec.model_validate(spec), in_cluster=True)
    monkeypatch.setenv(session.ENV_TERMINATION_LOG, str(tmp_path / "termination-log"))

    def run() -> list[int]:
        steps: list[int] = []
        for folder in ("work", "cache"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reporter.RunReporter, "step", lambda _, progress: steps.append(progress.step))
            try:
                pipeline.run(job, tmp_path / "work", tmp_path / "cache")
            finally:
                run.steps = steps
        return steps

    return run


def test_what_was_trained_and_not_published_costs_the_next_pod_no_step(pod: Any, inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise InfrastructureError("The server is away.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "publish", refuse)
        patch.setattr(publish, "PAUSES_SECONDS", ())
        with pytest.raises(NotPublishedError, match="is away"):
            pod()
    assert pod.steps == list(range(1, STEPS + 1))
    assert any(f"{DEFAULT_FOLDER}/" in key for key in inside.listed())
    assert pod() == []
    assert "bot/manifest.json" in inside.listed()
    assert not any(f"{DEFAULT_FOLDER}/" in key for key in inside.listed())


def test_what_is_published_costs_another_pod_no_step(pod: Any, inside: Any) -> None:
    pod()
    before = inside.read()
    assert pod() == []
    assert inside.read() == before
