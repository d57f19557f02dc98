"""FineTuneJobs as tests see them: examples shortened to what two cores train in a minute, applied with kubectl, awaited by their status.

Used by tests/cluster and tests/e2e. Nothing here reads what the operator or the trainer keep to themselves: only what a user sees.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from support.kubernetes import Cluster

EXAMPLES = Path(__file__).parents[2] / "examples"
FINAL = ("Succeeded", "Failed")
RUN_SECONDS = 420

Job = dict[str, Any]


def example(name: str) -> Job:
    """The one FineTuneJob in examples/NAME.yaml."""
    documents = [item for item in yaml.safe_load_all((EXAMPLES / f"{name}.yaml").read_text()) if item]
    (job,) = [item for item in documents if item["kind"] == "FineTuneJob"]
    return dict(job)


def merged(base: Job, changes: Job) -> Job:
    """`base` with `changes` on top: mappings are merged key by key, anything else is replaced."""
    result = deepcopy(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else deepcopy(value)
    return result


class JobInCluster:
    """One FineTuneJob of a namespace, and what belongs to it."""

    def __init__(self, kube: Cluster, namespace: str, manifest: Job) -> None:
        self.kube = kube
        self.namespace = namespace
        self.manifest = manifest
        self.name = str(manifest["metadata"]["name"])

    def apply(self) -> str:
        """What kubectl apply says, such as "finetunejob.finetune.dev/x created"."""
        return self.kube.kubectl("apply", "-n", self.namespace, "-f", "-", input=json.dumps(self.manifest)).stdout.strip()

    def edit(self, **changes: Any) -> None:
        """Applies changes to the spec."""
        self.manifest = merged(self.manifest, {"spec": changes})
        self.apply()

    def read(self) -> Job:
        """The object as it stands; empty when it is gone."""
        return self.kube.get("finetunejob", self.name, "-n", self.namespace)

    def status(self) -> Job:
        """Its status; empty before the operator saw it."""
        return dict(self.read().get("status", {}))

    def condition(self, kind: str) -> Job:
        """A condition of its status; empty when it does not stand there."""
        return next((item for item in self.status().get("conditions", ()) if item["type"] == kind), {})

    def events(self) -> list[Job]:
        """The events about it."""
        about = f"involvedObject.kind=FineTuneJob,involvedObject.name={self.name}"
        return list(self.kube.get("events", "-n", self.namespace, "--field-selector", about).get("items", []))

    def owned(self, kind: str) -> list[Job]:
        """The objects of this kind that carry this job's label."""
        listed = self.kube.get(kind, "-n", self.namespace, "-l", f"finetune.dev/job={self.name}")
        return list(listed.get("items", []))

    def job_uids(self) -> list[str]:
        """UIDs of the Jobs that carry its label."""
        return [item["metadata"]["uid"] for item in self.owned("jobs")]

    def running_pod(self) -> Job:
        """Its pod, once one runs that is not being stopped."""

        def running() -> list[Job]:
            return [
                pod for pod in self.owned("pods") if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
            ]

        return dict(self.kube.wait(f"a running pod of {self.name}", running)[0])

    def wait_until(self, what: str, condition: Callable[[Job], Any], seconds: float = RUN_SECONDS) -> Any:
        """Waits for the condition on the status; when it does not come, or the run ends otherwise, says all that is known."""

        def reached() -> Any:
            status = self.status()
            if result := condition(status):
                return result
            assert status.get("phase") not in FINAL, f"{self.name} ended instead of {what}:\n{self.story()}"
            return None

        try:
            return self.kube.wait(what, reached, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def wait_for_phase(self, phase: str, seconds: float = RUN_SECONDS) -> Job:
        """The status once the phase is reached."""

        def condition(status: Job) -> Job | None:
            return status if status.get("phase") == phase else None

        return dict(self.wait_until(f"phase {phase}", condition, seconds))

    def wait_for_reason(self, reason: str, seconds: float = 60) -> Job:
        """The status once its conditions give this reason, also where the run has ended with it."""

        def reached() -> Job | None:
            status = self.status()
            return status if reason in {item["reason"] for item in status.get("conditions", ())} else None

        try:
            return dict(self.kube.wait(f"the reason {reason}", reached, seconds))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def story(self) -> str:
        """Status, the state of node and namespace, and the end of the pods' logs."""
        parts = [json.dumps(self.status(), indent=1), self.kube.story(self.namespace)]
        for pod in self.owned("pods"):
            name = pod["metadata"]["name"]
            parts += [name, self.kube.kubectl("logs", "-n", self.namespace, name, "--tail=40", check=False).stdout]
        return "\n".join(parts)
