"""The line: preflight -> load -> data -> train -> evaluate -> convert -> verify -> publish, read from top to bottom.

cli.py calls `run`, or `preflight` for what can be refused before a GPU is asked for. A run that is started again in the same working directory goes on where it stopped: training at its last checkpoint,
a later stage where its result is missing, publishing at once when report.json of the same training stands, here or at an s3 destination.
"""

import functools
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from finetune_api.job import JobDescription
from finetune_api.spec import Artifact, FineTuneJobSpec, Scheme
from finetune_api.status import Stage

from finetune_trainer import atomic, backends, finished, locks, quality_gate, sources
from finetune_trainer.context import RunContext
from finetune_trainer.errors import FineTuneError, InfrastructureError, ProofError
from finetune_trainer.reporting.quiet import quiet_bars
from finetune_trainer.reporting.reporter import TEXT_CHARACTERS, RunReporter
from finetune_trainer.reporting.session import reporting
from finetune_trainer.stages import preflight as cheap_checks
from finetune_trainer.termination_signal import nothing_left_to_stop

if TYPE_CHECKING:
    from finetune_trainer.stages.convert import Converted
    from finetune_trainer.stages.rehearse import Rehearsed
    from finetune_trainer.stages.train import Trained
    from finetune_trainer.stages.verify import Proof

_LOCK_SECONDS = 150  # a lost node's lock on NFS lives for 90


def run(job: JobDescription, workdir: Path, cache: Path) -> dict[str, Any]:
    """Runs a job to its end.

    Returns:
        The report.

    Raises:
        FineTuneError: how it ended instead; the termination message says the same.
    """
    with reporting(job) as reporter, ExitStack() as alone:
        ctx = RunContext(job, workdir, cache, reporter)
        reporter.enter(Stage.PREFLIGHT)
        cheap_checks.run(ctx)
        alone.enter_context(_alone(ctx))
        identities = functools.cache(lambda: _identities(ctx))  # of a model on a claim all weights are read for it
        report = _finished_report(ctx, identities) or _published_report(ctx, identities) or _make(ctx, reporter)
        _tell(reporter, report, job.spec)
        quality_gate.require_quality(ctx, report["losses"])
        _publish(ctx, reporter, report)
        remove_mirror(ctx)
        # Last: what a pod is killed for is never explained by a hint.
        reporter.know(message=textwrap.shorten(" ".join(report.get("hints", ())), TEXT_CHARACTERS, placeholder=" …"))
        return report


def preflight(job: JobDescription, workdir: Path, cache: Path) -> "Rehearsed":
    """Checks all that needs neither a GPU nor the weights; the termination message ends with what the user should know.

    Raises:
        FineTuneError: what a run of this job would be refused for.
    """
    with reporting(job, serve=False) as reporter:
        ctx = RunContext(job, workdir, cache, reporter)
        reporter.enter(Stage.PREFLIGHT)
        cheap_checks.run(ctx)
        # Here, not above: what the cheap checks refuse needs no torch.
        from finetune_trainer.stages import rehearse

        quiet_bars()
        found = rehearse.run(ctx)
        told = textwrap.shorten(" ".join(reporter.notes), TEXT_CHARACTERS, placeholder=" …")
        reporter.know(model=found.model, dataset=found.data.resolved, message=told)
        return found


@contextmanager
def _alone(ctx: RunContext) -> Iterator[None]:
    """Two runs in one working directory would remove each other's checkpoints. A file system that knows no locks is trusted.

    In a cluster the other one is a pod of the same Job that is going, or whose node has gone: it is waited for.

    Raises:
        InfrastructureError: another run is at work there.
    """
    try:
        lock = locks.take(ctx.workdir / ".lock", timeout_seconds=_LOCK_SECONDS if ctx.job.in_cluster else 0)
    except Timeout as error:
        raise InfrastructureError(f"Another run is at work in {ctx.workdir}; wait for its end, or choose another --workdir.") from error
    try:
        yield
    finally:
        lock.release()


def _make(ctx: RunContext, reporter: RunReporter) -> dict[str, Any]:
    """Trains, converts and proves; ends with report.json, which is what says that all of it is done."""
    reporter.enter(Stage.LOADING)
    # Here, not above: what preflight refuses needs no torch. The backend first: unsloth patches what the stages import.
    backend = backends.take(ctx)
    from finetune_trainer import machine
    from finetune_trainer.adapter import save_adapter
    from finetune_trainer.results.hints import hints
    from finetune_trainer.results.measured import measured
    from finetune_trainer.results.report import build_report
    from finetune_trainer.stages import data, evaluate, load, train

    quiet_bars()
    load.require_gpu(ctx)
    ctx.report.unlink(missing_ok=True)
    with reporter.timed("model"):
        fetched = sources.fetch_model(ctx)
    tokenizer = load.tokenizer_of(ctx, fetched.path)
    with reporter.timed("data"):
        rows = data.run(ctx, tokenizer)  # before the weights: mistakes in the data show in seconds
    loaded = load.run(ctx, fetched, tokenizer, backend)
    reporter.know(model=loaded.resolved, dataset=rows.resolved)

    reporter.enter(Stage.TRAINING)
    trained = train.run(ctx, loaded, rows)
    device = trained.model.device.type
    save_adapter(trained.model, trained.tokenizer, ctx.job, loaded.resolved, ctx.adapter)
    # With the machine: this one rounds the same weights in its own way, and a proof holds logits that must be its own.
    inputs = ctx.job.train_digest, loaded.identity, rows.digest, machine.description(loaded.model)
    artifacts = sorted(ctx.spec.wanted_artifacts)  # an adapter that is not shipped is not measured
    stages = finished.FinishedStages(
        ctx.workdir / finished.FOLDER, finished.digest_of(*inputs, *artifacts, ctx.adapter / "adapter_model.safetensors")
    )

    reporter.enter(Stage.EVALUATING)
    quantized = ctx.spec.quantization.scheme is not Scheme.NONE
    losses = stages.once(
        Stage.EVALUATING,
        evaluate.Losses,
        lambda: evaluate.run(ctx, trained.model, rows, trained.switch, quantized=quantized, keep_codes=trained.plan.keeps_codes),
    )
    converted, proof = _export(ctx, reporter, stages, trained, fetched.path)
    seconds = reporter.seconds()
    slow = hints(measured(ctx, seconds, reporter.part_seconds, rows, trained, device))
    for sentence in slow:
        reporter.note(sentence)
    report = build_report(ctx.job, loaded, rows, trained, losses, converted, proof, seconds, slow) | {"digests": _digests(ctx)}
    atomic.write_text(ctx.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _export(
    ctx: RunContext, reporter: RunReporter, stages: finished.FinishedStages, trained: "Trained", base_folder: Path
) -> tuple["Converted | None", "Proof | None"]:
    """Converts and proves the quantized model; neither where the job ships none."""
    from finetune_trainer.stages import convert, verify

    if Artifact.QUANTIZED not in ctx.spec.wanted_artifacts:
        return None, None
    made = ctx.quantized, ctx.proof
    reporter.enter(Stage.CONVERTING)
    converted = stages.once(Stage.CONVERTING, convert.Converted, lambda: convert.run(ctx, trained, base_folder), made=made)
    convert.make_room(trained.model)
    reporter.enter(Stage.VERIFYING)
    try:
        return converted, stages.once(Stage.VERIFYING, verify.Proof, lambda: verify.run(ctx), made=made)
    except ProofError:
        stages.undo_from(Stage.CONVERTING)  # the next run is not to prove the same files again
        raise


def _finished_report(ctx: RunContext, identities: Callable[[], dict[str, str]]) -> dict[str, Any] | None:
    """The report of an earlier attempt at the same training on the same model and data that made all that this job ships; None when there is none."""
    try:
        report = dict(json.loads(ctx.report.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if report.get("formatVersion") != finished.REPORT_FORMAT or report.get("trainDigest") != ctx.job.train_digest:
        return None
    if report.get("identities") != identities():
        return None
    known = report.get("digests", {})
    changed = sorted(name for name, digest in _digests(ctx).items() if known.get(name) != digest)
    if changed:
        ctx.reporter.note(f"What {ctx.report.name} speaks of is not all here ({', '.join(changed)}), so it is made again.")
        return None
    ctx.reporter.note("This training is done and verified already; going on with publishing.")
    return report


def _published_report(ctx: RunContext, identities: Callable[[], dict[str, str]]) -> dict[str, Any] | None:
    from finetune_trainer.destinations.restore import restore

    return _finished_report(ctx, identities) if restore(ctx, identities) else None


def _digests(ctx: RunContext) -> dict[str, str]:
    """A digest for each artifact that this job ships, the quantized model's with its proof: what was proved is what is published, or it is made again."""
    folders = {Artifact.ADAPTER: (ctx.adapter,), Artifact.QUANTIZED: (ctx.quantized, ctx.proof)}
    return {artifact.value: finished.tree_digest(folders[artifact]) for artifact in ctx.spec.wanted_artifacts}


def _identities(ctx: RunContext) -> dict[str, str]:
    """What the sources hold at present; no weights are downloaded for it."""
    held_out = sources.fetch_evaluation(ctx)
    return {
        "model": sources.fetch_model(ctx, weights=False).identify(),
        "dataset": sources.fetch_dataset(ctx).identify(),
        "heldOut": held_out.identify() if held_out else "",
    }


def _publish(ctx: RunContext, reporter: RunReporter, report: dict[str, Any]) -> None:
    from finetune_trainer.stages import publish

    reporter.enter(Stage.PUBLISHING)
    published = publish.run(ctx, report)
    nothing_left_to_stop()  # another pod would train it again: its checkpoints are removed next
    reporter.know(artifacts=published)


def remove_mirror(ctx: RunContext) -> None:
    """Checkpoints of what is published are of no more use; where they can't be removed, that is said."""
    from finetune_trainer.mirror import Mirror

    try:
        mirror = Mirror.of(ctx)
        if mirror is not None:
            mirror.remove()
    except FineTuneError as error:
        ctx.reporter.note(f"The mirrored checkpoints were not removed: {error}")


def _tell(reporter: RunReporter, report: dict[str, Any], spec: FineTuneJobSpec) -> None:
    from finetune_trainer.results.report import qat, quality

    resolved = {name: report["sources"][name] for name in ("model", "dataset")}
    shortfall = quality_gate.shortfall(spec, report["losses"])
    known = {"quality": quality(report["losses"], report["proof"], shortfall), "qat": qat(report), **resolved}
    reporter.know(**{name: value for name, value in known.items() if value is not None})
