"""The world of the end-to-end test: images just built, the chart installed, SmolLM2 and a dataset in a bucket, a Hub beside it."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from finetune_trainer.sources import builtin
from finetune_trainer.sources.python_docs import instruction_rows
from support.canaries import HUB_SECRET, ROW, S3_SECRET
from support.chart import CHART, RELEASE, set_json
from support.hub_server import HubServer, running_hub
from support.kubernetes import CACHE, Cluster
from support.s3_server import S3Server
from support.world import World

ROOT = Path(__file__).parents[2]
ROWS = 40


@pytest.fixture(scope="session")
def images(kube: Cluster) -> dict[str, str]:
    """References of both images, built from this checkout and given to the node."""
    built = subprocess.run([ROOT / "images" / "build.sh", "operator", "trainer"], check=True, stdout=subprocess.PIPE, text=True)
    references = {}
    for line in built.stdout.splitlines():
        layout, tag = line.split()
        name = Path(layout).name
        references[name] = kube.load_image(Path(layout), tag, f"localhost/finetune-{name}")
    return references


@pytest.fixture(scope="session")
def hub(kube: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A small Hub that pods of the cluster reach."""
    with running_hub(tmp_path_factory.mktemp("hub"), address=kube.host) as server:
        yield server


@pytest.fixture(scope="session")
def system(make_namespace: Callable[[str], str]) -> str:
    """The operator's own namespace."""
    return make_namespace("finetune-system")


def image_values(reference: str) -> dict[str, str]:
    """The chart's values of an image that the node has."""
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag, "pullPolicy": "Never"}


@pytest.fixture(scope="session")
def operator(kube: Cluster, images: dict[str, str], hub: HubServer, system: str, make_namespace: Callable[[str], str]) -> Iterator[str]:
    """The chart, installed as a user would, for one namespace of jobs; yields that namespace."""
    jobs = make_namespace("jobs")
    values = {
        "image": image_values(images["operator"]),
        "trainer": {"image": image_values(images["trainer"]), "env": {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}},
        "namespaces": [jobs],
    }
    # The CRD outlives an uninstalled release, and other tests apply it with kubectl: a new release takes it over.
    options = ["--wait", "--timeout", "120s", "--take-ownership"]
    installed = kube.helm("install", RELEASE, str(CHART), "-n", system, *options, *set_json(values), check=False)
    assert installed.returncode == 0, f"{installed.stderr}\n{kube.story(system)}"
    yield jobs
    kube.helm("uninstall", RELEASE, "-n", system, check=False)


@pytest.fixture(scope="session")
def world(kube: Cluster, operator: str, system: str, s3: S3Server, hub: HubServer) -> World:
    """Model, dataset and Secrets, where the jobs look for them."""
    bucket = s3.make_bucket("models")
    client = s3.client()
    for path in sorted(builtin.fetch_model(CACHE, print).iterdir()):
        client.upload_file(str(path), bucket, f"smollm2/{path.name}")
    first, *others = instruction_rows(topics, ROWS)
    rows = "".join(json.dumps(row) + "\n" for row in [first | {"output": f"{first['output']} {ROW}"}, *others])
    client.put_object(Bucket=bucket, Key="rows.jsonl", Body=rows.encode())
    client.put_object(Bucket=bucket, Key="broken-row.jsonl", Body=f'{{"prompt": "a", "completion": "b"}}\n{{"prompt": {ROW}\n'.encode())
    kube.make_secret(operator, "s3-keys", {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key})
    kube.make_secret(operator, "hub-token", {"HF_TOKEN": hub.token})
    kube.make_secret(operator, "wrong-s3-keys", S3_SECRET)
    kube.make_secret(operator, "wrong-hub-token", HUB_SECRET)
    return World(kube, operator, system, s3, hub, bucket)
