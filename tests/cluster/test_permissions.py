"""Both installs of the chart: the operator works with the permissions of its table, uses every one of them, and asks for nothing else.

The operator is this checkout's, with the chart's service account, roles and settings; what it asked for is read from the API server's audit log.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from finetune_operator.permissions import JOBS, LEASE, Permission
from support.audit import Use, uses_of
from support.chart import RELEASE, InstalledChart, install, uninstall
from support.finetunejobs import JobInCluster, merged
from support.kubernetes import Cluster
from support.operator_process import SMALL, get_ready
from support.specs import job, minimal_spec

pytestmark = pytest.mark.cluster

CLUSTER_WIDE, LISTED = "cluster-wide", "listed namespaces"
ALLOWED = {"allowedImages": ["registry.example.com/acme/*"], "allowedServiceAccounts": ["trainer-*"]}
NOWHERE = {"scheduling": {"nodeSelector": {"zone": "nowhere"}}}


@dataclass(frozen=True)
class Site:
    """An installed chart and the namespaces around it.

    Attributes:
        chart: the release.
        served: namespaces whose jobs the operator runs.
        elsewhere: a namespace that is not on the list, where there is one.
        has_list: whether there is one; else the operator serves the whole cluster.
    """

    chart: InstalledChart
    served: tuple[str, str]
    elsewhere: str
    has_list: bool

    def apply(self, namespace: str, name: str, **changes: Any) -> JobInCluster:
        """A FineTuneJob of the stand-in, which ends as its name says."""
        made = JobInCluster(self.chart.kube, namespace, job(merged(minimal_spec() | SMALL, changes), name))
        made.apply()
        return made


@pytest.fixture(scope="module", params=[CLUSTER_WIDE, LISTED])
def site(
    request: pytest.FixtureRequest, kube: Cluster, make_namespace: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """One of the two installs, with a running operator."""
    folder = tmp_path_factory.mktemp("chart")
    get_ready(kube, folder)
    system, first, second, elsewhere = [make_namespace(stem) for stem in ("finetune-system", "ml", "research", "elsewhere")]
    has_list = request.param == LISTED
    chart = install(kube, system, folder, ALLOWED | {"namespaces": [first, second] if has_list else []})
    chart.operator.start()
    yield Site(chart, (first, second), elsewhere, has_list)
    chart.operator.kill()
    uninstall(kube)
    for namespace in (first, second, elsewhere):  # what runs on would leave the tests after this one no room
        kube.kubectl("delete", "namespace", namespace, "--wait=false")
    chart.operator.require_no_traceback()


def uses(*permissions: Permission) -> set[Use]:
    return {(item.group, item.resource, item.verb) for item in permissions}


@pytest.fixture(scope="module")
def driven(site: Site) -> Site:
    """The site after its operator had every reason to use what it may: runs that end, are edited, replaced, and can't start."""
    first, second = site.served
    finished = site.apply(first, "exit-0", runPolicy={"ttlSecondsAfterFinished": 3600})
    replaced = site.apply(second, "wait-replaced")
    stuck = site.apply(second, "wait-nowhere", **NOWHERE)
    finished.wait_for_phase("Succeeded", 60)
    replaced.wait_for_phase("Running", 60)
    (before,) = replaced.owned("jobs")
    replaced.manifest = merged(replaced.manifest, {"spec": {"lora": {"rank": 8}}})
    replaced.apply()
    replaced.wait_until("another run", lambda status: status.get("run", {}).get("jobName") != before["metadata"]["name"], 60)
    replaced.wait_for_phase("Running", 60)
    stuck.wait_until("the scheduler's word", lambda status: "node" in status.get("message", ""), 60)
    site.chart.kube.kubectl("create", "quota", "none", "--hard=pods=0", "-n", first)
    site.apply(first, "wait-quota").wait_until("the quota", lambda status: "quota" in status.get("message", ""), 60)
    site.chart.kube.kubectl("delete", "quota", "none", "-n", first)
    return site


def test_the_operator_uses_every_permission_of_the_table_and_no_other(driven: Site) -> None:
    chart, wanted = driven.chart, uses(*JOBS, *LEASE)
    with suppress(AssertionError):  # the sets below say more
        chart.kube.wait("the events of what is stuck", lambda: wanted <= uses_of(chart.requests()), 20)
    assert uses_of(chart.requests()) == wanted


def test_no_request_is_refused(driven: Site) -> None:
    requests = driven.chart.requests()
    assert len(requests) > 30
    assert [request for request in requests if not request.allowed] == []
    # A cluster-wide operator also meets namespaces of other tests that are being deleted, where admission refuses Jobs.
    assert [request for request in requests if request.namespace in driven.served and request.code in (401, 403)] == []


def test_the_lease_is_touched_in_the_operators_namespace_alone_and_jobs_in_watched_ones(driven: Site) -> None:
    about = {(request.group == LEASE[0].group, request.namespace) for request in driven.chart.requests() if request.resource}
    leases, jobs = {namespace for lease, namespace in about if lease}, {namespace for lease, namespace in about if not lease}
    assert leases == {driven.chart.system}
    assert set(driven.served) <= jobs
    if driven.has_list:
        assert jobs == set(driven.served)  # nothing without a namespace either: no request is about the whole cluster


def rules_in(site: Site, namespace: str) -> set[Use]:
    """What RBAC lets the operator do in a namespace, beyond asking about itself."""
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}}
    options = ("--validate=false", "-o", "json", f"--as={site.chart.user}")
    answer = site.chart.kube.kubectl("create", "-f", "-", *options, input=json.dumps(review))
    status = json.loads(answer.stdout)["status"]
    assert not status["incomplete"]
    rules = [rule for rule in status["resourceRules"] if not {"authorization.k8s.io", "authentication.k8s.io"} & set(rule["apiGroups"])]
    return {
        (group, resource, verb) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
    }


def test_the_api_server_grants_the_table_and_nothing_else(site: Site) -> None:
    everywhere = () if site.has_list else JOBS
    assert rules_in(site, site.chart.system) == uses(*LEASE, *everywhere)
    assert [rules_in(site, namespace) for namespace in site.served] == [uses(*JOBS)] * 2
    assert rules_in(site, "kube-system") == uses(*everywhere)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods"),
        ("get", "pods/log"),
        ("update", "finetunejobs"),
        ("patch", "finetunejobs"),
    ],
)
def test_the_api_server_refuses_the_operator(site: Site, verb: str, resource: str) -> None:
    asked = site.chart.kube.kubectl("auth", "can-i", verb, resource, "-n", site.served[0], f"--as={site.chart.user}", check=False)
    assert asked.stdout.strip() == "no"


def test_a_lease_of_another_program_is_out_of_reach(site: Site) -> None:
    def allowed(verb: str, name: str) -> str:
        asked = ("auth", "can-i", verb, f"leases.coordination.k8s.io/{name}", "-n", site.chart.system, f"--as={site.chart.user}")
        return site.chart.kube.kubectl(*asked, check=False).stdout.strip()

    assert [allowed(verb, "kube-scheduler") for verb in ("get", "update", "patch", "delete")] == ["no"] * 4
    assert [allowed(verb, RELEASE) for verb in ("get", "update")] == ["yes"] * 2


def test_jobs_elsewhere_are_run_only_by_an_operator_of_the_whole_cluster(site: Site) -> None:
    elsewhere = site.apply(site.elsewhere, "exit-0")
    for namespace in site.served:
        site.apply(namespace, "exit-0-after").wait_for_phase("Succeeded", 60)
    if not site.has_list:
        elsewhere.wait_for_phase("Succeeded", 60)
        return
    assert elsewhere.status() == {}
    assert not elsewhere.owned("jobs")
    assert site.elsewhere not in {request.namespace for request in site.chart.requests()}


@pytest.mark.parametrize(
    ("name", "pod", "allowed"),
    [
        ("image", {"image": "evil.example.com/x"}, False),
        ("image-near", {"image": "registry.example.com.evil.example.com/acme/x"}, False),
        ("account", {"serviceAccountName": "ft"}, False),
        ("both", {"image": "registry.example.com/acme/trainer:2", "serviceAccountName": "default"}, False),
        ("listed", {"image": "registry.example.com/acme/trainer:2", "serviceAccountName": "trainer-a"}, True),
    ],
)
def test_an_image_or_a_service_account_runs_only_when_it_is_on_the_list(site: Site, name: str, pod: dict[str, str], allowed: bool) -> None:
    made = site.apply(site.served[0], f"wait-{name}", pod=pod, runPolicy={"suspend": True})
    if allowed:
        made.wait_for_phase("Suspended", 60)
        (child,) = made.owned("jobs")
        template = child["spec"]["template"]["spec"]
        assert (template["containers"][0]["image"], template["serviceAccountName"]) == (pod["image"], pod["serviceAccountName"])
        assert template["automountServiceAccountToken"] is False
        return
    status = made.wait_until("the refusal", lambda status: status if status.get("message") else None, 60)
    (stalled,) = [item for item in status["conditions"] if item["type"] == "Stalled"]
    assert stalled["reason"] == "NotAllowed"
    assert any(value in status["message"] for value in pod.values())
    assert not made.owned("jobs")
