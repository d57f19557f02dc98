"""The `finetune` command: run, preflight, estimate, validate. Prints sentences, never a traceback; the exit code says which class of failure it was.

`validate` and what stages/preflight.py refuses must not load torch.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from finetune_api import names
from finetune_api.exits import REASONS, ExitCode
from finetune_api.job import JobDescription
from finetune_api.validation import Problem, parse_job, verdicts
from pydantic import ValidationError
from typer.exceptions import TyperException

from finetune_trainer import VERSION
from finetune_trainer.context import RunContext, user_cache
from finetune_trainer.errors import FineTuneError, SpecError
from finetune_trainer.failures import classify
from finetune_trainer.reporting.quiet import quiet_libraries
from finetune_trainer.termination_signal import Terminated, stopping_at_once
from finetune_trainer.threads import wait_briefly

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune, quantize, verify and publish a model from one YAML.",
)


Job = Annotated[
    str | None, typer.Argument(help="A FineTuneJob in YAML, or - for standard input. Default: the FINETUNE_JOB variable of a pod.")
]
Workdir = Annotated[Path | None, typer.Option(help="Where outputs/, lora_model/, model-torchao/ and report.json go. Default: work-<name>.")]
Cache = Annotated[Path | None, typer.Option(help="Where downloads are kept. Default: the user's cache folder.")]


@app.command()
def run(job: Job = None, workdir: Workdir = None, cache: Cache = None) -> None:
    """Run a job on this machine: load, train, convert, verify, publish."""
    description = _description(job)
    workdir, cache = _folders(description, workdir, cache)
    from finetune_trainer import pipeline
    from finetune_trainer.memory.shrink import OutOfMemory, start_anew
    from finetune_trainer.results.summary import print_summary

    try:
        with _debug_log(workdir):
            report = pipeline.run(description, workdir, cache)
    except OutOfMemory:
        start_anew(description, workdir, cache)
    print_summary(report, workdir, _destinations(description))


@app.command()
def preflight(job: Job = None, workdir: Workdir = None, cache: Cache = None) -> None:
    """Check a job against its model, data and destinations, without a GPU: what is refused here, a run would refuse. Publishes nothing."""
    description = _description(job)
    workdir, cache = _folders(description, workdir, cache)
    from finetune_trainer import pipeline
    from finetune_trainer.results.summary import print_preflight

    with _debug_log(workdir):
        found = pipeline.preflight(description, workdir, cache)
    print_preflight(found, _destinations(description))


@app.command()
def estimate(
    job: Job = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Only this GPU, such as nvidia-l4. Default: this machine and all known GPUs.")
    ] = None,
    cache: Cache = None,
) -> None:
    """Say how much memory a training needs, from the model's configuration alone, and which micro-batch fits where. Reads no data and no weights."""
    description = _description(job)
    _, cache = _folders(description, None, cache)
    from finetune_trainer.memory.report import tell
    from finetune_trainer.reporting.quiet import quiet_bars
    from finetune_trainer.reporting.reporter import RunReporter
    from finetune_trainer.results.summary import print_estimate

    quiet_bars()
    print_estimate(tell(RunContext(description, Path(), cache, RunReporter(description.train_digest)), gpu))


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(help="YAML files with FineTuneJobs; - is standard input.")],
    local: Annotated[
        bool, typer.Option("--local", help="For a run on this machine: allows file://, refuses pvc:// and configmap://.")
    ] = False,
) -> None:
    """Say everything that is wrong with FineTuneJobs, offline, with path and mend."""
    found = 0
    for name in files:
        problems = verdicts(_read(name), local=local)
        found += len(problems)
        for problem in problems:
            typer.echo(f"{name}: {problem}", err=True)
        if not problems:
            typer.echo(f"{name}: valid")
    if found:
        raise typer.Exit(ExitCode.SPEC)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Fine-tune, quantize, verify and publish a model from one YAML."""
    if version:
        typer.echo(VERSION)
        raise typer.Exit


def main() -> None:
    """The console script. Exit codes: finetune_api.exits; wrong usage counts as a wrong spec."""
    quiet_libraries()
    wait_briefly()
    try:
        with stopping_at_once():  # the first process of a pod is sent no signal that it does not handle
            sys.exit(app(standalone_mode=False) or 0)  # a typer.Exit comes back as the value of the call
    except Terminated:
        sys.exit(ExitCode.CHECKPOINTED)
    except TyperException as error:
        if str(error):
            typer.echo(f"{REASONS[ExitCode.SPEC]}: {str(error).rstrip('.')}. See finetune --help.", err=True)
        sys.exit(ExitCode.SPEC)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 the last line of defence: a sentence, never a traceback
        if os.environ.get("FINETUNE_DEBUG"):
            traceback.print_exc()
        failure = classify(error)
        typer.echo(f"{failure.reason}: {failure}", err=True)
        sys.exit(failure.exit_code)


def _description(job: str | None) -> JobDescription:
    if job is None:
        text = os.environ.get(names.ENV_JOB)
        if text is None:
            raise SpecError("No job: name a YAML file (finetune run job.yaml).")
        try:
            return JobDescription.from_json(text)
        except ValidationError as error:
            raise SpecError(
                f"{names.ENV_JOB} holds no job description of this version ({error.error_count()} problems); use the image that belongs to the operator."
            ) from error
    text = _read(job)
    problems = verdicts(text, local=True)
    if problems:
        raise SpecError(_listed(job, problems))
    parsed = parse_job(text)
    return JobDescription.of(parsed.metadata, parsed.spec, in_cluster=False)


def _folders(description: JobDescription, workdir: Path | None, cache: Path | None) -> tuple[Path, Path]:
    in_pod = description.in_cluster
    return (
        workdir or Path(names.WORKDIR if in_pod else f"work-{description.name}"),
        cache or (Path(names.CACHE_DIR) if in_pod else user_cache()),
    )


def _destinations(description: JobDescription) -> list[str]:
    return [item.uri for item in description.spec.outputs.destinations]


def _read(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"{name} can't be read ({reason}); name a FineTuneJob in YAML.") from error


def _listed(name: str, problems: list[Problem]) -> str:
    first = f"{name}: {problems[0]}"
    return first if len(problems) == 1 else "\n".join([first, *(f"{name}: {problem}" for problem in problems[1:])])


@contextmanager
def _debug_log(workdir: Path) -> Iterator[None]:
    """The traceback of a failure, for people who mend the trainer; best effort, since the disk may be what failed."""
    try:
        yield
    except FineTuneError:
        _write_debug_log(workdir)
        raise


def _write_debug_log(workdir: Path) -> None:
    try:
        (workdir / "debug.log").write_text(traceback.format_exc())
    except OSError:
        return


if __name__ == "__main__":
    main()
