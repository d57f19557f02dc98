"""Preflight's own checks: the folders, and where checkpoints outlast the pod."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.errors import AccessError
from finetune_trainer.stages import preflight
from support.run_contexts import context, notes, refused, run_spec
from support.s3_server import S3Server


def test_a_mirror_that_may_not_be_written_is_found_before_training(s3_here: S3Server, mount: Callable[..., Path], tmp_path: Path) -> None:
    mount("checkpoints", AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY="wrong")
    mirror = {"uri": "s3://bucket/aside", "endpoint": s3_here.endpoint, "credentials": {"secretName": "aside"}}
    ctx = context(tmp_path, run_spec(storage={"checkpoints": mirror}), in_cluster=True)
    with refused(AccessError, "spec.storage.checkpoints.uri", "AWS_SECRET_ACCESS_KEY"):
        preflight.check_mirror(ctx)


def test_the_default_mirror_leaves_nothing_behind(s3_here: S3Server, inside: Any, mount: Callable[..., Path], tmp_path: Path) -> None:
    mount("destination-0", AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY=s3_here.secret_key)
    where = {"uri": f"s3://{inside.name}/bot", "endpoint": s3_here.endpoint, "credentials": {"secretName": "keys"}}
    preflight.check_mirror(context(tmp_path, run_spec("builtin://smollm2-135m", "builtin://python-docs", where), in_cluster=True))
    assert inside.listed() == []


def test_a_run_whose_checkpoints_end_with_its_pod_says_so(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec("builtin://smollm2-135m", "builtin://python-docs", {"uri": "hf://acme/bot"}), in_cluster=True)
    preflight.check_mirror(ctx)
    assert "storage.checkpoints.uri" in notes(ctx)[0]


def test_a_claim_needs_no_mirror(tmp_path: Path) -> None:
    storage = {"workspace": {"persistentVolumeClaim": "mine"}}
    ctx = context(
        tmp_path, run_spec("builtin://smollm2-135m", "builtin://python-docs", {"uri": "hf://acme/bot"}, storage=storage), in_cluster=True
    )
    preflight.check_mirror(ctx)
    assert notes(ctx) == []
