"""The line: preflight -> load -> data -> train -> evaluate -> convert -> verify -> publish, read from top to bottom.

cli.py calls `run`. A run that is started again in the same working directory goes on where it stopped: training at its last checkpoint,
publishing at once when report.json of the same training stands.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.job import JobDescription
from finetune_api.spec import Artifact, Scheme
from finetune_api.status import Stage

from finetune_trainer import atomic
from finetune_trainer.context import RunContext
from finetune_trainer.errors import QualityError
from finetune_trainer.failures import classify
from finetune_trainer.reporting.quiet import quiet_bars
from finetune_trainer.reporting.reporter import RunReporter
from finetune_trainer.reporting.server import Endpoint, serving
from finetune_trainer.stages import preflight


def run(job: JobDescription, workdir: Path, cache: Path) -> dict[str, Any]:
    """Runs a job to its end.

    Returns:
        The report.

    Raises:
        FineTuneError: how it ended instead; the termination message says the same.
    """
    with _reporting(job) as reporter:
        ctx = RunContext(job, workdir, cache, reporter)
        reporter.enter(Stage.PREFLIGHT)
        preflight.run(ctx)
        report = finished_report(ctx)
        if report is None:
            report = _make(ctx, reporter)
        _tell(reporter, report)
        require_quality(ctx, report)
        _publish(ctx, reporter, report)
        return report


def _make(ctx: RunContext, reporter: RunReporter) -> dict[str, Any]:
    """Trains, converts and proves; ends with report.json, which is what says that all of it is done."""
    reporter.enter(Stage.LOADING)
    # Here, not above: what preflight refuses needs no torch.
    from finetune_trainer.reporting.report import build_report
    from finetune_trainer.stages import convert, data, evaluate, load, train, verify

    quiet_bars()
    ctx.report.unlink(missing_ok=True)
    loaded = load.run(ctx)
    rows = data.run(ctx, loaded.tokenizer)
    reporter.know(model=loaded.resolved, dataset=rows.resolved)
    reporter.enter(Stage.TRAINING)
    trained = train.run(ctx, loaded, rows)
    with atomic.folder(ctx.adapter) as folder:
        trained.model.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
    quantized = ctx.spec.quantization.scheme is not Scheme.NONE
    reporter.enter(Stage.EVALUATING)
    losses = evaluate.run(ctx, trained.model, rows, trained.switch, quantized=quantized)
    converted = proof = None
    if Artifact.QUANTIZED in ctx.spec.wanted_artifacts:
        reporter.enter(Stage.CONVERTING)
        converted = convert.run(ctx, trained)
        reporter.enter(Stage.VERIFYING)
        proof = verify.run(ctx)
    report = build_report(ctx.job, loaded.resolved, rows, trained, losses, converted, proof, reporter.seconds())
    atomic.write_text(ctx.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def finished_report(ctx: RunContext) -> dict[str, Any] | None:
    """The report of an earlier attempt at the same training that made all that this job ships; None when there is none."""
    try:
        report = dict(json.loads(ctx.report.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    wanted = {artifact.value for artifact in ctx.spec.wanted_artifacts}
    if report.get("trainDigest") != ctx.job.train_digest or not wanted <= set(report.get("artifacts", [])):
        return None
    ctx.reporter.note("This training is done and verified already; going on with publishing.")
    return report


def require_quality(ctx: RunContext, report: dict[str, Any]) -> None:
    """The gate: a quantized model that lost too much is not published.

    Raises:
        QualityError: and onFailure is Fail.
    """
    limit, losses = ctx.spec.quality.max_loss_increase_percent, report["losses"]
    tuned, shipped = losses.get("tuned"), losses.get("quantized")
    if limit is None or tuned is None or shipped is None:
        return
    increase = (shipped - tuned) / tuned * 100
    if increase <= float(limit):
        return
    sentence = (
        f"The quantized model's held-out loss is {increase:.1f} % above the tuned one's ({shipped:.4g} against {tuned:.4g}), "
        f"but quality.maxLossIncreasePercent allows {limit} %; raise quantization.qatPercent or training.epochs, choose a finer scheme, or allow more."
    )
    if ctx.spec.quality.on_failure == "Fail":
        raise QualityError(f"{sentence} Nothing was published.")
    ctx.reporter.note(sentence)


def _publish(ctx: RunContext, reporter: RunReporter, report: dict[str, Any]) -> None:
    from finetune_trainer.mirror import Mirror
    from finetune_trainer.stages import publish

    reporter.enter(Stage.PUBLISHING)
    reporter.know(artifacts=publish.run(ctx, report))
    mirror = Mirror.of(ctx)
    if mirror is not None:
        mirror.remove()


def _tell(reporter: RunReporter, report: dict[str, Any]) -> None:
    from finetune_trainer.reporting.report import qat, quality

    known = {"quality": quality(report["losses"], report["proof"]), "qat": qat(report), **report["sources"]}
    reporter.know(**{name: value for name, value in known.items() if value is not None})


@contextmanager
def _reporting(job: JobDescription) -> Iterator[RunReporter]:
    """A reporter for the block; in a pod with endpoint and termination message. However the block ends, the message says so."""
    reporter = RunReporter(job.train_digest)
    with ExitStack() as stack:
        if job.in_cluster:
            endpoint = Endpoint()
            reporter.on_change = endpoint.update
            reporter.write_termination = Path(names.TERMINATION_LOG).write_text
            # Every interface of the pod's own network namespace: the operator asks from another pod.
            stack.enter_context(serving(endpoint, "0.0.0.0", names.PROGRESS_PORT))  # noqa: S104
        try:
            yield reporter
        except Exception as error:
            failure = classify(error)
            reporter.end(failure)
            raise failure from error
        reporter.end(None)
