"""What a chat template writes of a conversation's answers, and that it leaves nothing of them out. Pure: the template is a function.

Called by rendering.py. A template is a program of the model's author, made to show a history and to ask for the next turn: some drop the reasoning of
an answer, know no tools, or write a turn otherwise once others follow.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from finetune_trainer.conversation import TOOLS, Messages, RowError, is_learnt

_TEXTS = ("content", "reasoning_content", "reasoning", "thinking")
"""What templates read of an answer; the last three are names of the same."""


class Render(Protocol):
    """A chat template."""

    def __call__(self, messages: Messages, generation_prompt: bool, /, **variables: Any) -> str:
        """The text of the messages, with a generation prompt or without; tools are one of the variables. Raises TemplateError."""


class TemplateError(ValueError):
    """A chat template refuses a conversation, or fails on it.

    Attributes:
        refused: the template itself says why; else the message is the template engine's.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True)
class Answer:
    """An assistant turn, as the template writes it while nothing follows.

    Attributes:
        message: the turn.
        asked: the text before it, with as much of the generation prompt as it goes on from.
        text: what the template adds to that.
    """

    message: dict[str, Any]
    asked: str
    text: str

    @property
    def content(self) -> str:
        """What it says, besides reasoning and calls."""
        return str(self.message.get("content", ""))


def answers(messages: Messages, given: int, variables: dict[str, Any], template: Render, eos: str) -> list[Answer]:
    """The assistant turns behind the first `given` messages, those that are to be learnt.

    Args:
        variables: of the template; tools are one of them.
        eos: the end-of-sequence token, behind which nothing of an answer is trained.

    Raises:
        RowError: the template leaves out a part of an answer, or the row's tools, or writes what stands before an answer otherwise behind it.
        TemplateError: it refuses the conversation, or fails on it.
    """
    learnt = [index for index, message in enumerate(messages) if is_learnt(message) and index >= given]
    _require_use(messages[: learnt[-1] + 1], variables, template)
    found = [_answer(messages, index, partial(template, **variables)) for index in learnt]
    for index, answer in zip(learnt, found, strict=True):
        _require_whole(answer, index + 1, eos)
    return found


def squeezed(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


def _answer(messages: Messages, index: int, template: Render) -> Answer:
    """Where the generation prompt opens more than the answer holds, what it opens counts as the answer's."""
    answered = template(messages[: index + 1], False)
    # Many templates fail without any turn: the header before a first assistant turn is trained with it.
    asked = template(messages[:index], True) if index else ""
    if not answered.startswith(asked):
        asked = template(messages[:index], False)
    if not answered.startswith(asked):
        raise RowError(
            f"the model's chat template writes the turns before turn {index + 1} otherwise once it is there; choose a model with another template, or "
            "make rows of prompt and completion texts."
        )
    return Answer(messages[index], asked, answered[len(asked) :])


def _require_use(messages: Messages, variables: dict[str, Any], template: Render) -> None:
    """Refuses tools and calls that the template leaves out: calls would be learnt of what is never shown, or nothing instead of a call."""
    turns = [{"content": "", **message} for message in messages]  # what knows no calls may fail without a content, which says less
    no_tools = {name: value for name, value in variables.items() if name != TOOLS}
    no_calls = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in turns]
    for part, others, other_turns in ((TOOLS, no_tools, turns), ("tool_calls", variables, no_calls)):
        if (others, other_turns) == (variables, turns):
            continue
        if _rendered(template, other_turns, others) == template(turns, False, **variables):
            raise RowError(
                f"the model's chat template makes no use of the row's {part}; choose a model that is made for tools, or remove them."
            )


def _rendered(template: Render, messages: Messages, variables: dict[str, Any]) -> str | None:
    try:
        return template(messages, False, **variables)
    except TemplateError:
        return None


def _require_whole(answer: Answer, number: int, eos: str) -> None:
    """Refuses an answer that is not all in what is trained, such as reasoning that the template cuts off; white space may differ."""
    parts = {name: answer.message[name] for name in _TEXTS if isinstance(answer.message.get(name), str)}
    calls = (call.get("function", call)["name"] for call in answer.message.get("tool_calls", ()))
    missing = [part for part, text in (parts | {f"call of {name}": name for name in calls}).items() if not _is_trained(text, answer, eos)]
    if not missing:
        return
    if eos in parts.get(missing[0], ""):
        raise RowError(
            f"turn {number} holds the end-of-sequence token {eos} in its midst, behind which nothing would be trained; remove it."
        )
    raise RowError(
        f"the model's chat template does not render the whole {missing[0]} of turn {number}, so that it would not be trained; remove from the row "
        "what it leaves out, make a row of prompt and completion texts of it, or choose a model with another template."
    )


def _is_trained(part: str, answer: Answer, eos: str) -> bool:
    """Whether it stands in the answer up to its end, or begins where the generation prompt ends, which may hold its <think>."""
    wanted, trained = squeezed(part), squeezed("".join(answer.text.partition(eos)[:2]))
    if wanted in trained:
        return True
    before = squeezed(answer.asked)
    return wanted in before[max(0, len(before) - len(wanted) + 1) :] + trained
