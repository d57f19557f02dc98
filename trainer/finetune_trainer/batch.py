"""Examples as the tensors that a model takes."""

from collections.abc import Sequence

import torch

from finetune_trainer.example import IGNORED, Example


def pad(examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [rows, longest], padded on the right; padding is never trained."""
    longest = max(len(example.input_ids) for example in examples)
    filled = [(len(example.input_ids), longest - len(example.input_ids), example) for example in examples]
    batch = {
        "input_ids": [[*example.input_ids, *([pad_token_id] * missing)] for _, missing, example in filled],
        "attention_mask": [[1] * length + [0] * missing for length, missing, _ in filled],
        "labels": [[*example.labels, *([IGNORED] * missing)] for _, missing, example in filled],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}
