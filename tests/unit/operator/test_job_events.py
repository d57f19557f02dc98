"""job_events.py: at most four events a run, each once, each of a state that is stored."""

from finetune_operator.decide import decide
from finetune_operator.desired import build_job
from finetune_operator.job_events import JobEvent, build_event
from finetune_operator.plan import EmitEvent, WriteStatus
from finetune_operator.subject import Json, World, read_subject
from support.simulated_cluster import NOW, SETTINGS, SimulatedCluster, build_ended_state, build_finetunejob, build_pod, build_stored_job

COMPLETE: Json = {"type": "Complete", "reason": "CompletionsReached"}
SAID = '{"version": 1, "stage": "Publishing", "artifacts": [{"kind": "adapter", "uri": "s3://models/tiny/lora_model"}]}'


def whole_run(code: int, message: str = "") -> SimulatedCluster:
    cluster = SimulatedCluster()
    cluster.apply({"runPolicy": {"backoffLimit": 0}})
    cluster.reconcile()
    (job,) = cluster.jobs.values()
    cluster.start_pod(job)
    (pod,) = cluster.pods
    cluster.run_pod(pod)
    cluster.reconcile()
    cluster.end_pod(pod, code)
    cluster.pods[pod]["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = message
    cluster.reconcile()
    cluster.reconcile()
    return cluster


def told(cluster: SimulatedCluster) -> list[tuple[str, str]]:
    return [(event["reason"], event["type"]) for event in cluster.events.values()]


def test_a_run_that_succeeds_has_four_events() -> None:
    cluster = whole_run(0, SAID)
    assert told(cluster) == [("Created", "Normal"), ("Started", "Normal"), ("Succeeded", "Normal"), ("Published", "Normal")]
    assert "adapter at s3://models/tiny/lora_model" in list(cluster.events.values())[-1]["message"]


def test_a_run_that_fails_warns_with_the_sentence_of_the_status() -> None:
    cluster = whole_run(11)
    assert told(cluster) == [("Created", "Normal"), ("Started", "Normal"), ("Failed", "Warning")]
    assert cluster.finetunejob is not None
    assert list(cluster.events.values())[-1]["message"] == cluster.finetunejob["status"]["message"]


def test_an_event_stands_behind_the_status_that_it_speaks_of() -> None:
    raw = build_finetunejob()
    job = build_stored_job(build_job(read_subject(raw), SETTINGS), condition=COMPLETE)
    pod = build_pod(job, phase="Succeeded", state=build_ended_state(0, SAID))
    kinds = [type(action) for action in decide(World(read_subject(raw), (job,), pods=(pod,)), NOW, SETTINGS).actions]
    assert kinds == [WriteStatus, EmitEvent, EmitEvent, EmitEvent]


def test_an_event_that_can_not_be_made_delays_nothing() -> None:
    cluster = SimulatedCluster()
    cluster.apply({})
    operator = cluster.start_operator()
    while not operator.ended:
        if cluster.jobs:
            break
        cluster.step(operator)
    cluster.events = {event["metadata"]["name"]: event for event in [build_event(read_subject(cluster.finetunejob or {}), created(), NOW)]}
    while not operator.ended:
        cluster.step(operator)
    assert len(cluster.events) == 1


def created() -> JobEvent:
    return JobEvent("Created", "")


def test_the_longest_name_makes_a_valid_event() -> None:
    for name in ("a" * 253, "a" * 235 + ".b" * 9):
        event = build_event(read_subject(build_finetunejob(name=name)), created(), NOW)["metadata"]["name"]
        assert len(event) in (252, 253)
        assert ".." not in event
