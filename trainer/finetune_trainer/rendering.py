"""Turns a checked row into text in pieces: what is shown, and which of it is trained. Pure, without torch and without a tokenizer's weights.

Called by tokenizing.py. Loss on completions only: prompts, and what a chat template puts around an answer, are never trained.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from finetune_trainer.chat_template import Answer, Render, TemplateError, answers, squeezed
from finetune_trainer.conversation import TOOLS, VARIABLES, Messages, RowError
from finetune_trainer.dataset import Form, Row
from finetune_trainer.errors import DataError


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text; only trained pieces count in the loss."""

    text: str
    trained: bool


def render(row: Row, form: Form, template: Render | None, eos: str, name: str) -> list[list[Segment]]:
    """The texts of a row's examples, in pieces; a conversation is one for each answer where the template writes earlier turns otherwise.

    Args:
        row: a checked row.
        form: its form.
        template: renders messages as the model's chat template does, and raises TemplateError for what that refuses or fails on; None when the model has none.
        eos: the end-of-sequence token, which is always trained.
        name: how messages call the dataset.

    Raises:
        DataError: chat rows for a model without a chat template, or a conversation that the template refuses, fails on, rewrites or leaves a part of out.
    """
    if form == "text":
        return [[Segment(_ended(row.values["text"], eos), trained=True)]]
    if not is_conversation(row, form, has_template=template is not None):
        return [_plain(row, form, eos)]
    if template is None:
        raise DataError(
            f"{name} holds conversations, but the model has no chat template; use an instruction-tuned model, or prompt and completion columns."
        )
    try:
        return _conversation(row, form, template, eos)
    except RowError as error:
        raise DataError(f"{name}, line {row.line}: {error}") from error
    except TemplateError as error:
        said = (
            f"refuses the conversation ({error}); change its turns"
            if error.refused
            else f"fails on the conversation ({error}); correct the template, or change the turns if other rows pass"
        )
        raise DataError(f"{name}, line {row.line}: the model's chat template {said}.") from error


def is_conversation(row: Row, form: Form, *, has_template: bool) -> bool:
    """Whether the row is rendered by the chat template, which brings its own beginning-of-sequence token."""
    if form == "instruction":
        return has_template
    return form == "chat" or (form == "prompt-completion" and isinstance(row.values["prompt"], list))


def preview(segments: Iterable[Segment]) -> str:
    """The text of an example with what is trained between ⟦ and ⟧."""
    return "".join(f"⟦{segment.text}⟧" if segment.trained else segment.text for segment in segments)


def _plain(row: Row, form: Form, eos: str) -> list[Segment]:
    if form == "prompt-completion":
        return [Segment(row.values["prompt"], trained=False), Segment(_ended(row.values["completion"], eos), trained=True)]
    extra = f"\n\n### Input:\n{row.values['input']}" if row.values.get("input") else ""
    return [
        Segment(f"### Instruction:\n{row.values['instruction']}{extra}\n\n### Response:\n", trained=False),
        Segment(_ended(row.values["output"], eos), trained=True),
    ]


def _ended(text: str, eos: str) -> str:
    """With the end-of-sequence token, once: a text may have been rendered by a chat template before."""
    return text if text.rstrip().endswith(eos) else text + eos


def _messages(row: Row, form: Form) -> tuple[Messages, int]:
    """The conversation, and how many of its turns are given and not to be learnt."""
    if form == "chat":
        return list(row.values["messages"]), 0
    if form == "prompt-completion":
        return [*row.values["prompt"], *row.values["completion"]], len(row.values["prompt"])
    question = "\n\n".join(part for part in (row.values["instruction"], row.values.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row.values["output"]}], 0


def _conversation(row: Row, form: Form, template: Render, eos: str) -> list[list[Segment]]:
    """Every assistant turn is trained, up to and with its end-of-sequence token; what the template adds around it is not."""
    messages, given = _messages(row, form)
    variables = row.values.get(VARIABLES, {}) | ({TOOLS: row.values[TOOLS]} if TOOLS in row.values else {})
    found = answers(messages, given, variables, template, eos)
    joined = _joined(found, eos)
    if joined:
        return [joined]
    return [*(_pieces(answer.asked, *answer.text.partition(eos)) for answer in found[:-1]), _last(found[-1], "", eos)]


def _joined(found: Sequence[Answer], eos: str) -> list[Segment] | None:
    """All answers in one text; None where the template writes one of them otherwise once others follow: at inference each is the last one.

    Where the template ends no turn with the end-of-sequence token, a turn is trained with all that the template puts behind it, and the row's last one
    ends with the token: in the midst of a conversation it would be a text that the template never makes.
    """
    segments: list[Segment] = []
    done = ""
    for answer, following in pairwise(found):
        kept = _as_history(answer, following.asked, eos)
        if kept is None:
            return None
        segments += _pieces(answer.asked.removeprefix(done), *kept.partition(eos))
        done = answer.asked + kept
    return segments + _last(found[-1], done, eos)


def _as_history(answer: Answer, later: str, eos: str) -> str | None:
    """An answer's text in a later turn's: all, or all but an end-of-sequence token that the template puts behind the last turn alone.

    None where it is another, or would learn no end in the midst of a conversation, since that token is the only end it has.
    """
    if later.startswith(answer.asked + answer.text):
        return answer.text
    kept, _, behind = answer.text.rpartition(eos)
    has_an_end = not squeezed(kept).endswith(squeezed(answer.content))
    return kept if has_an_end and not behind.strip() and later.startswith(answer.asked + kept) else None


def _last(answer: Answer, done: str, eos: str) -> list[Segment]:
    turn, _, rest = answer.text.partition(eos)
    return _pieces(answer.asked.removeprefix(done), turn, eos, rest)


def _pieces(asked: str, turn: str, end: str, rest: str) -> list[Segment]:
    return [Segment(asked, trained=False), Segment(turn + end, trained=True), *([Segment(rest, trained=False)] if rest else [])]
