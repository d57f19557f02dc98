"""The last stage: ships the artifacts to every destination. Called by pipeline.py, with report.json already written.

One destination's failure does not keep the others waiting; what failed is retried by running the job again, which resumes here.
"""

from typing import Any

from finetune_api.status import PublishedArtifact

from finetune_trainer import destinations
from finetune_trainer.context import RunContext
from finetune_trainer.errors import NotPublishedError
from finetune_trainer.failures import classify
from finetune_trainer.sources import location


def run(ctx: RunContext, report: dict[str, Any]) -> tuple[PublishedArtifact, ...]:
    """Publishes to each destination in the spec's order.

    Returns:
        One entry per artifact and destination.

    Raises:
        NotPublishedError: some destination failed, for whatever reason; the model is trained and kept.
    """
    published: list[PublishedArtifact] = []
    failures: list[str] = []
    for where in location.destinations(ctx.job):
        try:
            published += destinations.publish(ctx, where, report)
            ctx.reporter.note(f"Published to {where.uri}.")
        except Exception as error:  # noqa: BLE001 whatever ails one destination, the next one is served
            failures.append(str(classify(error)))
    if failures:
        raise NotPublishedError(f"The model is trained and kept, but not published everywhere: {' '.join(failures)}")
    return tuple(published)
