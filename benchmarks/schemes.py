"""Size and held-out loss of every scheme on SmolLM2-135M: one whole `finetune run` a scheme, kept in benchmarks/results/schemes.json.

`make bench-schemes` measures what is missing or was measured otherwise, then writes docs/schemes.md anew. Every run passes the same tuned model, since
plain LoRA comes first, and the losses behind it are of the same rows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune_api.spec import Scheme
from finetune_trainer.qat.schemes_page import LOSSES

RESULTS = Path(__file__).parent / "results" / "schemes.json"
SPEC: dict[str, Any] = {
    "model": {"source": "builtin://smollm2-135m"},
    "dataset": {"source": "builtin://python-docs", "evaluation": {"percent": 10}},
    "lora": {"rank": 16},
    "quantization": {"qatPercent": 20},
    "training": {"batchSize": 16, "learningRate": "1e-3", "maxLength": 64, "seed": 42},
    "outputs": {"artifacts": ["quantized"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", type=Scheme, default=[scheme for scheme in Scheme if scheme is not Scheme.NONE])
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    chosen = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if chosen.fresh or known.get("spec") != SPEC:
        known = {"spec": SPEC, "schemes": {}}
    for scheme in chosen.schemes:
        if scheme.value not in known["schemes"]:
            known["schemes"][scheme.value] = measure(scheme)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(json.dumps({"scheme": scheme.value} | known["schemes"][scheme.value]))


def measure(scheme: Scheme) -> dict[str, Any]:
    """What the run's report says; for a scheme that the model does not fit, the sentence that refuses it."""
    spec = SPEC | {"quantization": SPEC["quantization"] | {"scheme": scheme.value}}
    with tempfile.TemporaryDirectory() as folder:
        spec["outputs"] = spec["outputs"] | {"destinations": [{"uri": f"file://{folder}/published"}]}
        job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "scheme"}, "spec": spec}
        path = Path(folder) / "job.yaml"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-m", "finetune_trainer.cli", "run", str(path), "--workdir", f"{folder}/work"]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return {"refused": done.stderr.strip().splitlines()[0]}
        report = json.loads((Path(folder) / "published" / "report.json").read_text())
    return {
        "losses": {name: report["losses"][name] and round(report["losses"][name], 4) for name in LOSSES},
        "bytes": report["bytes"],
        "coverage": report["qat"]["coverage"],
        "verifiedBy": report["proof"]["verified_by"],
        "steps": report["training"]["steps"],
        "versions": report["versions"],
    }


if __name__ == "__main__":
    main()
