"""Writes what a job ships: to S3, to the Hub, to a folder. Called by preflight (`check_write`) and stages/publish.py (`publish`).

One module a scheme; each puts the same manifest last (or everything in one commit), and each does nothing the second time.
"""

from pathlib import Path
from typing import Any

from finetune_api.status import PublishedArtifact

from finetune_trainer.context import RunContext
from finetune_trainer.destinations import files, hub, s3
from finetune_trainer.destinations.layout import folders, layout
from finetune_trainer.destinations.manifest import Publication, publication
from finetune_trainer.destinations.model_card import model_card
from finetune_trainer.sources.location import Location, destinations

_SCHEMES = {"s3": s3, "hf": hub, "file": files}


def check_write(ctx: RunContext) -> None:
    """Every destination can be written to, proven as far as that leaves nothing behind.

    Raises:
        AccessError, InfrastructureError, SpecError: one sentence each.
    """
    for where in destinations(ctx.job):
        _SCHEMES[where.scheme].check_write(ctx, where)


def publish(ctx: RunContext, where: Location, report: dict[str, Any]) -> tuple[PublishedArtifact, ...]:
    """Ships the wanted artifacts to one destination.

    Args:
        ctx: the run; its report.json is written already.
        where: one of `location.destinations(ctx.job)`.
        report: report.json's content.

    Raises:
        AccessError, CapacityError, InfrastructureError, NotPublishedError, SpecError: one sentence each.
    """
    at_hub = where.scheme == "hf"
    placed = folders(ctx.spec.wanted_artifacts, hub=at_hub)
    card = _write_card(ctx, where, model_card(ctx.job, report, placed))
    content = publication(ctx.job, report, layout(ctx, card, hub=at_hub))
    uri = _SCHEMES[where.scheme].publish(ctx, where, content)
    return tuple(_published(uri, artifact.value, folder, content) for artifact, folder in placed.items())


def _write_card(ctx: RunContext, where: Location, text: str) -> Path:
    path = ctx.workdir / "cards" / f"{where.role}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _published(uri: str, kind: str, folder: str, content: Publication) -> PublishedArtifact:
    return PublishedArtifact(kind=kind, uri=f"{uri}/{folder}".rstrip("/"), digest=content.digest, bytes=content.bytes_under(folder))
