"""Reading JSON Lines: the four forms are told apart, and every mistake is refused with the line that has it."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.dataset import Dataset, read_rows
from finetune_trainer.errors import DataError
from hypothesis import given
from hypothesis import strategies as st

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ROWS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [USER, ASSISTANT]},
    "prompt-completion": {"prompt": "Hi", "completion": "Hello"},
    "instruction": {"instruction": "Greet", "output": "Hello"},
    "text": {"text": "Hello"},
}
GOOD = json.dumps(ROWS["prompt-completion"])


def read(folder: Path, content: str | bytes, wanted: str = "auto") -> Dataset:
    """The rows of a file with this content."""
    path = folder / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path, "rows.jsonl", wanted)


def refusal(folder: Path, content: str | bytes, wanted: str = "auto") -> str:
    """The sentence that refuses a file with this content."""
    with pytest.raises(DataError) as caught:
        read(folder, content, wanted)
    sentence = str(caught.value)
    assert sentence.startswith("rows.jsonl")
    assert "\n" not in sentence
    return sentence


def second_line(folder: Path, line: str, first: str = GOOD) -> str:
    """The sentence that refuses a bad line behind a good one; it names line 2."""
    sentence = refusal(folder, f"{first}\n{line}\n")
    assert "line 2" in sentence
    return sentence


@pytest.mark.parametrize("form", ROWS)
def test_each_form_is_detected_from_its_columns(form: str, tmp_path: Path) -> None:
    found = read(tmp_path, json.dumps(ROWS[form]))
    assert found.form == form
    assert [row.values for row in found] == [ROWS[form]]


@pytest.mark.parametrize("form", ROWS)
def test_each_form_can_be_asked_for(form: str, tmp_path: Path) -> None:
    everything = {key: value for row in ROWS.values() for key, value in row.items()}
    assert read(tmp_path, json.dumps(everything), form).form == form


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    assert read(tmp_path, json.dumps({"prompt": [USER], "completion": [ASSISTANT]})).form == "prompt-completion"


def test_an_instruction_may_have_an_input_or_null(tmp_path: Path) -> None:
    rows = [ROWS["instruction"] | {"input": value} for value in ("to Anna", None)]
    assert len(read(tmp_path, "\n".join(map(json.dumps, rows)))) == 2


def test_other_columns_do_no_harm(tmp_path: Path) -> None:
    assert read(tmp_path, json.dumps(ROWS["text"] | {"id": 7, "input": 3})).form == "text"


def test_blank_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    assert [row.line for row in read(tmp_path, f"\n{GOOD}\n  \n{GOOD}\n\n")] == [2, 4]


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    assert [row.line for row in read(tmp_path, b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())] == [1, 2]


def test_a_last_line_without_an_end_is_read(tmp_path: Path) -> None:
    assert len(read(tmp_path, f"{GOOD}\n{GOOD}")) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_a_separator_inside_a_string_ends_no_line(separator: str, tmp_path: Path) -> None:
    row = {"text": f"one{separator}two"}
    text = json.dumps(row, ensure_ascii=separator in "\x0b\x0c")
    assert [found.values for found in read(tmp_path, text)] == [row]


@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=1, max_size=5), ascii_only=st.booleans())
def test_any_text_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool) -> None:
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts)
    found = read(tmp_path_factory.mktemp("rows"), lines)
    assert [row.values["text"] for row in found] == texts


@pytest.mark.parametrize("content", ["", "\n \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(content: str | bytes, tmp_path: Path) -> None:
    assert "is empty, but a dataset needs at least one row" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", GOOD.encode("utf-16"), b'{"text": "caf\xe9"}'])
def test_a_file_that_is_not_utf8_is_refused_with_line_and_byte(content: bytes, tmp_path: Path) -> None:
    assert "line 1 is not UTF-8 text (byte " in refusal(tmp_path, content)
    assert "line 3 is not UTF-8 text (byte " in refusal(tmp_path, f"{GOOD}\n{GOOD}\n".encode() + content)


def test_rows_can_be_gone_through_again(tmp_path: Path) -> None:
    found = read(tmp_path, f"{GOOD}\n{GOOD}")
    assert list(found) == list(found) != []


def test_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"text": "x" * 1000}) + "\n") * 5000)
    tracemalloc.start()
    try:
        assert sum(len(row.values["text"]) for row in read_rows(path, "rows.jsonl")) == 5_000_000
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("line", ["{", "{'prompt': 1}", '{"a": 1} {"a": 2}', "prompt,completion", "[" * 100_000])
def test_a_line_that_is_not_json_is_named(line: str, tmp_path: Path) -> None:
    assert "is not JSON" in second_line(tmp_path, line)


@pytest.mark.parametrize(("line", "kind"), [("[1]", "an array"), ('"text"', "a string"), ("3", "a number"), ("null", "null")])
def test_a_line_that_is_no_object_is_named(line: str, kind: str, tmp_path: Path) -> None:
    assert f"is {kind}, but a row is an object; write it as {{" in second_line(tmp_path, line)


def test_an_array_of_rows_is_refused(tmp_path: Path) -> None:
    assert "line 1 is an array" in refusal(tmp_path, f"[{GOOD}, {GOOD}]")


@pytest.mark.parametrize("line", ['{"prompt": "\\ud800", "completion": "x"}', '{"prompt": "x", "\\uDC00": "y", "completion": "x"}'])
def test_half_of_a_surrogate_pair_is_named(line: str, tmp_path: Path) -> None:
    assert "holds half of a surrogate pair" in second_line(tmp_path, line)


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    [row] = read(tmp_path, '{"text": "\\ud83d\\ude00 \\\\ud800"}')
    assert row.values["text"] == "\U0001f600 \\ud800"


def test_a_first_row_of_no_form_is_refused_with_what_it_has(tmp_path: Path) -> None:
    assert "line 1 has answer, question, but a row has messages" in refusal(tmp_path, '{"question": "?", "answer": "!"}')


def test_a_first_row_without_columns_is_refused(tmp_path: Path) -> None:
    assert "line 1 has no columns" in refusal(tmp_path, "{}")


@pytest.mark.parametrize("form", ROWS)
def test_a_missing_column_is_named(form: str, tmp_path: Path) -> None:
    last = list(ROWS[form])[-1]
    line = json.dumps({key: value for key, value in ROWS[form].items() if key != last} | {"other": 1})
    sentence = second_line(tmp_path, line, first=json.dumps(ROWS[form]))
    assert f"has no column {last!r} (found: " in sentence
    assert "other" in sentence
    assert f"form is {form}" in sentence


def test_a_form_that_was_asked_for_is_held_to(tmp_path: Path) -> None:
    assert "line 1 has no column 'messages'" in refusal(tmp_path, GOOD, "chat")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "null"), (3, "a number"), (1.5, "a number"), (True, "a truth value"), (["x"], "an array"), ({"x": "y"}, "an object")],
)
@pytest.mark.parametrize(
    ("form", "column"),
    [("prompt-completion", "completion"), ("instruction", "instruction"), ("instruction", "output"), ("text", "text")],
)
def test_a_column_of_the_wrong_type_is_named(form: str, column: str, value: Any, kind: str, tmp_path: Path) -> None:
    line = json.dumps(ROWS[form] | {column: value})
    sentence = second_line(tmp_path, line, first=json.dumps(ROWS[form]))
    assert f"column {column!r} is {kind}, but a string is expected; write one" in sentence


def test_an_input_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    line = json.dumps(ROWS["instruction"] | {"input": 3})
    assert "column 'input' is a number" in second_line(tmp_path, line, first=json.dumps(ROWS["instruction"]))


@pytest.mark.parametrize("messages", [[], "Hi", None])
def test_messages_that_are_no_list_are_named(messages: Any, tmp_path: Path) -> None:
    sentence = second_line(tmp_path, json.dumps({"messages": messages}), first=json.dumps(ROWS["chat"]))
    assert "'messages' must be a list of" in sentence


@pytest.mark.parametrize(
    "turn",
    [
        "Hello",
        {"role": "assistant"},
        {"content": "Hello"},
        {"role": 1, "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": None},
    ],
)
def test_a_message_that_is_no_turn_is_named(turn: Any, tmp_path: Path) -> None:
    sentence = second_line(tmp_path, json.dumps({"messages": [USER, turn]}), first=json.dumps(ROWS["chat"]))
    assert "messages[1] must be" in sentence


@pytest.mark.parametrize("form", ["chat", "prompt-completion"])
def test_tools_and_calls_are_read_into_the_form_of_templates(form: str, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
    turns = {"messages": [USER, call]} if form == "chat" else {"prompt": [USER], "completion": [call]}
    [row] = read(tmp_path, json.dumps(turns | {"tools": '[{"name": "weather"}]'}))
    assert row.values["tools"] == [{"name": "weather"}]
    [*_, last] = row.values["messages" if form == "chat" else "completion"]
    assert last == {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]}


def test_a_mistake_in_tools_names_the_line(tmp_path: Path) -> None:
    sentence = second_line(tmp_path, json.dumps(ROWS["chat"] | {"tools": "weather"}), first=json.dumps(ROWS["chat"]))
    assert "'tools' must be a list of functions" in sentence


@pytest.mark.parametrize("form", ROWS)
def test_columns_that_are_not_read_are_known(form: str, tmp_path: Path) -> None:
    rows = [ROWS[form], ROWS[form] | {"system": "Be kind.", "id": 1}]
    assert read(tmp_path, "\n".join(map(json.dumps, rows))).unread == ("id", "system")
    assert read(tmp_path, json.dumps(ROWS[form])).unread == ()


def test_a_conversation_without_an_assistant_turn_is_named(tmp_path: Path) -> None:
    sentence = second_line(tmp_path, json.dumps({"messages": [USER]}), first=json.dumps(ROWS["chat"]))
    assert "'messages' has no assistant turn" in sentence


def test_a_conversation_of_weights_of_0_has_nothing_to_learn(tmp_path: Path) -> None:
    line = json.dumps({"messages": [USER, ASSISTANT | {"weight": 0}]})
    assert "'messages' has no assistant turn" in second_line(tmp_path, line, first=json.dumps(ROWS["chat"]))


def test_a_completion_without_an_assistant_turn_is_named(tmp_path: Path) -> None:
    assert "'completion' has no assistant turn" in second_line(tmp_path, json.dumps({"prompt": [USER], "completion": [USER]}))


def test_messages_answered_by_a_string_are_named(tmp_path: Path) -> None:
    assert "'completion' must be a list of" in second_line(tmp_path, json.dumps({"prompt": [USER], "completion": "Hello"}))
