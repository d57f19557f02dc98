"""What a user does with a published model, in a process of its own: load_published.py MODEL PROOF prints one JSON line about it.

Plain transformers and torchao, nothing of this project. test_whole_line.py runs it.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def logits_difference(model: torch.nn.Module, proof: Path) -> float:
    """The largest difference between the model's logits and those that the trainer recorded for the same tokens."""
    recorded = load_file(proof / "reference.safetensors")
    with torch.no_grad():
        logits = model(input_ids=recorded["input_ids"], attention_mask=recorded["attention_mask"], use_cache=False).logits
    return float((logits - recorded["logits"]).abs().max())


def sentence(model: torch.nn.Module, tokenizer: AutoTokenizer) -> str:
    """A short greedy continuation."""
    prompt = tokenizer("The import statement in Python", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


if __name__ == "__main__":
    folder, proof = Path(sys.argv[1]), Path(sys.argv[2])
    expected = json.loads((proof / "expected.json").read_text())
    torch.set_num_threads(expected["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=expected["attention"])
    kinds = sorted({type(parameter).__name__ for parameter in model.parameters()})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(json.dumps({"difference": logits_difference(model, proof), "sentence": sentence(model, tokenizer), "kinds": kinds}))
