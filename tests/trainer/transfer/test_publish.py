"""The publishing stage: each destination gets its turn, and what failed is said in one error of its own."""

from pathlib import Path
from typing import Any

import pytest
from finetune_api.exits import ExitCode
from finetune_trainer.context import RunContext
from finetune_trainer.errors import NotPublishedError
from finetune_trainer.stages import publish
from support.hub_server import HubServer
from support.run_contexts import context, notes, refused, report_of, run_spec, write_artifacts
from support.s3_server import S3Server, free_port


def finished(folder: Path, *destinations: dict[str, Any]) -> RunContext:
    """A finished run on a laptop."""
    ctx = context(folder, run_spec("hf://acme/base", "builtin://python-docs", *destinations))
    write_artifacts(ctx, report_of(ctx))
    return ctx


def test_every_destination_gets_every_artifact_in_the_spec_s_order(
    s3_laptop: S3Server, hub_laptop: HubServer, bucket: str, tmp_path: Path
) -> None:
    ctx = finished(
        tmp_path, {"uri": f"s3://{bucket}/bot", "endpoint": s3_laptop.endpoint}, {"uri": "hf://acme/bot"}, {"uri": f"file://{tmp_path}/bot"}
    )

    published = publish.run(ctx, report_of(ctx))

    assert [(item.kind, item.uri.partition("://")[0]) for item in published] == [
        (kind, scheme) for scheme in ("s3", "hf", "file") for kind in ("adapter", "quantized")
    ]


def test_each_success_is_said(tmp_path: Path) -> None:
    ctx = finished(tmp_path, {"uri": f"file://{tmp_path}/a"}, {"uri": f"file://{tmp_path}/b"})

    publish.run(ctx, report_of(ctx))

    assert notes(ctx) == [f"Published to file://{tmp_path}/a.", f"Published to file://{tmp_path}/b."]


def test_one_destination_that_fails_does_not_keep_the_others_waiting(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    ctx = finished(
        tmp_path,
        {"uri": "s3://no-such-bucket/bot", "endpoint": s3_laptop.endpoint},
        {"uri": f"s3://{inside.name}/bot", "endpoint": s3_laptop.endpoint},
    )

    with refused(NotPublishedError, "trained and kept", "spec.outputs.destinations[0].uri", "NoSuchBucket", hidden=("destinations[1]",)):
        publish.run(ctx, report_of(ctx))
    assert "bot/manifest.json" in inside.read()


def test_what_nobody_foresaw_at_one_destination_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = finished(tmp_path, {"uri": "s3://bucket/bot"}, {"uri": f"file://{tmp_path}/b"})

    def broken(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("finetune_trainer.destinations.s3.publish", broken)
    with refused(NotPublishedError, "KeyError"):
        publish.run(ctx, report_of(ctx))
    assert (tmp_path / "b" / "manifest.json").is_file()


def test_every_failure_is_named(s3_laptop: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.sources.credentials.PATIENT_ATTEMPTS", 1)
    away = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    ctx = finished(
        tmp_path, {"uri": "s3://no-such-bucket/bot", "endpoint": s3_laptop.endpoint}, {"uri": f"s3://{bucket}/bot", "endpoint": away}
    )

    with refused(NotPublishedError, "destinations[0].uri", "destinations[1].uri", hidden=(s3_laptop.secret_key,)):
        publish.run(ctx, report_of(ctx))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited for, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(publish, "sleep", waited.append)
    return waited


@pytest.fixture
def in_a_pod(
    s3_laptop: S3Server, hub_laptop: HubServer, bucket: str, mount: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunContext:
    """A finished run in a pod, with two destinations."""
    monkeypatch.setenv("HF_ENDPOINT", hub_laptop.endpoint)
    mount("destination-0", AWS_ACCESS_KEY_ID=s3_laptop.access_key, AWS_SECRET_ACCESS_KEY=s3_laptop.secret_key)
    mount("destination-1", HF_TOKEN=hub_laptop.token)
    places = (
        {"uri": f"s3://{bucket}/bot", "endpoint": s3_laptop.endpoint, "credentials": {"secretName": "keys"}},
        {"uri": "hf://acme/bot", "credentials": {"secretName": "hub"}},
    )
    ctx = context(tmp_path, run_spec("hf://acme/base", "builtin://python-docs", *places), in_cluster=True)
    write_artifacts(ctx, report_of(ctx))
    return ctx


def test_a_pod_waits_for_a_service_that_is_away_for_minutes(in_a_pod: RunContext, hub_laptop: HubServer, pauses: list[float]) -> None:
    hub_laptop.refuse = lambda _, path: 500 if "/commit/" in path and len(pauses) < 3 else None

    published = publish.run(in_a_pod, report_of(in_a_pod))

    assert [(item.kind, item.uri.partition("://")[0]) for item in published] == [
        (kind, scheme) for scheme in ("s3", "hf") for kind in ("adapter", "quantized")
    ]
    assert pauses == [5, 15, 45]
    assert sum("Published to s3" in note for note in notes(in_a_pod)) == 1
    assert sum("the Hub answered 500" in note and "Trying again in" in note for note in notes(in_a_pod)) == 3


def test_a_pod_does_not_wait_for_ever_and_not_for_what_is_refused(in_a_pod: RunContext, hub_laptop: HubServer, pauses: list[float]) -> None:
    hub_laptop.refuse = lambda _, path: 403 if "/commit/" in path else None
    with refused(NotPublishedError, "destinations[1].uri"):
        publish.run(in_a_pod, report_of(in_a_pod))
    assert pauses == []
    hub_laptop.refuse = lambda _, path: 500 if "/commit/" in path else None
    with refused(NotPublishedError, "destinations[1].uri", "the Hub answered 500"):
        publish.run(in_a_pod, report_of(in_a_pod))
    assert pauses == list(publish.PAUSES_SECONDS)


def test_trained_and_not_published_has_an_exit_code_of_its_own() -> None:
    assert NotPublishedError.exit_code is ExitCode.NOT_PUBLISHED
    assert int(NotPublishedError.exit_code) == 17


def test_publishing_again_after_a_failure_sends_only_what_is_missing(
    s3_laptop: S3Server, hub_laptop: HubServer, inside: Any, s3_calls: Any, tmp_path: Path
) -> None:
    ctx = finished(tmp_path, {"uri": f"s3://{inside.name}/bot", "endpoint": s3_laptop.endpoint}, {"uri": "hf://acme/bot"})
    hub_laptop.refuse = lambda _, path: 500 if "/commit/" in path else None
    with refused(NotPublishedError, "destinations[1].uri", "the Hub answered 500"):
        publish.run(ctx, report_of(ctx))
    hub_laptop.refuse = lambda _method, _path: None
    s3_calls.made.clear()

    published = publish.run(ctx, report_of(ctx))

    assert len(published) == 4
    assert s3_calls.keys("PutObject") == []
