"""What a checkpoint costs: its bytes, and the seconds to seal it, to mirror it to S3 and to fetch it into an empty pod (`make bench-mirror`).

The checkpoint is a real one: two optimizer steps of SmolLM2-135M, LoRA of rank 32 on all linears, by `finetune run`'s own pipeline. The server is versitygw
on the loopback, so the time is what the code and the checksums take; a network adds its own. Ends with one JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.job import JobDescription
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer import checkpoints, pipeline
from finetune_trainer.context import RunContext, user_cache
from finetune_trainer.mirror import Mirror
from finetune_trainer.reporting.quiet import quiet_libraries
from support.run_contexts import RecordingReporter
from support.s3_server import running_s3
from support.tiny_model import sums, write_jsonl

STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure; the median counts")
    rounds = parser.parse_args().rounds
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = train(folder)
        with running_s3(folder / "s3") as server:
            os.environ.update(AWS_ACCESS_KEY_ID=server.access_key, AWS_SECRET_ACCESS_KEY=server.secret_key)
            spec = spec_of(folder, {"uri": f"s3://{server.make_bucket()}/bot", "endpoint": server.endpoint})
            figures = measure(folder, made, spec, rounds)
    print(json.dumps(figures))


def spec_of(folder: Path, destination: dict[str, Any]) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "builtin://smollm2-135m"},
            "dataset": {"source": f"file://{folder}/rows.jsonl", "evaluation": {"percent": 0}},
            "lora": {"rank": 32},
            "quantization": {"scheme": "none"},
            "training": {"batchSize": 2, "maxLength": 64},
            "outputs": {"artifacts": ["adapter"], "destinations": [destination]},
        }
    )


def train(folder: Path) -> Path:
    """The checkpoint of the last step."""
    write_jsonl(folder / "rows.jsonl", sums(2 * STEPS))
    spec = spec_of(folder, {"uri": f"file://{folder}/published"})
    pipeline.run(JobDescription.of({"name": "mirror"}, spec, in_cluster=False), folder / "work", user_cache())
    return checkpoints.folder_of(folder / "work" / "outputs", STEPS)


def measure(folder: Path, made: Path, spec: FineTuneJobSpec, rounds: int) -> dict[str, Any]:
    """Bytes and median seconds."""
    job = JobDescription.of({"name": "mirror", "namespace": "bench", "uid": "1"}, spec, in_cluster=True)
    seconds: dict[str, list[float]] = {"seal": [], "push": [], "fetch": []}
    mirror = Mirror.of(RunContext(job, folder / "pod", folder / "cache", RecordingReporter()))
    assert mirror is not None
    for step in range(1, rounds + 1):
        copy = checkpoints.folder_of(folder / "outputs", step)
        shutil.copytree(made, copy)
        (copy / checkpoints.SEAL).unlink()
        seconds["seal"].append(timed(lambda copy=copy: checkpoints.seal(copy, job.train_digest, {})))
        seconds["push"].append(timed(lambda copy=copy: mirror.push(copy)))
        empty = folder / f"empty-{step}"
        seconds["fetch"].append(timed(lambda empty=empty: mirror.fetch_latest(empty, print)))
        assert checkpoints.is_complete(checkpoints.folder_of(empty, step))
    sizes = [path.stat().st_size for path in made.rglob("*") if path.is_file()]
    medians = {f"{name}_seconds": round(statistics.median(values), 2) for name, values in seconds.items()}
    spread = {f"{name}_spread": [round(min(values), 2), round(max(values), 2)] for name, values in seconds.items()}
    return {"files": len(sizes), "bytes": sum(sizes), **medians, **spread}


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
