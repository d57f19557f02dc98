"""Reads JSON Lines and checks every row: its form, its columns, their types. Pure, without torch. Every mistake names its line.

Called by preflight (before anything expensive) and by stages/data.py; rendering.py makes text of the rows. One row at a time is in memory: all are
checked first, and read again by whoever goes through them.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_trainer import conversation
from finetune_trainer.conversation import RowError
from finetune_trainer.errors import DataError

Form = Literal["chat", "prompt-completion", "instruction", "text"]

_COLUMNS: dict[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_MORE_COLUMNS: dict[Form, tuple[str, ...]] = {
    "chat": (conversation.TOOLS, conversation.VARIABLES),
    "prompt-completion": (conversation.TOOLS, conversation.VARIABLES),
    "instruction": ("input",),
    "text": (),
}


@dataclass(frozen=True)
class Row:
    """One line of the dataset that has been checked, a conversation in the form that templates read."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """All rows of one file, of one form; going through them reads the file.

    Attributes:
        unread: columns that some rows have, and that nothing is made of.
    """

    form: Form
    path: Path
    name: str
    count: int
    unread: tuple[str, ...]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        return _checked(self.path, self.name, self.form)


def read_rows(path: Path, name: str, wanted: str = "auto") -> Dataset:
    """Reads and checks every line, and keeps none.

    Args:
        path: a JSON Lines file.
        name: how messages call it.
        wanted: the form, or `auto` to detect it from the first row.

    Raises:
        DataError: empty, not UTF-8, a line that is not a JSON object, or a column that is missing or of the wrong type.
    """
    first = next(_parse_lines(path, name), None)
    if first is None:
        raise DataError(f"{name} is empty, but a dataset needs at least one row; check what wrote it.")
    form = _detect(first, name) if wanted == "auto" else _form(wanted)
    count, columns = 0, set[str]()
    for row in _checked(path, name, form):
        count += 1
        columns.update(row.values)
    return Dataset(form, path, name, count, tuple(sorted(columns.difference(_COLUMNS[form], _MORE_COLUMNS[form]))))


def _checked(path: Path, name: str, form: Form) -> Iterator[Row]:
    for row in _parse_lines(path, name):
        yield Row(row.line, _check(row, form, name))


def _parse_lines(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as file:  # not as text, which is decoded in blocks: a mistake would have no line
        for number, line in enumerate(file, start=1):
            text = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number, name)
            if text.strip():
                yield Row(number, _parse(text, number, name))


def _decoded(line: bytes, number: int, name: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, line {number} is not UTF-8 text (byte {error.start} of the line); save it as UTF-8 JSON Lines."
        ) from error


def _parse(line: str, number: int, name: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}, line {number} is not JSON ({error}); write one JSON object a line.") from error
    if "\\ud" in line.lower() and not _is_text(value):
        raise DataError(f"{name}, line {number} holds half of a surrogate pair (\\ud...), which is no text; save the row as UTF-8 again.")
    if not isinstance(value, dict):
        raise DataError(
            f'{name}, line {number} is {_kind(value)}, but a row is an object; write it as {{"prompt": ..., "completion": ...}}.'
        )
    return value


def _kind(value: Any) -> str:
    """What JSON calls it."""
    named = {dict: "an object", list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return named.get(type(value), "a number")


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _check(row: Row, form: Form, name: str) -> dict[str, Any]:
    """The row's values, its conversation in the form that templates read."""
    for column in _COLUMNS[form]:
        if column not in row.values:
            found = ", ".join(sorted(row.values)) or "no columns"
            raise DataError(
                f"{name}, line {row.line} has no column {column!r} (found: {found}), but the dataset's form is {form}; add it or set dataset.format."
            )
    try:
        if form == "chat" or (form == "prompt-completion" and isinstance(row.values["prompt"], list)):
            return _check_conversation(row.values, form)
        _check_strings(
            row.values, (*_COLUMNS[form], *(("input",) if row.values.get("input") is not None and form == "instruction" else ()))
        )
    except RowError as error:
        raise DataError(f"{name}, line {row.line}: {error}") from error
    return row.values


def _check_strings(values: dict[str, Any], columns: tuple[str, ...]) -> None:
    for column in columns:
        if not isinstance(values[column], str):
            raise RowError(f"column {column!r} is {_kind(values[column])}, but a string is expected; write one, or drop the row.")


def _check_conversation(values: dict[str, Any], form: Form) -> dict[str, Any]:
    parsed, learnt = conversation.parse(values, _COLUMNS[form]), _COLUMNS[form][-1]
    if not any(map(conversation.is_learnt, parsed[learnt])):
        raise RowError(f"{learnt!r} has no assistant turn, so there is nothing to learn from it; add one or drop the row.")
    return parsed
