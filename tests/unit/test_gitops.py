"""charts/argocd/health.lua: what Argo CD shows of a FineTuneJob, by the statuses that the operator writes. Argo CD's own interpreter is of Lua 5.1 too."""

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_operator.decide import Situation, decide, report_a_refused_job
from finetune_operator.desired import build_job
from finetune_operator.plan import Plan, WriteStatus
from finetune_operator.subject import World, read_subject
from lupa.lua51 import LuaRuntime
from support.simulated_cluster import NOW, SETTINGS, build_ended_state, build_finetunejob, build_pod, build_stored_job, merged

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "charts" / "argocd" / "health.lua").read_text(encoding="utf-8")
STORED = ROOT / "tests" / "cluster" / "stored" / "v1alpha1-0.1.0"
NOT_IN_ARGO_CD = ("string", "math", "io", "debug", "coroutine")

Json = dict[str, Any]


def health_of(raw: Json) -> tuple[str, str]:
    """(status, message), as Argo CD takes them from the script."""
    lua = LuaRuntime()
    for library in NOT_IN_ARGO_CD:
        lua.globals()[library] = None
    lua.globals().obj = lua.table_from(raw, recursive=True)
    health = lua.execute(SCRIPT)
    return health.status, health.message


def after(raw: Json, plan: Plan) -> Json:
    """The object once the plan is executed."""
    status: Json = raw.get("status") or {}
    for action in plan.actions:
        if isinstance(action, WriteStatus):
            status = merged(status, action.patch)
    return raw | {"status": status}


def observed(changes: Json | None = None, condition: Json | None = None, **pod: Any) -> Json:
    """A FineTuneJob with the status that the operator writes for its Job, and for a pod where one is described."""
    raw = build_finetunejob(changes)
    subject = read_subject(raw)
    job = build_stored_job(build_job(subject, SETTINGS), condition=condition)
    return after(raw, decide(World(subject, (job,), pods=(build_pod(job, **pod),) if pod else ()), NOW, SETTINGS))


def refused(*, needs_edit: bool) -> Json:
    raw = build_finetunejob()
    return after(raw, report_a_refused_job(Situation(World(read_subject(raw)), NOW, SETTINGS), "exceeded quota", needs_edit=needs_edit))


def stored(name: str) -> Json:
    """One that a real API server had; its generation was not recorded."""
    raw: Json = json.loads((STORED / f"{name}.json").read_text())["finetunejob"]
    return merged(raw, {"metadata": {"generation": raw["status"]["observedGeneration"]}})


RUNNING = {"running": {"startedAt": "2026-01-01T11:59:00Z"}}
COMPLETE, FAILED = {"type": "Complete"}, {"type": "Failed", "reason": "PodFailurePolicy"}
CASES = {
    "new": (build_finetunejob(), "Progressing"),
    "its Job is made": (observed(), "Progressing"),
    "at work": (observed(phase="Running", state=RUNNING), "Progressing"),
    "a retry": (observed(phase="Failed", state=build_ended_state(16)), "Progressing"),
    "published": (observed(condition=COMPLETE, phase="Succeeded", state=build_ended_state(0)), "Healthy"),
    "failed": (observed(condition=FAILED, phase="Failed", state=build_ended_state(11)), "Degraded"),
    "suspended": (observed({"runPolicy": {"suspend": True}}), "Suspended"),
    "a full quota": (refused(needs_edit=False), "Progressing"),
    "a Job that only an edit can mend": (refused(needs_edit=True), "Degraded"),
    "edited after its end": (
        merged(observed(condition=COMPLETE, phase="Succeeded", state=build_ended_state(0)), {"metadata": {"generation": 2}}),
        "Progressing",
    ),
    **{
        f"a real one, {name}": (stored(name), health)
        for name, health in (("running", "Progressing"), ("succeeded", "Healthy"), ("failed", "Degraded"))
    },
}


@pytest.mark.parametrize(("raw", "expected"), CASES.values(), ids=CASES.keys())
def test_argo_cd_shows_what_the_status_says(raw: Json, expected: str) -> None:
    status, message = health_of(raw)
    assert status == expected
    is_seen = raw.get("status", {}).get("observedGeneration") == raw["metadata"]["generation"]
    assert message == (raw["status"]["message"] if is_seen else "Waiting for the operator to see it.")
