"""What GET /metrics says, and docs/metrics.md: `python -m finetune_operator.metrics` writes it. main.py makes one Metrics a process and hands it on.

Counts and nothing else: no decision looks at a metric.
"""

from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_api import names
from finetune_api.status import Phase
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from finetune_operator.cluster import UNANSWERED, ApiError
from finetune_operator.work_queue import WorkQueue

DOCS_FILE = Path(__file__).parents[2] / "docs" / "metrics.md"

NO_PHASE = "none"
PHASES = (NO_PHASE, *(phase.value for phase in Phase))
ERRORS = ("conflict", "api", "network", "defect")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_PREFIX = "finetune_operator_"
_DEPTH = _PREFIX + "queue_depth"
_OLDEST = _PREFIX + "queue_oldest_seconds"
_RECONCILE = _PREFIX + "reconcile_seconds"
_ERRORS = _PREFIX + "reconcile_errors"
_REQUESTS = _PREFIX + "api_requests"
_JOBS = _PREFIX + "finetunejobs"
_LISTED = _PREFIX + "last_list_timestamp_seconds"

LABELS: dict[str, dict[str, str]] = {
    _DEPTH: {"state": "`due`: a worker would take it now; `delayed`: it waits for its backoff or for its next look"},
    _ERRORS: {
        "kind": "`conflict`: the object had changed meanwhile (409), which is normal; `api`: the API server refused a request otherwise; "
        "`network`: no answer, or none in time; `defect`: the operator's own, please report it"
    },
    _REQUESTS: {"verb": "the HTTP method", "code": "the HTTP status; `none`: no answer came"},
    _JOBS: {"phase": "as in `status.phase`; `none`: no status is stored yet"},
}


class Metrics:
    """The metrics of one process.

    Attributes:
        registry: what is served.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._depth = Gauge(_DEPTH, "Keys on the work queue.", LABELS[_DEPTH], registry=self.registry)
        self._oldest = Gauge(
            _OLDEST, "Seconds for which the key that is longest due has waited; 0 when none is due.", registry=self.registry
        )
        self._reconcile = Histogram(_RECONCILE, "Seconds that one pass over one FineTuneJob took.", registry=self.registry, buckets=SECONDS)
        self._errors = Counter(_ERRORS, "Passes that failed; each is tried again.", LABELS[_ERRORS], registry=self.registry)
        self._requests = Counter(_REQUESTS, "Requests to the API server.", LABELS[_REQUESTS], registry=self.registry)
        self._jobs = Gauge(_JOBS, "FineTuneJobs, as the last complete list showed them.", LABELS[_JOBS], registry=self.registry)
        self._listed = Gauge(
            _LISTED, "When the FineTuneJobs were last listed completely, in Unix time; 0: not yet.", registry=self.registry
        )
        for kind in ERRORS:
            self._errors.labels(kind)

    def show_queue(self, queue: WorkQueue) -> None:
        """Shows the depth and age of this queue from now on."""
        self._depth.labels("due").set_function(lambda: len(queue.waiting_seconds()))
        self._depth.labels("delayed").set_function(lambda: len(queue) - len(queue.waiting_seconds()))
        self._oldest.set_function(lambda: max(queue.waiting_seconds(), default=0.0))

    def count_request(self, verb: str, code: str) -> None:
        """Counts a request to the API server that has ended."""
        self._requests.labels(verb, code).inc()

    @contextmanager
    def reconciling(self) -> Iterator[None]:
        """Times the pass in the block, and counts the error that ends it and raises it again."""
        with self._reconcile.time():
            try:
                yield
            except Exception as error:
                self._errors.labels(_kind(error)).inc()
                raise

    def show_jobs(self, phases: Tally[str]) -> None:
        """Shows the phases that a complete list has found. A phase that is not known counts as none."""
        known = {phase: phases[phase] for phase in PHASES}
        known[NO_PHASE] += phases.total() - sum(known.values())
        for phase, jobs in known.items():
            self._jobs.labels(phase).set(jobs)
        self._listed.set_to_current_time()


def _kind(error: Exception) -> str:
    if isinstance(error, ApiError):
        return "conflict" if error.status == 409 else "api"
    return "network" if isinstance(error, UNANSWERED) else "defect"


_HEAD = """<!-- Generated from operator/finetune_operator/metrics.py by `make crd`; do not edit. -->
# What /metrics says

The operator serves `/healthz`, `/readyz` and `/metrics` (Prometheus) on one port, 8080 in the chart, named `health`. With the Prometheus operator,
`--set podMonitor.enabled=true` makes a PodMonitor, and `podMonitor.labels` gives it the labels that your Prometheus selects by.

- `/healthz` fails when the operator no longer comes round to listing the FineTuneJobs; the liveness probe restarts it then.
- `/readyz` answers 200 from the first complete list on, whatever becomes of the API server, and while an operator waits for a Lease that it has seen another one
  hold. Before that it says what is missing: `helm install --wait` fails when the API server can't be reached.
- With several replicas only the one that has the Lease works; the others show `process_*` and zeros, and no FineTuneJobs.
- Not counted among the requests: the watches, which kopf makes, and the Lease's, which the Kubernetes client's election makes.
- The FineTuneJobs are counted when they are listed: every `resyncSeconds`, or less often where that would take more than a twentieth of the time.

| metric | type | labels | meaning |
|---|---|---|---|
"""


_TAIL = f"""
## What a trainer's pod serves

Each training pod has a `/metrics` of its own on port {names.PROGRESS_PORT} (named `progress`), as long as it runs: `finetune_step`, `finetune_total_steps`, `finetune_loss` (nats per token),
`finetune_tokens_per_second`, and `finetune_stage` with the label `stage`. The chart's PodMonitor selects the operator alone: to scrape trainers, select pods that have the label
`{names.LABEL_JOB}`, and let your Prometheus in where a [NetworkPolicy](security.md) stands.
"""


def metrics_markdown() -> str:
    """The content of docs/metrics.md."""
    return _HEAD + "".join(_rows()) + _TAIL


def _rows() -> Iterator[str]:
    families = list(Metrics().registry.collect())
    for family in sorted(families, key=lambda family: (family.name.startswith("process_"), family.name)):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = "; ".join(f"`{label}` ({values})" for label, values in LABELS.get(family.name, {}).items())
        yield f"| `{name}` | {family.type} | {labels} | {family.documentation} |\n"


if __name__ == "__main__":
    DOCS_FILE.write_text(metrics_markdown(), encoding="utf-8")
