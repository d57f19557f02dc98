"""The fresh process of verify: `python -m finetune_trainer.stages.verify_folder FOLDER REFERENCE EXPECTED` prints one JSON line.

Loads the folder as any user would, with plain transformers and torchao; only the digests come from us. Code from the folder itself runs
only where the spec allowed the base model's.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from finetune_trainer.qat.export import weight_digests

_NEW_TOKENS = 24


def main(folder: Path, reference: Path, expected: dict) -> dict:
    """Digests of all weights, the largest difference of the logits, and a continuation of the recorded tokens."""
    torch.set_num_threads(expected["threads"])
    trusted = expected["trust_remote_code"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=expected["attention"], trust_remote_code=trusted)
    model.to(expected["device"])
    recorded = load_file(reference)
    batch = {name: recorded[name].to(expected["device"]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits.cpu()
    return {
        "weights": weight_digests(model),
        "max_logit_difference": float((logits.double() - recorded["logits"].double()).abs().max()),
        "device": expected["device"],
        "generated": _sentence(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)),
    }


def _sentence(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    prompt = tokenizer("The", return_tensors="pt").to(model.device)
    prompt.pop("token_type_ids", None)
    generated = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))))  # noqa: T201
