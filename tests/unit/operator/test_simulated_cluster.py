"""The operator's own reconcile against a cluster in memory: in every order of edits, faults and ends it keeps to one Job and one end."""

from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest
from finetune_api.digests import run_digest
from finetune_api.exits import PERMANENT, ExitCode
from finetune_api.validation import parse_spec
from finetune_operator.cache import Kind
from finetune_operator.cluster import ApiError
from finetune_operator.diagnosis import container_state
from finetune_operator.subject import Json, Key, is_being_deleted, is_finished
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.simulated_cluster import Operator, SimulatedCluster, broken_status_rules

FINAL = ("Succeeded", "Failed")
EDITS = st.one_of(
    st.fixed_dictionaries({"runPolicy": st.fixed_dictionaries({"suspend": st.booleans()})}),
    st.fixed_dictionaries({"runPolicy": st.fixed_dictionaries({"rerun": st.sampled_from(["", "1", "2"])})}),
    st.fixed_dictionaries({"runPolicy": st.fixed_dictionaries({"ttlSecondsAfterFinished": st.sampled_from([None, 0, 60])})}),
    st.fixed_dictionaries({"runPolicy": st.fixed_dictionaries({"backoffLimit": st.sampled_from([0, 1, 3])})}),
    st.fixed_dictionaries({"runPolicy": st.fixed_dictionaries({"activeDeadlineSeconds": st.sampled_from([None, 3600])})}),
    st.fixed_dictionaries({"runPolicy": st.fixed_dictionaries({"preflight": st.sampled_from(["Auto", "Skip"])})}),
    st.fixed_dictionaries({"training": st.fixed_dictionaries({"seed": st.sampled_from([42, 43])})}),
    st.fixed_dictionaries({"pod": st.fixed_dictionaries({"image": st.sampled_from(["", "registry.example.com/forbidden:1"])})}),
)
CODES = st.sampled_from([0, *(code for code in ExitCode if code), 1, 137])


class OperatorAndCluster(RuleBasedStateMachine):
    """Users, Kubernetes, an operator that hears of things late, twice or never and may die before every request, and a second one that sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = SimulatedCluster()
        self.process = self.cluster.start_process()
        self.operator: Operator | None = None
        self.sleeper: Operator | None = None
        self.statuses: list[tuple[str, Json]] = []

    @initialize(edit=EDITS)
    def begin(self, edit: Json) -> None:
        self.cluster.apply(edit)

    @property
    def is_writing(self) -> bool:
        """Between two writes of one plan nothing can fence another operator off: they are a moment apart, and the next pass mends it."""
        return self.operator is not None and self.operator.began_writing

    # Hypothesis switches whole rules off to reach odd corners; a few wide ones keep every chain of events within reach.

    @rule(data=st.data(), what=st.sampled_from(["edit"] * 6 + ["delete a Job", "delete the FineTuneJob"]))
    def a_user_acts(self, data: st.DataObject, what: str) -> None:
        if what == "edit" or self.cluster.finetunejob is None:
            self.cluster.apply(data.draw(EDITS))
        elif what == "delete the FineTuneJob":
            self.cluster.delete_finetunejob()
        elif self.cluster.jobs:
            self.cluster.delete_job_by_hand(data.draw(st.sampled_from(sorted(self.cluster.jobs))))

    @rule(code=CODES, heard=st.sampled_from([(*Kind,), (Kind.JOB,), (Kind.POD,), (Kind.JOB, Kind.FINETUNEJOB), ()]))
    def all_goes_well_for_a_while(self, code: int, heard: tuple[Kind, ...]) -> None:
        """Straight to the end of a run, where the rarer things can begin; what the operator hears of the end is up to the watches."""
        for _ in range(0 if self.operator else 3):
            self.cluster.settle()
            self.cluster.reconcile(self.process)
        self.a_pod_lives_and_dies(code)
        for kind in heard:
            self.cluster.tell(self.process, kind, 99)
        if not self.operator:
            self.operator = self.cluster.start_operator(self.process)
            self.the_operator_works(99, kill=False, loses=False)

    def a_pod_lives_and_dies(self, code: int) -> None:
        self.cluster.settle()
        for job in self.cluster.startable_jobs():
            self.cluster.start_pod(job)
        for name, pod in self.cluster.pods.items():
            if pod["status"]["phase"] in ("Pending", "Running"):
                self.cluster.run_pod(name)
                self.cluster.end_pod(name, code)

    @rule(data=st.data(), code=CODES, disrupted=st.booleans())
    def kubernetes_works(self, data: st.DataObject, code: int, disrupted: bool) -> None:
        """One thing of those that its controllers would do next; twice as often the next thing in a pod's life."""
        cluster, pods = self.cluster, self.cluster.pods.items()
        todo = [cluster.settle]
        todo += [partial(cluster.start_pod, job) for job in cluster.startable_jobs()] * 2
        todo += [partial(cluster.run_pod, name) for name, pod in pods if pod["status"]["phase"] == "Pending"] * 2
        ending = partial(cluster.end_pod, code=code, disrupted=disrupted and code != 0)
        todo += [partial(ending, name) for name, pod in pods if pod["status"]["phase"] == "Running"] * 2
        todo += [partial(cluster.collect_ended, name) for name, job in cluster.jobs.items() if is_finished(job)]
        data.draw(st.sampled_from(todo))()

    @rule(requests=st.sampled_from([9, 1, 2, 3, 4]), kill=st.sampled_from([False, False, False, True]), loses=st.booleans())
    def the_operator_works(self, requests: int, kill: bool, loses: bool) -> None:
        """A few requests of a pass, with pauses between them in which anything may happen; it may be killed at any, or hear no answer."""
        self.cluster.loses_answer = loses
        self.operator = self.operator or self.cluster.start_operator(self.process)
        for _ in range(requests):
            if not self.operator.ended:
                self.cluster.step(self.operator)
        if kill:
            self.operator.kill()
            self.process = self.cluster.start_process()
        if self.operator.ended:
            self.operator = None
        self.cluster.loses_answer = False

    @rule(
        kind=st.sampled_from(Kind),
        events=st.sampled_from([99, 1, 2]),
        again=st.sampled_from([0, 0, 1, 3]),
        lost=st.sampled_from([0, 0, 0, 1]),
    )
    def a_watch_goes_on(self, kind: Kind, events: int, again: int, lost: int) -> None:
        """Each watch at its own pace; some events come twice, and some never."""
        self.process.heard[kind] += lost
        self.cluster.tell(self.process, kind, events, again=again)

    @rule(seconds=st.sampled_from([1, 3, 60]))
    def everything_is_listed_again_after_a_while(self, seconds: int) -> None:
        self.cluster.now += timedelta(seconds=seconds)
        self.cluster.resync(self.process)

    @precondition(lambda self: not self.is_writing)
    @rule()
    def another_operator_reads_and_falls_asleep_or_wakes_up_and_writes(self) -> None:
        sleeper = self.sleeper or self.cluster.start_operator()
        while not sleeper.ended and (self.sleeper or not sleeper.writes_next):
            self.cluster.step(sleeper)
        self.sleeper = None if sleeper.ended else sleeper

    # What must always hold.

    @invariant()
    def never_two_unfinished_training_jobs(self) -> None:
        owners = [
            job["metadata"]["ownerReferences"][0]["uid"]
            for job in self.cluster.jobs.values()
            if not is_finished(job) and not is_being_deleted(job)
        ]
        assert len(owners) == len(set(owners))

    @invariant()
    def never_two_jobs_for_one_run(self) -> None:
        runs = [
            (
                job["metadata"]["ownerReferences"][0]["uid"],
                *(job["metadata"]["labels"][label] for label in ("finetune.dev/run", "app.kubernetes.io/component")),
            )
            for job in self.cluster.jobs.values()
        ]
        assert len(runs) == len(set(runs))

    @invariant()
    def every_status_keeps_the_rules(self) -> None:
        raw = self.cluster.finetunejob
        if raw and raw.get("status"):
            assert broken_status_rules(raw["status"], raw["metadata"]["generation"]) == []

    @invariant()
    def an_end_is_never_taken_back(self) -> None:
        raw = self.cluster.finetunejob
        if raw and raw.get("status"):
            self.statuses.append((raw["metadata"]["uid"], raw["status"]))
        for (uid, before), (same, after) in pairwise(self.statuses[-2:]):
            if uid == same and before["phase"] in FINAL and before["run"]["runDigest"] == after["run"]["runDigest"]:
                assert (after["phase"], after["completionTime"]) == (before["phase"], before["completionTime"])

    @invariant()
    def a_run_whose_end_is_stored_never_gets_another_job(self) -> None:
        for name, status in self.cluster.created:
            assert not (status.get("phase") in FINAL and status["run"]["jobName"] == name)

    def teardown(self) -> None:
        """All faults end, all pods end: the status must say what happened."""
        for operator in (self.operator, self.sleeper):
            if operator is not None:
                operator.kill()
        self.cluster.resync(self.process)
        for _ in range(12):
            self.cluster.now += timedelta(seconds=3)
            self.a_pod_lives_and_dies(0)
            wrote = self.cluster.reconcile(self.process)
            self.never_two_unfinished_training_jobs()
            if not wrote and not self.cluster.startable_jobs():
                break
        else:
            pytest.fail("The operator does not come to rest.")
        if self.cluster.finetunejob is not None:
            self._status_tells_the_truth(self.cluster.finetunejob)

    def _status_tells_the_truth(self, raw: Json) -> None:
        status = raw["status"]
        stalled = any(item["type"] == "Stalled" for item in status["conditions"])
        assert status["observedGeneration"] == raw["metadata"]["generation"]
        assert status["run"]["runDigest"] == run_digest(parse_spec(raw["spec"]))
        assert status["phase"] in (*FINAL, "Suspended") or stalled
        job = self.cluster.jobs.get(status["run"]["jobName"])
        if job is not None and is_finished(job):
            self._the_end_has_its_pods_words(status, job)
            (condition,) = job["status"]["conditions"]
            assert status["phase"] == ("Succeeded" if condition["type"] == "Complete" else "Failed")
            ends = [
                attempt
                for attempt in status["attempts"]
                if attempt["podUID"] in {pod["metadata"]["uid"] for pod in self.cluster.pods_of(job)}
            ]
            if condition["reason"] == "PodFailurePolicy":
                assert ends[-1]["exitCode"] in (*PERMANENT, 137)
        if status["phase"] == "Suspended":
            assert raw["spec"]["runPolicy"]["suspend"]
            assert not self.cluster.pods or all(pod["status"]["phase"] in FINAL for pod in self.cluster.pods.values())

    def _the_end_has_its_pods_words(self, status: Json, job: Json) -> None:
        """An end that is stored is latched: what the last pod said must be in it."""
        known = {attempt["podUID"]: attempt.get("exitCode") for attempt in status["attempts"]}
        for pod in self.cluster.pods_of(job)[-5:]:
            assert known[pod["metadata"]["uid"]] == container_state(pod, "terminated")["exitCode"]


def test_no_order_of_events_breaks_the_operators_promises() -> None:
    steps = settings(max_examples=150, stateful_step_count=50, derandomize=True, database=None)
    run_state_machine_as_test(OperatorAndCluster, settings=steps)


def finished(code: int) -> SimulatedCluster:
    cluster = SimulatedCluster()
    cluster.apply({"runPolicy": {"backoffLimit": 0, "ttlSecondsAfterFinished": 0}})
    cluster.reconcile()
    (job,) = cluster.jobs.values()
    cluster.start_pod(job)
    (pod,) = cluster.pods
    cluster.run_pod(pod)
    cluster.end_pod(pod, code)
    return cluster


@pytest.mark.parametrize("code", [*ExitCode, 1, 137])
def test_without_faults_a_run_ends_as_its_pod_did_and_its_job_goes_after_its_ttl(code: int) -> None:
    cluster = finished(code)
    if code == ExitCode.CHECKPOINTED:
        return
    cluster.reconcile()
    (name,) = cluster.jobs
    cluster.collect_ended(name)
    assert cluster.jobs == {}
    assert cluster.finetunejob is not None
    assert cluster.finetunejob["status"]["phase"] == ("Failed" if code else "Succeeded")
    assert not cluster.reconcile()


def test_an_operator_that_was_down_longer_than_the_ttl_still_learns_how_the_run_ended() -> None:
    cluster = finished(0)
    (name,) = cluster.jobs
    cluster.collect_ended(name)
    assert name in cluster.jobs, "it has no TTL before its end is stored"
    cluster.reconcile()
    assert cluster.finetunejob is not None
    assert cluster.finetunejob["status"]["phase"] == "Succeeded"


def test_the_echo_of_an_end_that_is_heard_before_its_answer_asks_for_nothing() -> None:
    cluster = finished(0)
    process = cluster.start_process()
    operator = cluster.start_operator(process)
    cluster.step(operator)
    assert cluster.finetunejob is not None
    assert cluster.finetunejob["status"]["phase"] == "Succeeded"
    process.waits = True  # the echo
    while not operator.ended:
        cluster.step(operator)
    assert cluster.start_operator(process).ended, "the second pass makes no request"
    assert process.cache.finetunejob(Key("ml", "tiny")) is None, "and keeps nothing"


def test_a_sleeping_operator_makes_no_job_for_a_spec_that_was_edited_meanwhile() -> None:
    cluster = SimulatedCluster()
    cluster.apply({})
    sleeper = cluster.start_operator()
    while not sleeper.writes_next:
        cluster.step(sleeper)
    cluster.apply({"training": {"seed": 7}})
    cluster.reconcile()
    while not sleeper.ended:
        cluster.step(sleeper)
    assert len(cluster.jobs) == 1


def test_a_sleeping_operator_deletes_no_job_that_another_one_has_made_meanwhile() -> None:
    cluster = SimulatedCluster()
    cluster.apply({})
    sleeper = cluster.start_operator()
    cluster.apply({"training": {"seed": 7}})
    cluster.reconcile()
    (made,) = cluster.jobs
    while not sleeper.ended:
        cluster.step(sleeper)
    assert not is_being_deleted(cluster.jobs[made])


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (ApiError(403, "Forbidden", 'jobs.batch "x" is forbidden: exceeded quota: none'), "exceeded quota"),
        (ApiError(500, "InternalError", 'failed calling webhook "policy.example.com": connection refused'), "failed calling webhook"),
    ],
)
def test_a_refused_job_is_said_once_and_made_when_it_is_let(refusal: ApiError, words: str) -> None:
    cluster = SimulatedCluster()
    cluster.refusal = refusal
    cluster.apply({})
    cluster.reconcile()
    assert cluster.finetunejob is not None
    assert words in cluster.finetunejob["status"]["message"]
    assert not cluster.reconcile(), "the second refusal is no news"
    cluster.refusal = None
    cluster.reconcile()
    cluster.reconcile()
    assert words not in cluster.finetunejob["status"]["message"]
    assert len(cluster.jobs) == 1


def running() -> SimulatedCluster:
    """A run whose pod is at work, and is said to be."""
    cluster = SimulatedCluster()
    cluster.apply({})
    cluster.reconcile()
    (job,) = cluster.jobs.values()
    cluster.start_pod(job)
    (name,) = cluster.pods
    cluster.run_pod(name)
    cluster.reconcile()
    return cluster


POLICY = ApiError(422, "Invalid", "ValidatingAdmissionPolicy 'cap' denied request: no deadline above an hour")
WEBHOOK = ApiError(500, "InternalError", 'failed calling webhook "policy.example.com": connection refused')


@pytest.mark.parametrize(
    ("refusal", "words", "standing"), [(POLICY, "no deadline above an hour", "Stalled"), (WEBHOOK, "failed calling webhook", "Reconciling")]
)
def test_a_refused_change_of_a_job_at_work_is_said_once_and_made_when_it_is_let(refusal: ApiError, words: str, standing: str) -> None:
    cluster = running()
    assert cluster.finetunejob is not None
    cluster.change_refusal = refusal
    cluster.apply({"runPolicy": {"activeDeadlineSeconds": 7200}})
    cluster.reconcile()
    status = cluster.finetunejob["status"]
    assert (status["phase"], status["observedGeneration"]) == ("Running", 2)
    assert words in status["message"]
    assert standing in {item["type"] for item in status["conditions"] if item["reason"] == "ChangeRefused"}
    assert not cluster.reconcile(), "the second refusal is no news"
    cluster.change_refusal = None
    cluster.reconcile()
    cluster.reconcile()
    assert words not in cluster.finetunejob["status"]["message"]
    assert next(iter(cluster.jobs.values()))["spec"]["activeDeadlineSeconds"] == 7200


def test_a_refused_change_hides_no_end() -> None:
    cluster = running()
    assert cluster.finetunejob is not None
    cluster.change_refusal = POLICY
    cluster.apply({"runPolicy": {"activeDeadlineSeconds": 7200, "ttlSecondsAfterFinished": 60}})
    cluster.reconcile()
    (name,) = cluster.pods
    cluster.end_pod(name, 11)
    cluster.reconcile()
    ended = cluster.finetunejob["status"]
    assert ended["phase"] == "Failed"
    cluster.reconcile()
    assert cluster.finetunejob["status"] == ended, "the refused TTL is no word about the run"


def test_a_ttl_that_is_edited_after_the_end_reaches_the_job() -> None:
    cluster = finished(0)
    process = cluster.start_process()
    cluster.reconcile(process)
    cluster.apply({"runPolicy": {"ttlSecondsAfterFinished": 3600}})
    cluster.reconcile(process)
    (job,) = cluster.jobs.values()
    assert job["spec"]["ttlSecondsAfterFinished"] == 3600


def test_a_spec_of_another_schema_is_told_so_by_a_pass_that_comes_to_its_end() -> None:
    cluster = SimulatedCluster()
    cluster.apply({"training": {"epochs": "three"}})
    process = cluster.start_process()
    assert cluster.reconcile(process)
    assert not cluster.reconcile(process)
    assert not process.reconciler.doubtful
    assert cluster.finetunejob is not None
    assert "training.epochs" in cluster.finetunejob["status"]["message"]
