"""Fake nodes whose pods kwok plays, for tests of the operator with many jobs: tests/cluster/kwok/stages.yaml says which name ends how.

    with running_cluster(folder, 1, node=False) as kube, running_kwok(kube, folder):
        ...

No fixtures here.
"""

import asyncio
import json
import re
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from finetune_api import names
from support.api_client import MERGE, ApiClient, RefusedError, connected
from support.kubernetes import BIN, Cluster

STAGES = Path(__file__).parents[1] / "cluster" / "kwok" / "stages.yaml"
NODE = STAGES.with_name("node.yaml")
ATTEMPT = "kwok.finetune.dev/attempt"
_COUNTED = re.compile(r"^(flaky-\d+|evicted)(-|$)")
_LOOK_SECONDS = 0.2


@contextmanager
def running_kwok(kube: Cluster, folder: Path, *, nodes: int = 1, run_seconds: float = 1.0, count_attempts: bool = True) -> Iterator[None]:
    """Fake nodes, ready for pods; they end with the block.

    Args:
        kube: best one without a real node, which would take some of the pods.
        folder: for the configuration and log/kwok.log.
        nodes: how many there are: fake0, fake1, ...
        run_seconds: how long a training runs that ends by itself.
        count_attempts: whether the jobs flaky-N-... and evicted-... are used; one list of pods every 0.2 s.
    """
    config, log = folder / "kwok.yaml", folder / "log" / "kwok.log"
    config.write_text(yaml.safe_dump_all(_stages(run_seconds)))
    log.parent.mkdir(exist_ok=True)
    kube.kubectl(
        "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": [_node(index) for index in range(nodes)]})
    )
    arguments = ["--kubeconfig", str(kube.kubeconfig), "--config", str(config), "--node-ip", kube.host]
    arguments += ["--manage-nodes-with-annotation-selector", "kwok.x-k8s.io/node=fake", "--node-lease-duration-seconds", "40"]
    with log.open("w") as out:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", str(BIN / "kwok"), *arguments], stdout=out, stderr=out)
    try:
        for index in range(nodes):
            kube.wait(f"fake node {index}; see {log}", lambda index=index: _is_ready(kube.get("node", f"fake{index}")))
        with _counting(kube) if count_attempts else nullcontext():
            yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _stages(run_seconds: float) -> list[dict[str, Any]]:
    stages = [item for item in yaml.safe_load_all(STAGES.read_text()) if item]
    (end,) = [item for item in stages if item["metadata"]["name"] == "end"]
    end["spec"]["delay"] = {"durationMilliseconds": int(run_seconds * 1000)}
    return stages


def _node(index: int) -> dict[str, Any]:
    node: dict[str, Any] = deepcopy(yaml.safe_load(NODE.read_text()))
    node["metadata"] |= {"name": f"fake{index}"}
    node["metadata"]["labels"] |= {"kubernetes.io/hostname": f"fake{index}"}
    return node


def _is_ready(node: dict[str, Any]) -> bool:
    conditions = node.get("status", {}).get("conditions", [])
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions) and not node["spec"].get("taints")


@contextmanager
def _counting(kube: Cluster) -> Iterator[None]:
    """Says of each pod of a flaky or evicted job which of its job's pods it is, in a thread that ends with the block."""
    stopped = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(_count_attempts(kube, stopped))
        except BaseException as error:  # noqa: BLE001 raised again below, where a test sees it
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=30)
    if failures:
        raise AssertionError("the pods of flaky and evicted jobs were not counted") from failures[0]


async def _count_attempts(kube: Cluster, stopped: threading.Event) -> None:
    seen: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    async with connected(kube.kubeconfig, "attempts") as api:
        while not stopped.is_set():
            pods = [pod async for pod in api.list(f"/api/v1/pods?labelSelector={names.LABEL_JOB}")]
            for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"])):
                await _number(api, pod, seen)
            await asyncio.sleep(_LOOK_SECONDS)


async def _number(api: ApiClient, pod: dict[str, Any], seen: defaultdict[tuple[str, str], list[str]]) -> None:
    metadata = pod["metadata"]
    label = metadata["labels"][names.LABEL_JOB]
    trains = pod["spec"]["containers"][0].get("args", [""])[0] == "run"
    if ATTEMPT in metadata.get("annotations", {}) or not trains or not _COUNTED.match(label):
        return
    earlier = seen[metadata["namespace"], label]
    if metadata["uid"] not in earlier:
        earlier.append(metadata["uid"])
    patch = {"metadata": {"annotations": {ATTEMPT: str(earlier.index(metadata["uid"]) + 1)}}}
    try:
        await api.request("PATCH", f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}", patch, MERGE)
    except RefusedError as error:
        if error.status != 404:
            raise
