"""Where the end-to-end jobs live: a namespace that the operator watches, and the S3 server and the Hub that their pods reach.

tests/e2e/conftest.py makes the one World of a session. Examples get its addresses and a size that two cores train in a minute.
"""

from dataclasses import dataclass
from typing import Any

from support.finetunejobs import JobInCluster, example, merged
from support.hub_server import HubServer
from support.kubernetes import Cluster
from support.s3_server import S3Server

# What two cores train in a minute. Everything else stays as the example has it.
SHORT: dict[str, Any] = {
    "training": {"epochs": 1, "batchSize": 8, "maxLength": 128, "checkpointEvery": 1},
    "resources": {"gpus": 0, "cpu": "1", "memory": "6Gi"},
    "storage": {"workspace": {"size": "5Gi"}},
    # Four steps can't recover what quantization costs, and the gate is right to say so; tests/trainer/pipeline/test_quality_gate.py has its refusals.
    "quality": {"onFailure": "Warn"},
}


@dataclass(frozen=True)
class World:
    """Everything that the tests act on.

    Attributes:
        namespace: of the jobs.
        system: the operator's.
    """

    kube: Cluster
    namespace: str
    system: str
    s3: S3Server
    hub: HubServer
    bucket: str

    def job(self, name: str, changes: dict[str, Any] | None = None) -> JobInCluster:
        """The example, shortened and pointed at this world's servers, with the test's own changes on top."""
        source = {"credentials": {"secretName": "s3-keys"}, "endpoint": self.s3.endpoint}
        spec = {
            "model": {"source": f"s3://{self.bucket}/smollm2", **source},
            "dataset": {"source": f"s3://{self.bucket}/rows.jsonl", **source, "evaluation": {"percent": 20}},
            **SHORT,
        }
        manifest = merged(example(name), {"spec": spec})
        manifest["spec"]["outputs"]["destinations"] = [
            self._destination(name, item) for item in manifest["spec"]["outputs"]["destinations"]
        ]
        return JobInCluster(self.kube, self.namespace, merged(manifest, changes or {}))

    def _destination(self, name: str, destination: dict[str, Any]) -> dict[str, Any]:
        if not destination["uri"].startswith("s3://"):
            return destination | {"credentials": {"secretName": "hub-token"}}
        return destination | {"uri": f"s3://{self.bucket}/{name}", "endpoint": self.s3.endpoint, "credentials": {"secretName": "s3-keys"}}
