"""Data: rows become token ids and labels; loss on completions only, end-of-sequence trained, padding never.

The rows themselves are read and checked in dataset.py, and tokenizing.py has what the tokenizer makes of them. Works on the CPU with the tokenizer alone.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer import dataset, sources, tokenizing
from finetune_trainer.context import RunContext
from finetune_trainer.dataset import Dataset, Form
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example, chunks, cut
from finetune_trainer.held_out import FEWEST_ROWS
from finetune_trainer.plan import plan
from finetune_trainer.split import also_trained, split

_SPARE_POSITIONS = 2
_NAMED = 5  # columns, in a note


@dataclass(frozen=True)
class Cuts:
    """What training.maxLength takes from the rows.

    Attributes:
        dropped: rows of whose completion nothing is left.
        cut: rows that lose a part of it, and with that their end.
        tokens: of both, that would have been trained.
    """

    dropped: int = 0
    cut: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, whole: Sequence[Example], left: Sequence[Example]) -> "Cuts":
        """Those of one row."""
        before, after = (sum(example.trained_tokens for example in examples) for examples in (whole, left))
        return cls(int(not left), int(bool(left) and after < before), before - after)

    def __add__(self, other: "Cuts") -> "Cuts":
        return Cuts(self.dropped + other.dropped, self.cut + other.cut, self.tokens + other.tokens)

    def sentences(self, max_length: int) -> Iterator[str]:
        """For the user; none where nothing is lost."""
        if self.dropped:
            yield f"{self.dropped} rows were dropped: nothing of their completion fits into training.maxLength ({max_length} tokens)."
        if self.cut:
            yield f"{self.cut} rows were cut at training.maxLength ({max_length} tokens) and do not learn where to end."
        if self.tokens:
            yield f"{self.tokens} tokens of them would have been trained; raise training.maxLength, or shorten the rows."


@dataclass(frozen=True)
class Data:
    """What is trained on and what is held out.

    Attributes:
        cuts: what training.maxLength took.
        form: the form of the rows.
        resolved: the source with its digest, version or commit.
        held_out_resolved: likewise of held-out data that has a source of its own; else empty.
        identities: what changes with the content of the two and with nothing else, for the report.
        preview: the first example, with what is trained between ⟦ and ⟧.
        held_out_rows: how many of the held-out examples each row has, in order.
        also_trained: held-out examples with the tokens of one that is trained on.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    cuts: Cuts
    form: Form
    resolved: str
    held_out_resolved: str
    identities: dict[str, str]
    preview: str
    held_out_rows: tuple[int, ...]
    also_trained: int

    @property
    def digest(self) -> str:
        """64 hex digits over all token ids and labels, in order."""
        hashed = hashlib.sha256()
        for example in (*self.train, Example((), ()), *self.held_out):
            hashed.update(array("q", (len(example.input_ids), *example.input_ids, *example.labels)).tobytes())
        return hashed.hexdigest()


def run(ctx: RunContext, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Makes the data and shows its first example.

    Raises:
        AccessError, DataError, InfrastructureError: one sentence each.
    """
    made = make(ctx, tokenizer)
    if not ctx.job.in_cluster:  # a pod's log goes to collectors, where no row belongs
        ctx.reporter.note(f"First example, what is trained between ⟦ and ⟧:\n{made.preview[:2000]}")
    return made


def make(ctx: RunContext, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Fetches, reads, renders, tokenizes and splits.

    Raises:
        AccessError, DataError, InfrastructureError: one sentence each.
    """
    spec = ctx.spec.dataset
    fetched, evaluation = sources.fetch_dataset(ctx), sources.fetch_evaluation(ctx)
    rows = dataset.read_rows(fetched.path, spec.source, spec.format)
    examples, cuts = _examples(ctx, rows, tokenizer)
    if evaluation is not None:
        held, held_cuts = _examples(ctx, dataset.read_rows(evaluation.path, spec.evaluation.source, spec.format), tokenizer)
        sides, cuts = (examples, held), cuts + held_cuts
    else:
        sides = split(examples, spec.evaluation.percent, ctx.spec.training.seed)
    train, held_out = (tuple(chain.from_iterable(side)) for side in sides)
    _require_comparison(ctx, train, held_out)
    if lost := " ".join(cuts.sentences(ctx.spec.training.max_length)):
        ctx.reporter.note(lost)
    if 0 < len(sides[1]) < FEWEST_ROWS:
        ctx.reporter.note(
            f"Only {len(sides[1])} rows are held out: with fewer than {FEWEST_ROWS} no difference of losses is called significant; raise dataset.evaluation.percent."
        )
    if known := also_trained(train, held_out):
        ctx.reporter.note(f"{known} of {len(held_out)} held-out rows are also trained on, so losses look better than they are.")
    identities = {"dataset": fetched.identify(), "heldOut": evaluation.identify() if evaluation else ""}
    return Data(
        train,
        held_out,
        cuts,
        rows.form,
        fetched.resolved,
        evaluation.resolved if evaluation else "",
        identities,
        tokenizing.preview(rows, tokenizer),
        tuple(map(len, sides[1])),
        known,
    )


def require_known_tokens(data: Data, model: PreTrainedModel) -> None:
    """Refuses data that uses tokens or positions the model has no embedding for, which would end as an index error in mid-training.

    Args:
        data: what is trained on and what is held out.
        model: with or without an adapter, and with or without weights.

    Raises:
        DataError: tokenizer and model do not belong together, or a row is too long.
    """
    examples = (*data.train, *data.held_out)
    longest, positions = max(len(example.input_ids) for example in examples), _learned_positions(model)
    if positions is not None and longest > positions:
        raise DataError(
            f"The longest row has {longest} tokens, but the model has {positions} positions; set training.maxLength to {positions}."
        )
    largest, vocabulary = max(max(example.input_ids) for example in examples), model.get_input_embeddings().num_embeddings
    if largest >= vocabulary:
        raise DataError(
            f"The tokenizer makes token {largest}, but the model knows {vocabulary} tokens only; use the tokenizer that belongs to the model."
        )


def _examples(ctx: RunContext, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[Example]], Cuts]:
    """The examples of each row that has something to learn, each of at most training.maxLength tokens."""
    kept: list[list[Example]] = []
    cuts, max_length = Cuts(), ctx.spec.training.max_length
    for whole in tokenizing.examples(rows, tokenizer):
        parts = [
            chunks(example, max_length, tokenizer.bos_token_id) if rows.form == "text" else [cut(example, max_length)] for example in whole
        ]
        left = [example for example in chain.from_iterable(parts) if example.trained_tokens]
        kept += [left] if left else []
        cuts += Cuts.of(whole, left)
    if not kept:
        raise DataError(
            f"{rows.name}: no row has a completion that fits into training.maxLength ({max_length} tokens); raise it or shorten the prompts."
        )
    for sentence in _told(rows, kept, max_length):
        ctx.reporter.note(sentence)
    return kept, cuts


def _told(rows: Dataset, kept: Sequence[Sequence[Example]], max_length: int) -> Iterator[str]:
    """What a user may not expect of a file."""
    if rows.unread:
        more = f" and {len(rows.unread) - _NAMED} more" if len(rows.unread) > _NAMED else ""
        yield f"{rows.name} has columns that are not read: {', '.join(rows.unread[:_NAMED])}{more}."
    count = sum(map(len, kept))
    if count > len(kept) and rows.form == "text":
        yield f"{rows.name}: {len(kept)} rows became {count} examples of at most training.maxLength ({max_length} tokens)."
    elif count > len(kept):
        yield f"{rows.name}: {len(kept)} rows became {count} examples, since the model's chat template writes an answer otherwise once others follow."


def _learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has an embedding for; None where they are computed, as rotary ones are."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    # OPT's table has two more than its configuration says, for what is padding elsewhere.
    return limit if limit is not None and any(0 <= size - limit <= _SPARE_POSITIONS for size in tables) else None


def _require_comparison(ctx: RunContext, train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """A gate that has nothing to measure would let every model through."""
    if ctx.spec.quality.max_loss_increase_percent is None:
        return
    if not held_out:
        raise DataError(
            f"{ctx.spec.dataset.source} leaves no row to hold out, but quality.maxLossIncreasePercent compares held-out losses; "
            "add rows, set dataset.evaluation.source or remove the limit."
        )
    if plan(ctx.spec, len(train), 1).switch_step == 0:
        raise DataError(
            f"{ctx.spec.dataset.source} is enough for a single optimizer step, which is a quantization-aware one, but quality.maxLossIncreasePercent "
            "compares with the model before such steps; add rows or epochs, lower training.batchSize or remove the limit."
        )
