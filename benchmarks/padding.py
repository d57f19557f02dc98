"""What rows of different lengths cost (`make bench-padding`): tokens computed for each token there is, and micro-batches a step. Counts, no training.

Rows as they come, cut into micro-batches by number, against the trainer's order and cut (row_order.py).
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from finetune_api.job import JobDescription
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import RunContext, user_cache
from finetune_trainer.row_order import micro_batches, order_of
from finetune_trainer.sources import builtin
from finetune_trainer.stages import data
from support.run_contexts import RecordingReporter
from transformers import AutoTokenizer

BATCH, SEED = 16, 42


def main() -> None:
    print("| rows, 16 a step | micro-batch | tokens computed, as they come | by length | micro-batches a step, by number | by tokens |")
    print("|---|---|---|---|---|---|")
    kinds = {"Python's language reference": language_reference(), "log-normal, median 200, sigma 0.8": log_normal()}
    for kind, lengths in kinds.items():
        for rows in (1, 4, 8, 16):
            print(
                f"| {kind}; mean {sum(lengths) / len(lengths):.0f}, longest {max(lengths)} | {rows} | {' | '.join(figures(lengths, rows))} |"
            )


def figures(lengths: list[int], rows: int) -> Iterator[str]:
    """The four of a row; `rows` of the longest are a micro-batch."""
    as_they_come = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(SEED)).tolist()
    by_number = [part for step in steps(as_they_come, BATCH) for part in steps(step, rows)]
    by_tokens = [
        [step[index] for index in part]
        for step in steps(order_of(lengths, BATCH, SEED), BATCH)
        for part in micro_batches([lengths[row] for row in step], rows * max(lengths))
    ]
    for parts in (by_number, by_tokens):
        yield f"{sum(len(part) * max(lengths[row] for row in part) for part in parts) / sum(lengths):.2f}"
    for parts in (by_number, by_tokens):
        yield f"{len(parts) * BATCH / len(lengths):.1f}"


def steps(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def log_normal() -> list[int]:
    drawn = torch.empty(2000).log_normal_(5.3, 0.8, generator=torch.Generator().manual_seed(0))
    return (drawn.long() + 1).clamp(max=2048).tolist()


def language_reference() -> list[int]:
    """Tokens of the rows of the demo's data, not cut."""
    source = {"model": {"source": "builtin://smollm2-135m"}, "dataset": {"source": "builtin://python-docs"}}
    spec = FineTuneJobSpec.model_validate(source | {"outputs": {"destinations": [{"uri": "file:///nowhere"}]}})
    cache = user_cache()
    with TemporaryDirectory() as name:
        ctx = RunContext(JobDescription.of({"name": "padding"}, spec, in_cluster=False), Path(name), cache, RecordingReporter())
        rows = data.run(ctx, AutoTokenizer.from_pretrained(builtin.fetch_model(cache, print)))
    return [len(row.input_ids) for row in rows.train]


if __name__ == "__main__":
    main()
