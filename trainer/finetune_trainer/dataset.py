"""Reads JSON Lines into examples: which text is shown, and which of it is trained. Pure, without torch and without a tokenizer's weights.

Preflight calls `read_rows` (before anything expensive), stages/data.py calls `render`. Every mistake names its line.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_trainer.errors import DataError

Form = Literal["chat", "prompt-completion", "instruction", "text"]
Render = Callable[[list[dict[str, str]], bool], str]

_COLUMNS: dict[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Row:
    """One line of the dataset that has been checked."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """All rows of one file, of one form."""

    form: Form
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text; only trained pieces count in the loss."""

    text: str
    trained: bool


def read_rows(path: Path, name: str, wanted: str = "auto") -> Dataset:
    """Reads and checks every line.

    Args:
        path: a JSON Lines file.
        name: how messages call it.
        wanted: the form, or `auto` to detect it from the first row.

    Raises:
        DataError: empty, not UTF-8, a line that is not a JSON object, or a column that is missing or of the wrong type.
    """
    values = list(_parse_lines(path, name))
    if not values:
        raise DataError(f"{name} is empty; a dataset needs at least one row of JSON.")
    form = _detect(values[0], name) if wanted == "auto" else _form(wanted)
    for row in values:
        _check(row, form, name)
    return Dataset(form, tuple(values))


def render(row: Row, form: Form, template: Render | None, eos: str, name: str) -> list[Segment]:
    """The text of a row, in pieces.

    Args:
        row: a checked row.
        form: its form.
        template: renders messages (with a generation prompt or without) as the model's chat template does; None when it has none.
        eos: the end-of-sequence token, which is always trained.
        name: how messages call the dataset.

    Raises:
        DataError: chat rows for a model without a chat template, or a template that rewrites earlier turns.
    """
    if form == "text":
        return [Segment(row.values["text"] + eos, trained=True)]
    if form == "prompt-completion" and isinstance(row.values["prompt"], str):
        return [Segment(row.values["prompt"], trained=False), Segment(row.values["completion"] + eos, trained=True)]
    if form == "instruction" and template is None:
        return _plain_instruction(row, eos)
    if template is None:
        raise DataError(
            f"{name} holds conversations, but the model has no chat template; use an instruction-tuned model, or prompt and completion columns."
        )
    return _conversation(row, _messages(row, form), template, eos, name)


def preview(segments: Iterable[Segment]) -> str:
    """The text of an example with what is trained between ⟦ and ⟧."""
    return "".join(f"⟦{segment.text}⟧" if segment.trained else segment.text for segment in segments)


def _parse_lines(path: Path, name: str) -> Iterable[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8 JSON Lines.") from error
    # Not splitlines(): a JSON string may hold U+2028 and other separators that are no line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}, line {number} is not JSON ({error}); a dataset holds one JSON object a line.") from error
        if not isinstance(value, dict):
            raise DataError(
                f'{name}, line {number} is a JSON {type(value).__name__}, but a row is an object such as {{"prompt": ..., "completion": ...}}.'
            )
        yield Row(number, value)


def _detect(row: Row, name: str) -> Form:
    for form, columns in _COLUMNS.items():
        if all(column in row.values for column in columns):
            return form
    found = ", ".join(sorted(row.values)) or "no columns"
    raise DataError(
        f"{name}, line {row.line} has {found}, but a row has messages, prompt and completion, instruction and output, or text; rename the columns."
    )


def _form(wanted: str) -> Form:
    return next(form for form in _COLUMNS if form == wanted)


def _check(row: Row, form: Form, name: str) -> None:
    for column in _COLUMNS[form]:
        if column not in row.values:
            found = ", ".join(sorted(row.values)) or "no columns"
            raise DataError(
                f"{name}, line {row.line} has no column {column!r} (found: {found}), but the dataset's form is {form}; add it or set dataset.format."
            )
    if form == "chat":
        _check_messages(row.values["messages"], row, name, "messages")
    elif form == "prompt-completion" and isinstance(row.values["prompt"], list):
        _check_messages(row.values["prompt"], row, name, "prompt")
        _check_messages(row.values["completion"], row, name, "completion")
    else:
        _check_strings(row, (*_COLUMNS[form], *(("input",) if row.values.get("input") is not None and form == "instruction" else ())), name)


def _check_strings(row: Row, columns: tuple[str, ...], name: str) -> None:
    for column in columns:
        if not isinstance(row.values[column], str):
            raise DataError(f"{name}, line {row.line}: column {column!r} is {type(row.values[column]).__name__}, but a string is expected.")


def _check_messages(messages: Any, row: Row, name: str, column: str) -> None:
    def well_formed(item: Any) -> bool:
        return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)

    if not isinstance(messages, list) or not messages or not all(well_formed(item) for item in messages):
        raise DataError(f'{name}, line {row.line}: {column!r} must be a list of {{"role": ..., "content": ...}} with text contents.')
    if column != "prompt" and not any(item["role"] == "assistant" for item in messages):
        raise DataError(
            f"{name}, line {row.line}: {column!r} has no assistant turn, so there is nothing to learn from it; add one or drop the row."
        )


def _messages(row: Row, form: Form) -> list[dict[str, str]]:
    if form == "chat":
        return list(row.values["messages"])
    if form == "prompt-completion":
        return [*row.values["prompt"], *row.values["completion"]]
    question = "\n\n".join(part for part in (row.values["instruction"], row.values.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row.values["output"]}]


def _plain_instruction(row: Row, eos: str) -> list[Segment]:
    extra = f"\n\n### Input:\n{row.values['input']}" if row.values.get("input") else ""
    return [
        Segment(f"### Instruction:\n{row.values['instruction']}{extra}\n\n### Response:\n", trained=False),
        Segment(row.values["output"] + eos, trained=True),
    ]


def _conversation(row: Row, messages: list[dict[str, str]], template: Render, eos: str, name: str) -> list[Segment]:
    """Every assistant turn is trained, up to and with its end-of-sequence token; what the template adds around it is not."""
    segments: list[Segment] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = template(messages[:index], True), template(messages[: index + 1], False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise DataError(
                f"{name}, line {row.line}: the model's chat template rewrites earlier turns; keep one assistant turn in each row."
            )
        turn, end, rest = answered[len(asked) :].partition(eos)
        segments += [Segment(asked[len(done) :], trained=False), Segment(turn + eos, trained=True)]
        segments += [Segment(rest, trained=False)] if end and rest else []
        done = answered
    return segments
