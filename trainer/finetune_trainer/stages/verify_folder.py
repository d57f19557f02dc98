"""The fresh process of verify: `python -m finetune_trainer.stages.verify_folder FOLDER REFERENCE EXPECTED` prints one JSON line.

Loads the folder as any user would, with plain transformers and torchao. Where no kernel for its weights runs on this machine, or one that
rounds in its own way, the logits are those of the shipped weights in the arithmetic of the training, and the kernel is measured apart. Code from the folder itself runs
only where the spec allowed the base model's.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from finetune_trainer.failures import first_line, is_out_of_memory
from finetune_trainer.qat.export import weight_digests
from finetune_trainer.qat.kernels import REFERENCE, kernel_errors, kernel_of, reference_arithmetic

_NEW_TOKENS = 24


def main(folder: Path, reference: Path, expected: dict) -> dict:
    """Digests of all weights, the largest difference of the logits, what the kernel adds to it, and a continuation of a word."""
    torch.set_num_threads(expected["threads"])
    trusted = expected["trust_remote_code"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=expected["attention"], trust_remote_code=trusted)
    model.to(expected["device"])
    recorded = load_file(reference)
    batch = {name: recorded[name].to(expected["device"]) for name in ("input_ids", "attention_mask")}
    kernel = kernel_of(model, model.device)
    exact = kernel == REFERENCE  # it dequantizes, as training does; any other kernel rounds in its own way
    with torch.no_grad(), nullcontext() if exact else reference_arithmetic(model):
        logits = model(**batch, use_cache=False).logits.cpu()
    with nullcontext() if kernel else reference_arithmetic(model):
        generated, failure = _sentence(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted))
    return {
        "weights": weight_digests(model),
        "max_logit_difference": float((logits.double() - recorded["logits"].double()).abs().max()),
        "kernel": f"{kernel} on {expected['device']}" if kernel else "",
        "kernel_errors": kernel_errors(model, batch) if kernel and not exact else {},
        "generated": generated,
        "generation_failure": failure,
    }


def _sentence(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A greedy continuation, or why there is none: generating takes more of transformers than a forward pass, and says nothing about weights."""
    prompt = tokenizer("The", return_tensors="pt").to(model.device)
    prompt.pop("token_type_ids", None)
    try:
        generated = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return "", f"{type(error).__name__}: {first_line(error)}"
    return str(tokenizer.decode(generated[0], skip_special_tokens=True)), ""


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))))  # noqa: T201
