"""Wires a run's reporter: in a pod with HTTP endpoint and termination message, anywhere with the end of the run, however it comes.

Called by pipeline.py, once a run.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from finetune_api import names
from finetune_api.job import JobDescription

from finetune_trainer.errors import Checkpointed
from finetune_trainer.failures import classify
from finetune_trainer.reporting.reporter import RunReporter
from finetune_trainer.reporting.server import Endpoint, serving
from finetune_trainer.termination_signal import Terminated, stopping_at_once

ENV_TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"  # for trying it outside a pod
# Every interface of the pod's own network namespace: the operator asks from another pod. The second for a kernel without IPv6.
_EVERYWHERE = ("::", "0.0.0.0")  # noqa: S104


@contextmanager
def reporting(job: JobDescription, *, serve: bool = True) -> Iterator[RunReporter]:
    """A reporter for the block. Whatever ends the block leaves as a FineTuneError, after the termination message said so.

    Args:
        job: the run.
        serve: whether a pod answers /progress and /metrics; without steps there is nothing to ask for.

    Raises:
        FineTuneError: what went wrong in the block.
    """
    reporter = RunReporter(job.train_digest)
    path = os.environ.get(ENV_TERMINATION_LOG) or (names.TERMINATION_LOG if job.in_cluster else "")
    if path:
        reporter.write_termination = _writer(Path(path))
    with ExitStack() as stack:
        if job.in_cluster and serve:
            _serve(reporter, stack)
        try:
            stack.enter_context(stopping_at_once())
            yield reporter
        except Terminated as error:
            failure = Checkpointed(f"Stopped while {reporter.stage.value}; run again to go on with what is done.")
            reporter.end(failure)
            raise failure from error
        except Exception as error:
            failure = classify(error)
            reporter.end(failure)
            raise failure from error
        except KeyboardInterrupt:
            reporter.close()
            raise
        reporter.end(None)


def _serve(reporter: RunReporter, stack: ExitStack) -> None:
    endpoint = Endpoint()
    reporter.on_change = endpoint.update
    for address in _EVERYWHERE:
        try:
            stack.enter_context(serving(endpoint, address, names.PROGRESS_PORT))
        except OSError as error:
            problem = error.strerror
        else:
            return
    reporter.note(f"No /progress and /metrics: port {names.PROGRESS_PORT} can't be opened ({problem}).")


def _writer(path: Path) -> Callable[[str], None]:
    def write(text: str) -> None:
        try:
            path.write_text(text, encoding="utf-8")
        except OSError:
            return  # the exit code still tells the class of the end

    return write
