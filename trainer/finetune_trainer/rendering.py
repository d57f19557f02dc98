"""Turns a checked row into text in pieces: what is shown, and which of it is trained. Pure, without torch and without a tokenizer's weights.

Called by stages/data.py. Loss on completions only: prompts, and what a chat template puts around an answer, are never trained.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from finetune_trainer.conversation import TOOLS, VARIABLES, Messages, RowError
from finetune_trainer.dataset import Form, Row
from finetune_trainer.errors import DataError

_TEXTS = ("content", "reasoning_content", "reasoning", "thinking")
"""What templates read of an answer; the last three are names of the same."""


class Render(Protocol):
    """A chat template."""

    def __call__(self, messages: Messages, generation_prompt: bool, /, **variables: Any) -> str:
        """The text of the messages, with a generation prompt or without; tools are one of the variables."""


class TemplateError(ValueError):
    """A chat template refuses a conversation; the message is the template's own."""


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text; only trained pieces count in the loss."""

    text: str
    trained: bool


def render(row: Row, form: Form, template: Render | None, eos: str, name: str) -> list[Segment]:
    """The text of a row, in pieces.

    Args:
        row: a checked row.
        form: its form.
        template: renders messages as the model's chat template does, and raises TemplateError for what that refuses; None when the model has none.
        eos: the end-of-sequence token, which is always trained.
        name: how messages call the dataset.

    Raises:
        DataError: chat rows for a model without a chat template, or a conversation that the template refuses, rewrites or leaves a part of out.
    """
    if form == "text":
        return [Segment(row.values["text"] + eos, trained=True)]
    if not is_conversation(row, form, has_template=template is not None):
        return _plain(row, form, eos)
    if template is None:
        raise DataError(
            f"{name} holds conversations, but the model has no chat template; use an instruction-tuned model, or prompt and completion columns."
        )
    try:
        return _conversation(row, form, template, eos)
    except RowError as error:
        raise DataError(f"{name}, line {row.line}: {error}") from error
    except TemplateError as error:
        raise DataError(
            f"{name}, line {row.line}: the model's chat template refuses the conversation ({error}); change its turns."
        ) from error


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
        return [Segment(row.values["prompt"], trained=False), Segment(row.values["completion"] + eos, trained=True)]
    extra = f"\n\n### Input:\n{row.values['input']}" if row.values.get("input") else ""
    return [
        Segment(f"### Instruction:\n{row.values['instruction']}{extra}\n\n### Response:\n", trained=False),
        Segment(row.values["output"] + eos, trained=True),
    ]


def _messages(row: Row, form: Form) -> tuple[Messages, int]:
    """The conversation, and how many of its turns are given and not to be learnt."""
    if form == "chat":
        return list(row.values["messages"]), 0
    if form == "prompt-completion":
        return [*row.values["prompt"], *row.values["completion"]], len(row.values["prompt"])
    question = "\n\n".join(part for part in (row.values["instruction"], row.values.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row.values["output"]}], 0


def _conversation(row: Row, form: Form, template: Render, eos: str) -> list[Segment]:
    """Every assistant turn is trained, up to and with its end-of-sequence token; what the template adds around it is not.

    Where the template ends no turn with that token, a turn is trained with all that the template puts behind it, and the row's last one ends with
    the token: in the midst of a conversation it would be a text that the template never makes.
    """
    messages, given = _messages(row, form)
    variables = row.values.get(VARIABLES, {}) | ({TOOLS: row.values[TOOLS]} if TOOLS in row.values else {})
    learnt = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= given]
    _require_use(messages[: learnt[-1] + 1], variables, template)
    shown = partial(template, **variables)
    segments: list[Segment] = []
    done = ""
    for index in learnt:
        asked, answered = _question_and_answer(messages, index, shown)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise RowError("the model's chat template rewrites earlier turns; keep one assistant turn in each row.")
        turn, end, rest = answered[len(asked) :].partition(eos)
        end = end or (eos if index == learnt[-1] else "")
        _require_whole(messages[index], index + 1, asked[len(done) :], turn + end, eos)
        segments += [Segment(asked[len(done) :], trained=False), Segment(turn + end, trained=True)]
        segments += [Segment(rest, trained=False)] if rest else []
        done = answered
    return segments


def _require_use(messages: Messages, variables: dict[str, Any], template: Render) -> None:
    """Refuses tools and calls that the template leaves out: calls would be learnt of what is never shown, or nothing instead of a call."""
    turns = [{"content": "", **message} for message in messages]  # what knows no calls may fail without a content, which says less
    no_tools = {name: value for name, value in variables.items() if name != TOOLS}
    no_calls = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in turns]
    for part, others, other_turns in ((TOOLS, no_tools, turns), ("tool_calls", variables, no_calls)):
        if (others, other_turns) == (variables, turns):
            continue
        if _renders(template, other_turns, others) == template(turns, False, **variables):
            raise RowError(
                f"the model's chat template makes no use of the row's {part}; choose a model that is made for tools, or remove them."
            )


def _require_whole(message: dict[str, Any], number: int, asked: str, trained: str, eos: str) -> None:
    """Refuses an answer that is not all in what is trained, such as reasoning that the template cuts off; white space may differ.

    Args:
        message: the answer.
        number: of its turn, from 1.
        asked: what is rendered before it, whose end may open it: a generation prompt may hold its <think>.
        trained: what is rendered of it.
    """
    parts = {name: message[name] for name in _TEXTS if isinstance(message.get(name), str)}
    parts |= {f"call of {name}": name for name in (call.get("function", call)["name"] for call in message.get("tool_calls", ()))}
    before, rendered = _squeezed(asked), _squeezed(trained)
    missing = [part for part, text in parts.items() if not _is_in(_squeezed(text), before, rendered)]
    if not missing:
        return
    if eos in parts[missing[0]]:
        raise RowError(
            f"turn {number} holds the end-of-sequence token {eos} in its midst, behind which nothing would be trained; remove it."
        )
    raise RowError(
        f"the model's chat template does not render the whole {missing[0]} of turn {number}, so that it would not be trained; remove from the row "
        "what it leaves out, make a row of prompt and completion texts of it, or choose a model with another template."
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is_in(text: str, before: str, rendered: str) -> bool:
    """Whether it stands in what is rendered, or begins at the end of what is before."""
    return text in before[max(0, len(before) - len(text) + 1) :] + rendered


def _renders(template: Render, messages: Messages, variables: dict[str, Any]) -> str | None:
    try:
        return template(messages, False, **variables)
    except TemplateError:
        return None


def _question_and_answer(messages: Messages, index: int, template: Render) -> tuple[str, str]:
    """The text up to an assistant turn, and with it. Where the generation prompt opens more than the answer holds, it counts as the answer's."""
    answered = template(messages[: index + 1], False)
    if index == 0:
        # Many templates fail without any turn: the header before a first assistant turn is trained with it.
        return "", answered
    asked = template(messages[:index], True)
    return (asked, answered) if answered.startswith(asked) else (template(messages[:index], False), answered)
