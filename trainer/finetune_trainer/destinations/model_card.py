"""The model card (README.md) of a publication: what was measured, and plain code that loads the model. Pure.

Called by stages/publish.py. States only what the report holds; a figure that was not measured is not there.
"""

from typing import Any

import yaml
from finetune_api import names
from finetune_api.job import JobDescription
from finetune_api.spec import Artifact, Scheme

_HUB_NAMES = {"builtin://smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_LOSSES = {
    "base": "base model",
    "tuned": "tuned, before quantization-aware steps",
    "nearest": "tuned, quantized with nearest values",
    "ptq": "tuned, quantized after training (PTQ), scales and rounding chosen",
    "quantized": "shipped quantized model",
    "adapter": "shipped adapter on the base model, not quantized",
}
_LOAD_QUANTIZED = """In the downloaded folder (transformers and torchao):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""
_LOAD_ADAPTER = """The adapter, on the base model that is not quantized (transformers and peft):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "{folder}")
```
"""


def model_card(job: JobDescription, report: dict[str, Any], folders: dict[Artifact, str]) -> str:
    """The card as Markdown with the Hub's YAML front matter.

    Args:
        job: the run.
        report: report.json's content.
        folders: where each artifact lies in the publication; "" is its root.
    """
    sections = [
        _front_matter(job, report, folders),
        f"# {job.name}\n",
        _summary(job, report),
        _quality(report, folders),
        _proof(report),
        _loading(job, report, folders),
        _origin(job, report),
    ]
    return "\n".join(section for section in sections if section)


def base_model(job: JobDescription) -> str:
    """The base model's name on the Hub; empty when it came from elsewhere."""
    source = job.spec.model.source
    if source.startswith("hf://"):
        return source.removeprefix("hf://").partition("@")[0].strip("/")
    return _HUB_NAMES.get(source.rstrip("/"), "")


def hub_revision(resolved: str) -> str:
    """The commit of a base model from the Hub, by its resolved source; empty when it came from elsewhere."""
    return resolved.partition("@")[2] if resolved.startswith("hf://") else ""


def _front_matter(job: JobDescription, report: dict[str, Any], folders: dict[Artifact, str]) -> str:
    quantized = Artifact.QUANTIZED in folders
    head: dict[str, Any] = {
        "library_name": "transformers" if quantized else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", "lora", *(["torchao", "qat", job.spec.quantization.scheme.value] if quantized else [])],
        **(report.get("license") or {}),
    }
    if base_model(job):
        head["base_model"] = base_model(job)
        head["base_model_relation"] = "quantized" if quantized else "adapter"
    return f"---\n{yaml.safe_dump(head, sort_keys=True)}---\n"


def _summary(job: JobDescription, report: dict[str, Any]) -> str:
    quantization = job.spec.quantization
    how = f"LoRA of rank {job.spec.lora.rank}"
    if quantization.scheme is not Scheme.NONE:
        how += f", the last {quantization.qat_percent} % of the steps under exact {quantization.scheme.value} quantization-aware training"
    layers = (report.get("qat") or {}).get("layers")
    covered = f" {layers} linear layers are quantized." if layers else ""
    return f"Fine-tuned by finetune-operator from `{job.spec.model.source}`: {how}.{covered}\n"


def _quality(report: dict[str, Any], folders: dict[Artifact, str]) -> str:
    losses = dict(report.get("losses") or {})
    if Artifact.ADAPTER not in folders:
        losses.pop("adapter", None)
    rows = [f"| {label} | {_figure(losses[name])} |" for name, label in _LOSSES.items() if losses.get(name) is not None]
    if not rows:
        return "## Quality\n\nNo held-out loss was measured.\n"
    return "\n".join(["## Quality\n", "Held-out loss, all on the same tokens:\n", "| model | loss |", "|---|---|", *rows, ""])


def _proof(report: dict[str, Any]) -> str:
    proof = report.get("proof")
    if not proof:
        return ""
    weights = "equal the trained ones bit for bit" if proof["weights_equal"] else "DIFFER from the trained ones"
    largest = f"The largest difference of a logit is {_figure(proof['max_logit_difference'])}."
    unrun = (
        "" if proof["kernel"] else " No kernel of this scheme ran on the training machine: the logits are those of the dequantized weights."
    )
    return f"## Proof\n\nThe model was loaded again in a fresh process: its dequantized weights {weights}. {largest}{unrun}\n"


def _loading(job: JobDescription, report: dict[str, Any], folders: dict[Artifact, str]) -> str:
    """Plain transformers and peft code, for the names a reader has at hand: a folder of this repository."""
    commit = hub_revision((report.get("sources") or {}).get("model", ""))
    base = f'"{base_model(job) or "path/to/the/base/model"}"' + (f', revision="{commit}"' if commit else "")
    blocks = []
    if Artifact.QUANTIZED in folders:
        blocks.append(_LOAD_QUANTIZED.format(folder=_here(folders[Artifact.QUANTIZED])))
    if Artifact.ADAPTER in folders:
        blocks.append(_LOAD_ADAPTER.format(base=base, folder=_here(folders[Artifact.ADAPTER])))
    return "## Use\n\n" + "\n".join(blocks)


def _origin(job: JobDescription, report: dict[str, Any]) -> str:
    sources = report.get("sources") or {}
    lines = [
        f"- base model: `{sources.get('model', job.spec.model.source)}`",
        f"- dataset: `{sources.get('dataset', job.spec.dataset.source)}`",
        f"- seed: {job.spec.training.seed}, training digest `{job.train_digest[:16]}`",
        *(f"- {name} {version}" for name, version in sorted((report.get("versions") or {}).items())),
        f"- every file's sha256: `{names.MANIFEST}`; everything measured: `{names.REPORT}`",
    ]
    return "## Origin\n\n" + "\n".join(lines) + "\n"


def _here(folder: str) -> str:
    return f"./{folder}" if folder else "."


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
