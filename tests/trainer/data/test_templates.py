"""What the chat templates of real models make of a row, as trl stores them: tools and their calls are in it, or the row is refused."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from finetune_trainer.errors import DataError
from finetune_trainer.example import IGNORED
from finetune_trainer.stages import data
from support.run_contexts import context, notes, refused, run_spec
from support.tiny_model import tiny_tokenizer, write_jsonl
from transformers import PreTrainedTokenizerFast

FOLDER = Path(trl.__file__).parent / "chat_templates"
EOS = {
    "deepseek_r1_distill": "<\uff5cend▁of▁sentence\uff5c>",
    "gemma": "<eos>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "phi3": "<|endoftext|>",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}, "required": ["city"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
SUNNY = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "31 degrees"},
    {"role": "assistant", "content": "It is hot."},
]


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a model's template, and the words of its end and beginning."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"eos_token": EOS.get(name, "<|im_end|>"), "bos_token": "<s>"})
    return tokenizer


def shown(name: str, folder: Path, *rows: dict[str, Any]) -> list[str]:
    """The examples that a model's template makes of rows, what is trained between ⟦ and ⟧."""
    spec = run_spec(dataset=f"file://{write_jsonl(folder / 'rows.jsonl', rows)}", training={"maxLength": 8192})
    spec["dataset"]["evaluation"] = {"percent": 0}
    tokenizer = tokenizer_of(name)
    texts = []
    for example in data.make(context(folder, spec), tokenizer).train:
        runs = groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
        pieces = [(trained, tokenizer.decode([token for token, _ in pairs])) for trained, pairs in runs]
        texts.append("".join(f"⟦{text}⟧" if trained else text for trained, text in pieces))
    return texts


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "glm4moe", "lfm2_v2", "gemma4_v5"])
def test_a_call_is_trained_and_its_tool_is_shown(name: str, tmp_path: Path) -> None:
    [text] = shown(name, tmp_path, {"messages": SUNNY[:2], "tools": json.dumps([TOOL])})
    asked, _, trained = text.partition("⟦")
    assert "Of a city." in asked
    assert "weather" in trained
    assert "Rome" in trained
    assert "\\" not in trained
    assert "None" not in text


def test_openais_form_and_transformers_are_the_same_text(tmp_path: Path) -> None:
    function = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    plain = [SUNNY[0], {"role": "assistant", "tool_calls": [function]}]
    one, other = shown("qwen2_5", tmp_path, {"messages": SUNNY[:2], "tools": [TOOL]}, {"messages": plain, "tools": json.dumps([TOOL])})
    assert one == other
    assert one.endswith(
        '<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>⟧\n'
    )


def test_variables_of_the_template_reach_it(tmp_path: Path) -> None:
    row = {"prompt": SUNNY[:1], "completion": [{"role": "assistant", "content": "It is hot."}]}
    [high] = shown("gptoss", tmp_path, row | {"chat_template_kwargs": {"reasoning_effort": "high"}})
    assert "Reasoning: high" in high
    assert "Reasoning: high" not in shown("gptoss", tmp_path, row)[0]


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3", "cohere2"])
def test_tools_that_the_template_leaves_out_are_refused(name: str, tmp_path: Path) -> None:
    row = {"messages": [SUNNY[0], SUNNY[3]], "tools": [TOOL]}
    with refused(DataError, "rows.jsonl, line 2", "chat template makes no use of the row's tools", "remove them"):
        shown(name, tmp_path, {"messages": [SUNNY[0], SUNNY[3]]}, row)


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3", "cohere2", "deepseek_r1_distill", "lfm2"])
@pytest.mark.parametrize("content", [None, "One moment."])
def test_calls_that_the_template_leaves_out_are_refused(name: str, content: str | None, tmp_path: Path) -> None:
    row = {"messages": [SUNNY[0], SUNNY[1] | {"content": content}]}
    with refused(DataError, "rows.jsonl, line 1", "chat template makes no use of the row's tool_calls", "remove them"):
        shown(name, tmp_path, row)


THOUGHT = [{"content": "<think>\nSummer.\n</think>\n\nIt is hot."}, {"content": "It is hot.", "reasoning_content": "Summer."}]


@pytest.mark.parametrize(
    ("name", "answer"), [("deepseek_r1_distill", THOUGHT[0]), ("deepseek_r1_distill", THOUGHT[1]), ("llama3", THOUGHT[1])]
)
def test_reasoning_that_the_template_leaves_out_is_refused(name: str, answer: dict[str, str], tmp_path: Path) -> None:
    with refused(DataError, "rows.jsonl, line 1", "does not render the whole", "of turn 2", "remove from the row what it leaves out"):
        shown(name, tmp_path, {"messages": [SUNNY[0], {"role": "assistant", **answer}]})


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
@pytest.mark.parametrize("answer", THOUGHT)
def test_reasoning_that_the_template_renders_is_trained(name: str, answer: dict[str, str], tmp_path: Path) -> None:
    [text] = shown(name, tmp_path, {"messages": [SUNNY[0], {"role": "assistant", **answer}]})
    trained = text.partition("⟦")[2].partition("⟧")[0]
    assert trained.index("Summer.") < trained.index("</think>") < trained.index("It is hot.")


def test_a_text_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "rows.jsonl, line 1", "does not render the whole content of turn 2"):
        shown("smolvlm", tmp_path, {"messages": [SUNNY[0], SUNNY[3]]})


TALK = [SUNNY[0], SUNNY[3], {"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "It is cold."}]


def plain(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_instruct_2507", "llama3", "llama3_1", "gemma", "phi3", "lfm2", "deepseek_r1_distill", "glm4moe"]
)
def test_a_conversation_is_one_example_where_the_template_writes_all_turns_alike(name: str, tmp_path: Path) -> None:
    [text] = shown(name, tmp_path, {"messages": TALK})
    trained = [part.partition("⟧")[0] for part in text.split("⟦")[1:]]
    assert ["hot" in trained[0], "cold" in trained[1], len(trained)] == [True, True, 2]
    assert trained[1].endswith(tokenizer_of(name).eos_token)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss"])
def test_a_conversation_is_an_example_for_each_answer_where_the_template_writes_the_last_otherwise(name: str, tmp_path: Path) -> None:
    row = {"messages": [*TALK, {"role": "user", "content": "Lima?"}, {"role": "assistant", "content": "Who knows."}]}
    texts, tokenizer = shown(name, tmp_path, row), tokenizer_of(name)
    assert len(texts) == 3
    for number, text in enumerate(texts, start=1):
        assert text.count("⟦") == 1
        assert text.partition("⟧")[0].endswith(tokenizer.eos_token)
        whole = str(tokenizer.apply_chat_template(row["messages"][: 2 * number], tokenize=False))
        assert plain(text).partition("Rome?")[2] == whole.partition("Rome?")[2]  # before it, GPT-OSS has today's date


def test_the_end_that_phi_3_puts_behind_a_conversation_stands_there_alone(tmp_path: Path) -> None:
    assert shown("phi3", tmp_path, {"messages": TALK}) == [
        "<|user|>\nRome?<|end|>\n<|assistant|>\n⟦It is hot.<|end|>\n⟧<|user|>\nOslo?<|end|>\n<|assistant|>\n⟦It is cold.<|end|>\n<|endoftext|>⟧"
    ]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "lfm2_v2", "glm4moe", "gemma4_v5"])
def test_a_call_and_the_answer_that_it_leads_to_are_both_trained(name: str, tmp_path: Path) -> None:
    texts = shown(name, tmp_path, {"messages": SUNNY, "tools": [TOOL]})
    trained = [part.partition("⟧")[0] for text in texts for part in text.split("⟦")[1:]]
    assert len(trained) == 2
    assert "weather" in trained[0]
    assert "It is hot." in trained[1]
    assert not any("31 degrees" in part for part in trained)
    assert "31 degrees" in texts[-1]


def test_a_call_that_gpt_oss_ends_in_its_own_way_gets_no_other_end(tmp_path: Path) -> None:
    [call, hot, cold] = shown("gptoss", tmp_path, {"messages": [*SUNNY, *TALK[2:]], "tools": [TOOL]})
    assert call.endswith("<|call|>⟧")
    assert hot.endswith("It is hot.<|return|>⟧")
    assert cold.endswith("It is cold.<|return|>⟧")


def test_more_examples_than_rows_are_said(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec(dataset=f"file://{write_jsonl(tmp_path / 'rows.jsonl', [{'messages': TALK}] * 3)}"))
    data.make(ctx, tokenizer_of("qwen3"))
    assert any("rows.jsonl: 3 rows became 6 examples" in note for note in notes(ctx))


def test_columns_that_are_not_read_are_said(tmp_path: Path) -> None:
    rows = [{"instruction": "Greet", "output": "Hello", "system": "Be kind.", "history": []}]
    ctx = context(tmp_path, run_spec(dataset=f"file://{write_jsonl(tmp_path / 'rows.jsonl', rows)}"))
    data.make(ctx, tiny_tokenizer())
    assert any("rows.jsonl has columns that are not read: history, system." in note for note in notes(ctx))
