"""SIGKILL at random moments of whole runs: after all restarts they have published what an undisturbed run publishes, bit for bit.

On a laptop the working directory stays; a pod loses it with every kill and goes on from the mirror. `make soak-trainer` runs the same at full size: SOAK_KILLS is how
often, SOAK_SEED replays a seed. What is asserted knows no speed; only how many kills fall into a stage does.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from finetune_api.job import JobDescription
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.mirror import DEFAULT_FOLDER
from finetune_trainer.reporting.session import ENV_TERMINATION_LOG
from support.killed_runs import Command, Course, lines_of, run_killed, run_undisturbed
from support.run_contexts import read_files
from support.s3_server import S3Server
from support.tiny_jobs import tiny_job

KILLS = int(os.environ.get("SOAK_KILLS", "8")) // 2  # half on a laptop, half of pods
IN_A_ROW = 4
ROWS = [
    {"instruction": f"{a} + {b}?" + " please" * (4 * b), "output": f"{a} and {b} make {a + b}."}
    for a, b in ((index % 7, index % 5) for index in range(40))
]  # two micro-batches a step, two epochs of four steps, the switch between them
CHANGES: dict[str, Any] = {"training": {"epochs": 2, "maxLength": 256}, "outputs": {"artifacts": ["adapter", "quantized"]}}
OF_EACH_RUN = {"seconds", "peakMemoryBytes", "hints"}


@dataclass(frozen=True)
class Place:
    """Where a run is killed.

    Attributes:
        clear: removes everything that a run has left.
        lose: what a kill takes along beside the process.
        published: every file at the destination.
    """

    command: Command
    clear: Callable[[], None]
    lose: Callable[[], None]
    published: Callable[[], dict[str, bytes]]

    @property
    def result(self) -> dict[str, Any]:
        """A digest of each file that is the same after every run, and the report without what is measured anew in each."""
        files = self.published()
        report = {key: value for key, value in json.loads(files["report.json"]).items() if key not in OF_EACH_RUN}
        del report["training"]["resumedFrom"]
        same = {name: content for name, content in files.items() if name not in {"report.json", "manifest.json"}}
        return {name: sha256(content).hexdigest() for name, content in same.items()} | {"report": report}


@pytest.fixture
def laptop(tmp_path: Path) -> Place:
    job = tiny_job(tmp_path, CHANGES, ROWS)
    work, published = tmp_path / "work", tmp_path / "published"

    def clear() -> None:
        for folder in (work, published):
            shutil.rmtree(folder, ignore_errors=True)

    arguments = ("run", str(job), "--workdir", str(work), "--cache", str(tmp_path / "cache"))
    return Place(Command(tmp_path, arguments), clear, lambda: None, lambda: read_files(published))


@pytest.fixture
def pod(tmp_path: Path, s3_here: S3Server, inside: Any) -> Place:
    job = json.loads(tiny_job(tmp_path, CHANGES, ROWS).read_text())
    inside.put({f"base/{name}": content for name, content in read_files(tmp_path / "model").items()})
    inside.put({"rows.jsonl": (tmp_path / "rows.jsonl").read_bytes()})
    job["spec"]["model"] |= {"source": f"s3://{inside.name}/base", "endpoint": s3_here.endpoint}
    job["spec"]["dataset"] |= {"source": f"s3://{inside.name}/rows.jsonl", "endpoint": s3_here.endpoint}
    job["spec"]["outputs"]["destinations"] = [{"uri": f"s3://{inside.name}/bot", "endpoint": s3_here.endpoint}]
    job["spec"]["resources"] = {"gpus": 0}
    metadata = {"name": "tiny", "namespace": "team", "uid": "1"}
    described = JobDescription.of(metadata, FineTuneJobSpec.model_validate(job["spec"]), in_cluster=True)
    environment = {
        "FINETUNE_JOB": described.to_json(),
        "AWS_ACCESS_KEY_ID": s3_here.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_here.secret_key,
        ENV_TERMINATION_LOG: str(tmp_path / "termination-log"),
    }

    def lose() -> None:
        for folder in ("work", "cache"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)

    def clear() -> None:
        lose()
        for key in inside.listed():
            if key.startswith("bot/"):
                inside.client.delete_object(Bucket=inside.name, Key=key)

    def published() -> dict[str, bytes]:
        files = {key.removeprefix("bot/"): content for key, content in inside.read().items() if key.startswith("bot/")}
        assert not [name for name in files if name.startswith(DEFAULT_FOLDER)], "what is published needs no checkpoints any more"
        return files

    arguments = ("run", "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache"))
    return Place(Command(tmp_path, arguments, environment), clear, lose, published)


@pytest.fixture
def seed() -> int:
    """Of all moments; printed, so that a failure can be replayed."""
    chosen = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))
    print(f"SOAK_SEED={chosen}")
    return chosen


@pytest.mark.parametrize("name", ["laptop", "pod"])
def test_a_run_that_is_killed_anywhere_publishes_what_an_undisturbed_one_does(
    name: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place: Place = request.getfixturevalue(name)
    course = run_undisturbed(place.command, tmp_path / "log")
    expected = place.result
    assert {"lora_model/adapter_model.safetensors", "model-torchao/model.safetensors", "proof/reference.safetensors"} <= set(expected)
    drawn, killed = random.Random(f"{seed}-{name}"), 0  # noqa: S311 reproducible, not secret
    while killed < KILLS:
        place.clear()
        killed += killed_in_a_row(place, course, drawn, min(drawn.randint(1, IN_A_ROW), KILLS - killed), tmp_path / "log")
        result = place.result
        assert {name: value for name, value in result.items() if value != expected.get(name)} == {}
        assert set(result) == set(expected)


def killed_in_a_row(place: Place, course: Course, drawn: random.Random, most: int, log: Path) -> int:
    """Kills a run up to `most` times and lets it end; returns how often it was killed. No attempt repeats more than the step in hand."""
    done = 0
    for kill in range(most):
        moment = course.draw(drawn)
        print(f"kill {kill + 1} of {most}: {moment}")
        if not run_killed(place.command, log, moment):
            require_no_step_lost(log, done)
            return kill
        done = require_no_step_lost(log, done)
        place.lose()
    run_undisturbed(place.command, log)
    require_no_step_lost(log, done)
    return most


def require_no_step_lost(log: Path, done: int) -> int:
    """The last step that was reported, now that this attempt is over; it began behind the last one that was, or with it."""
    steps = [line["step"] for line in lines_of(log) if line["event"] == "step"]
    assert not steps or steps[0] in {max(done, 1), done + 1}, f"step {done} was done, and the next attempt began with {steps[0]}"
    return max([done, *steps])
