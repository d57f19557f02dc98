"""Bad input on the cluster: the run ends before a GPU is asked for, and the status says in one sentence what is wrong and what to do."""

from typing import Any

import pytest
from support.world import World

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MISSING_SECRET = {"model": {"credentials": {"secretName": "no-such-secret"}}}
MISSING_BUCKET = {"model": {"source": "s3://no-such-bucket/smollm2"}}
MISSING_KEY = {"dataset": {"source": "s3://{bucket}/no-such-rows.jsonl"}}
BROKEN_ROW = {"dataset": {"source": "s3://{bucket}/broken-row.jsonl"}}
# Canaries: test_whole_line.py looks for what these Secrets and the broken row hold.
WRONG_KEYS = {"model": {"credentials": {"secretName": "wrong-s3-keys"}}}
WRONG_TOKEN = {"outputs": {"destinations": [{"uri": "hf://acme/wrong-token", "credentials": {"secretName": "wrong-hub-token"}}]}}


@pytest.mark.parametrize(
    ("name", "spec", "reason", "named"),
    [
        ("missing-secret", MISSING_SECRET, "AccessDenied", "no-such-secret"),
        ("missing-bucket", MISSING_BUCKET, "AccessDenied", "no-such-bucket"),
        ("missing-rows", MISSING_KEY, "InvalidData", "no-such-rows.jsonl"),
        ("broken-row", BROKEN_ROW, "InvalidData", "broken-row.jsonl, line 2"),
        ("wrong-keys", WRONG_KEYS, "AccessDenied", "AWS_SESSION_TOKEN"),
        ("wrong-token", WRONG_TOKEN, "AccessDenied", "HF_TOKEN"),
    ],
)
def test_bad_input_ends_in_a_sentence_that_names_it(world: World, name: str, spec: dict[str, Any], reason: str, named: str) -> None:
    if "dataset" in spec:
        spec = {"dataset": {"source": spec["dataset"]["source"].format(bucket=world.bucket)}}
    job = world.job("experiment", {"metadata": {"name": name}, "spec": {**spec, "resources": {"gpus": 1}}})
    job.apply()
    status = job.wait_for_phase("Failed", 90)
    (ready,) = [item for item in status["conditions"] if item["type"] == "Ready"]
    assert ready["reason"] == reason
    assert named in status["message"]
    assert "Traceback" not in status["message"]
    requested = [item["spec"]["containers"][0]["resources"]["limits"] for item in job.owned("pods")]
    assert requested
    assert not [limits for limits in requested if "nvidia.com/gpu" in limits]
    assert [item["metadata"]["name"] for item in job.owned("jobs")] == [f"{status['run']['jobName']}-pre"]
