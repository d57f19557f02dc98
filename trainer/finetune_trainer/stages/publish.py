"""The last stage: ships the artifacts to every destination. Called by pipeline.py, with report.json already written.

One destination's failure does not keep the others waiting; what failed is retried by running the job again, which resumes here. A pod may have nothing
that outlasts it, so in a cluster a network or a service that is away for minutes is waited for.
"""

from collections.abc import Iterable
from time import sleep
from typing import Any

from finetune_api.status import PublishedArtifact

from finetune_trainer import destinations
from finetune_trainer.context import RunContext
from finetune_trainer.errors import FineTuneError, InfrastructureError, NotPublishedError
from finetune_trainer.failures import classify
from finetune_trainer.sources import location
from finetune_trainer.sources.location import Location

PAUSES_SECONDS = (5, 15, 45, 120, 240)  # seven minutes of a GPU, where what would be lost took hours of one


def run(ctx: RunContext, report: dict[str, Any]) -> tuple[PublishedArtifact, ...]:
    """Publishes to each destination in the spec's order.

    Returns:
        One entry per artifact and destination.

    Raises:
        NotPublishedError: some destination failed, for whatever reason; the model is trained and kept.
    """
    places = location.destinations(ctx.job)
    published: dict[str, tuple[PublishedArtifact, ...]] = {}
    failures = _publish(ctx, report, places, published)
    for pause in PAUSES_SECONDS if ctx.job.in_cluster else ():
        waiting = [where for where in places if isinstance(failures.get(where.field), InfrastructureError)]
        if not waiting:
            break
        ctx.reporter.note(f"{failures[waiting[0].field]} Trying again in {pause} s.")
        sleep(pause)
        failures = {field: error for field, error in failures.items() if not isinstance(error, InfrastructureError)}
        failures |= _publish(ctx, report, waiting, published)
    if failures:
        told = " ".join(str(failures[where.field]) for where in places if where.field in failures)
        raise NotPublishedError(f"The model is trained and kept, but not published everywhere: {told}")
    return tuple(artifact for where in places for artifact in published[where.field])


def _publish(
    ctx: RunContext, report: dict[str, Any], places: Iterable[Location], published: dict[str, tuple[PublishedArtifact, ...]]
) -> dict[str, FineTuneError]:
    """Adds to `published` what each destination has now, by its field; returns the failures of the others."""
    failures: dict[str, FineTuneError] = {}
    for where in places:
        try:
            published[where.field] = tuple(destinations.publish(ctx, where, report))
            ctx.reporter.note(f"Published to {where.uri}.")
        except Exception as error:  # noqa: BLE001 whatever ails one destination, the next one is served
            failures[where.field] = classify(error)
    return failures
