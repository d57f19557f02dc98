"""Reads JSON Lines and checks every row: its form, its columns, their types. Pure, without torch. Every mistake names its line.

Called by preflight (before anything expensive) and by stages/data.py; rendering.py makes text of the rows.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_trainer.errors import DataError

Form = Literal["chat", "prompt-completion", "instruction", "text"]

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
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {number} is not JSON ({error}); a dataset holds one JSON object a line.") from error
        if "\\ud" in line.lower() and not _is_text(value):
            raise DataError(
                f"{name}, line {number} holds half of a surrogate pair (\\ud...), which is no text; save the row as UTF-8 again."
            )
        if not isinstance(value, dict):
            raise DataError(
                f'{name}, line {number} is a JSON {type(value).__name__}, but a row is an object such as {{"prompt": ..., "completion": ...}}.'
            )
        yield Row(number, value)


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
