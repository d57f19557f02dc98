"""Reads one pod: how it ended, or why it is not running yet, as a reason and a sentence that says what to do. Pure; used by observed.py.

What the container wrote is not trusted: it is parsed strictly, cleaned and shortened. The exit code comes from the kubelet and wins over it.
"""

import re
from dataclasses import dataclass

from finetune_api import names
from finetune_api.exits import OOM_KILLED, REASONS, ExitCode
from finetune_api.redaction import without_secrets
from finetune_api.spec import FineTuneJobSpec
from finetune_api.states import Reason
from finetune_api.termination import TerminationMessage, parse

from finetune_operator.redaction import clean
from finetune_operator.subject import Json, condition_of, is_being_deleted, is_ended

LOG_TAIL_BYTES = 2048  # the kubelet takes no more of a log into a termination message
NEVER = "1970-01-01T00:00:00Z"  # what a kubelet writes for a container that could not be started
_FIRST_WORD = re.compile(r"\A\S+")
_FILLED, _NODE_IS_FULL = "EmptyDir", "low on resource: ephemeral-storage"
_UNSTARTED = {"ContainerCreating", "PodInitializing"}
_IMAGE = {"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError", "RegistryUnavailable"}

DELETED = (  # for status.message
    "The pod was deleted, and the trainer was killed (exit code 137), most likely because it did not end within its grace period; "
    "set runPolicy.rerun to go on from the last checkpoint."
)


@dataclass(frozen=True)
class Ending:
    """How a pod ended.

    Attributes:
        reason: one of states.py or exits.py, as in conditions and attempts.
        sentence: for status.message.
        exit_code: None when the container never ran.
        said: the trainer's last words, where they are a termination message.
    """

    reason: str
    sentence: str
    exit_code: int | None
    said: TerminationMessage | None


def container_status(pod: Json) -> Json:
    """The kubelet's view of the trainer's container; empty before there is one."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return next((dict(item) for item in statuses if item.get("name") == names.CONTAINER), {})


def container_state(pod: Json, state: str) -> Json | None:
    """The `running`, `waiting` or `terminated` state of the trainer's container, when it is in it."""
    found = (container_status(pod).get("state") or {}).get(state)
    return dict(found) if found is not None else None


def is_starting(pod: Json) -> bool:
    """Whether its container has not run yet."""
    return container_state(pod, "running") is None and (container_state(pod, "terminated") or {}).get("startedAt") in (None, NEVER)


def is_node_lost(pod: Json) -> bool:
    """Whether the pod's node stopped answering: the node controller takes Ready away, where a kubelet would take ContainersReady away first."""
    return bool(_condition(pod, "Ready", "False") and condition_of(pod, "ContainersReady")) and not is_ended(pod)


def node_lost_sentence(pod: Json) -> str:
    """The message about a pod whose node is lost."""
    node = pod["spec"].get("nodeName", "")
    return clean(
        f"Node {node} of the running pod does not answer; the run goes on when the node is back. If it is gone for good, "
        f"delete the Node object {node}: another pod resumes from the last checkpoint."
    )


def ended_sentence(pod: Json) -> tuple[str, str]:
    """(reason, sentence) of a pod that has not ended although its trainer has."""
    ended = f"The trainer has ended (exit code {(container_state(pod, 'terminated') or {}).get('exitCode')})"
    others = _others_at_work(pod)
    if not others:
        return Reason.RUNNING, f"{ended}; waiting for its pod to say so."
    return Reason.STOPPING, clean(
        f"{ended}, but its pod has not, because {', '.join(others)} still runs in it: keep such sidecars out of these pods (the chart's "
        "trainer.podLabels or trainer.podAnnotations), or make them native sidecars, which end with the trainer."
    )


def _others_at_work(pod: Json) -> list[str]:
    """Containers beside the trainer's that have not ended. Native sidecars are none of them: the kubelet ends those."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return [
        str(item.get("name")) for item in statuses if item.get("name") != names.CONTAINER and "terminated" not in (item.get("state") or {})
    ]


def ending_of(pod: Json, spec: FineTuneJobSpec) -> Ending:
    """How an ended pod ended."""
    terminated = container_state(pod, "terminated") or {}
    text = str(terminated.get("message") or "")
    said = parse(text)
    exit_code = terminated.get("exitCode")
    code = int(exit_code) if exit_code is not None else None
    status = pod.get("status") or {}
    disruption = condition_of(pod, "DisruptionTarget")
    if code == ExitCode.SUCCEEDED and status.get("phase") == "Succeeded":
        return Ending(REASONS[ExitCode.SUCCEEDED], "", code, said)
    if status.get("reason") == "Evicted":
        return Ending(Reason.EVICTED, _evicted(str(status.get("message") or "")), code, said)
    if disruption:
        return Ending(
            Reason.DISRUPTED, f"The pod was disrupted ({_disruption(disruption)}); the run continues from its last checkpoint.", code, said
        )
    if code == OOM_KILLED and terminated.get("reason") != "OOMKilled" and is_being_deleted(pod):
        return Ending(Reason.POD_DELETED, DELETED, code, said)
    if terminated.get("reason") == "OOMKilled" or code == OOM_KILLED:
        return Ending(Reason.OOM_KILLED, _out_of_memory(terminated, said, spec), code, said)
    return Ending(_reason(code), _sentence(code, said, text, status), code, said)


def waiting_sentence(pod: Json, warnings: tuple[str, ...]) -> tuple[str, str]:
    """(reason, sentence) of a pod that has not started."""
    waiting = container_state(pod, "waiting") or {}
    reason, detail = str(waiting.get("reason") or ""), clean(str(waiting.get("message") or ""), 600)
    if reason in _IMAGE:
        image = next((item.get("image", "") for item in pod["spec"]["containers"] or () if item.get("name") == names.CONTAINER), "")
        return Reason.IMAGE_PULL_FAILED, clean(
            f"The image {image} can't be pulled ({reason}): {detail or 'no reason given'}; correct the image or spec.pod.imagePullSecrets."
        )
    if reason and reason not in _UNSTARTED:
        return Reason.POD_WAITING, clean(f"The pod can't start ({reason}): {detail or 'no reason given'}.")
    unscheduled = _condition(pod, "PodScheduled", "False")
    if unscheduled:
        said = clean(str(unscheduled.get("message") or "no node is named yet"), 700).rstrip(".")
        return Reason.UNSCHEDULABLE, clean(f"No node can take the pod: {said}; lower spec.resources, correct spec.scheduling, or wait.")
    if warnings:
        return Reason.CONTAINER_CREATING, clean(f"The pod can't start yet: {clean(warnings[0], 800)}")
    return Reason.CONTAINER_CREATING, "The pod is starting."


def _condition(pod: Json, kind: str, status: str) -> Json | None:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return next((item for item in conditions if item.get("type") == kind and item.get("status") == status), None)


def has_filled_its_disk(pod: Json) -> bool:
    """Whether an ended pod was evicted for what it wrote itself; the words are the kubelet's."""
    return _FILLED in _eviction(pod)


def has_seen_a_full_disk(pod: Json) -> bool:
    """Whether an ended pod was evicted because its node's disk was full, and the kubelet, whose words they are, names the trainer among those that fill it."""
    said = _eviction(pod)
    return _NODE_IS_FULL in said and f"Container {names.CONTAINER} was using" in said


def _eviction(pod: Json) -> str:
    status = pod.get("status") or {}
    return str(status.get("message") or "") if status.get("reason") == "Evicted" else ""


def _evicted(message: str) -> str:
    mend = "ask for more space or memory, or another node"
    if _FILLED in message:
        mend = "raise storage.workspace.size"
    elif _NODE_IS_FULL in message:
        mend = (
            "put workspace and cache on claims (storage.workspace, storage.cache), or choose nodes with more disk (scheduling.nodeSelector)"
        )
    return clean(f"The pod was evicted: {clean(message, 600).rstrip('.') or 'no reason given'}; {mend}.")


def _disruption(condition: Json) -> str:
    return clean(str(condition.get("reason") or "DisruptionTarget"), 100)


def _out_of_memory(terminated: Json, said: TerminationMessage | None, spec: FineTuneJobSpec) -> str:
    killed = "ran out of memory" if terminated.get("reason") == "OOMKilled" else "was killed (exit code 137), most likely for its memory,"
    where = f" in stage {said.stage.value}" if said else ""
    return f"The trainer {killed}{where}: its limit is {spec.resources.memory}; raise resources.memory, or lower training.maxLength or training.batchSize."


def _reason(code: int | None) -> str:
    return REASONS[ExitCode(code)] if code in set(ExitCode) else Reason.ERROR


def _sentence(code: int | None, said: TerminationMessage | None, text: str, status: Json) -> str:
    if said and clean(said.message):
        return clean(said.message)
    if code is None:
        return clean(
            f"The pod failed before the trainer ran: {clean(str(status.get('message') or status.get('reason') or 'no reason given'), 600)}"
        )
    if said:
        return f"The trainer ended with exit code {code} in stage {said.stage.value} and did not say why; see the pod's log."
    words = clean(" ".join(_whole_words(text).strip().splitlines()[-3:]), 600)
    return (
        f"The trainer ended with exit code {code}; its last words: {words}"
        if words
        else f"The trainer ended with exit code {code} and did not say why; see the pod's log."
    )


def _whole_words(text: str) -> str:
    """The last log lines without secrets, before they are cut further. Where the kubelet cut the text, its first word may be half a secret and is left out."""
    is_cut = len(text.encode(errors="replace")) >= LOG_TAIL_BYTES
    return without_secrets(_FIRST_WORD.sub("", text, count=1) if is_cut else text)
