"""One operator a test module, with every FineTuneJob's status held against the rules at each of its transitions."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import OperatorProcess, get_ready, small_job
from support.watching import FINETUNEJOBS, StatusRules, Watch

Make = Callable[..., JobInCluster]


@pytest.fixture(scope="module")
def operator(kube: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[OperatorProcess]:
    """The CRD and a running operator, with the module's OPERATOR_SETTINGS."""
    folder = tmp_path_factory.mktemp("operator")
    get_ready(kube, folder)
    process = OperatorProcess(kube, folder / "log", **getattr(request.module, "OPERATOR_SETTINGS", {}))
    process.start()
    yield process
    process.kill()
    process.require_no_traceback()


@pytest.fixture(scope="module")
def status_rules() -> StatusRules:
    """The rules; a test that writes a status itself exempts its object."""
    return StatusRules()


@pytest.fixture(scope="module")
def finetunejobs(kube: Cluster, operator: OperatorProcess, status_rules: StatusRules) -> Iterator[Watch]:
    """Every FineTuneJob as it changes; at the end of the module no status may have broken a rule."""
    watch = Watch(kube, FINETUNEJOBS)
    yield watch
    watch.stop()
    assert [item for item in watch.seen if item.object.get("status")]
    assert status_rules.broken(watch.seen) == []


@pytest.fixture
def make(kube: Cluster, namespace: str, operator: OperatorProcess, finetunejobs: Watch) -> Make:
    """Applies a job of this name, with changes to its spec."""

    def apply(name: str, **changes: Any) -> JobInCluster:
        made = small_job(kube, namespace, name, **changes)
        made.apply()
        return made

    return apply
