"""What a conversation's row may hold: OpenAI's form, transformers' and what datasets makes of either become the one that templates read."""

import inspect
import json
from typing import Any

import pytest
from finetune_trainer.conversation import RESERVED, RowError, parse
from transformers import PreTrainedTokenizerBase

USER = {"role": "user", "content": "Rome?"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}}}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


def turn(**values: Any) -> dict[str, Any]:
    return {"role": "assistant", **values}


def parsed(*messages: Any, **columns: Any) -> dict[str, Any]:
    return parse({"messages": list(messages), **columns}, ("messages",))


def refusal(*messages: Any, **columns: Any) -> str:
    with pytest.raises(RowError) as caught:
        parsed(*messages, **columns)
    return str(caught.value)


def test_a_plain_conversation_stays_as_it_is() -> None:
    assert parsed(USER, turn(content="Sunny.")) == {"messages": [USER, turn(content="Sunny.")]}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "One moment."}])
def test_a_turn_with_tool_calls_may_have_no_content(content: dict[str, Any]) -> None:
    [_, found] = parsed(USER, turn(**content, tool_calls=[call({"city": "Rome"})]))["messages"]
    assert found == turn(**{name: text for name, text in content.items() if text is not None}, tool_calls=[call({"city": "Rome"})])


@pytest.mark.parametrize("nothing", [None, []])
def test_what_a_turn_lacks_is_no_key_of_it(nothing: Any) -> None:
    assert parsed(USER | {"name": None}, turn(content="Sunny.", tool_calls=nothing))["messages"] == [USER, turn(content="Sunny.")]


@pytest.mark.parametrize(
    ("given", "wanted"), [('{"city": "Rome"}', {"city": "Rome"}), ({"city": "Rome"}, {"city": "Rome"}), ("", {}), (None, {}), ("{}", {})]
)
def test_arguments_become_an_object(given: Any, wanted: dict[str, Any]) -> None:
    [_, found] = parsed(USER, turn(tool_calls=[call(given, id="call_1")]))["messages"]
    assert found["tool_calls"] == [call(wanted, id="call_1")]


def test_a_call_may_be_the_function_itself() -> None:
    [_, found] = parsed(USER, turn(tool_calls=[{"name": "weather", "arguments": '{"city": "Rome"}'}]))["messages"]
    assert found["tool_calls"] == [{"name": "weather", "arguments": {"city": "Rome"}}]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_a_list_or_the_json_text_of_one(tools: Any) -> None:
    assert parsed(USER, turn(content="Sunny."), tools=tools)["tools"] == [TOOL]


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_no_tools_are_no_column(nothing: Any) -> None:
    assert "tools" not in parsed(USER, turn(content="Sunny."), tools=nothing, chat_template_kwargs=None)


def test_variables_of_the_template_are_an_object() -> None:
    found = parsed(USER, turn(content="Sunny."), chat_template_kwargs={"enable_thinking": False, "documents": []})
    assert found["chat_template_kwargs"] == {"enable_thinking": False, "documents": []}


@pytest.mark.parametrize(
    "message", [turn(), turn(content=None), turn(content=3), turn(content=[]), {"content": "x"}, "x", turn(tool_calls=[])]
)
def test_a_turn_without_text_or_calls_is_named(message: Any) -> None:
    assert "messages[1] must be" in refusal(USER, message)


@pytest.mark.parametrize(
    "calls", ["weather", [3], [{"type": "function"}], [{"function": {"name": 3}}], [{"function": None}], {"name": "weather"}]
)
def test_calls_of_no_function_are_named(calls: Any) -> None:
    assert "messages[1]: tool_calls must be a list of" in refusal(USER, turn(tool_calls=calls))


@pytest.mark.parametrize("arguments", ["Rome", "[1]", [1], 3, '"{}"', '{"city": "\\ud800"}'])
def test_arguments_that_are_no_object_are_named(arguments: Any) -> None:
    assert "messages[1]: the arguments of a call of weather must be an object" in refusal(USER, turn(tool_calls=[call(arguments)]))


@pytest.mark.parametrize("tools", ["weather", 3, {"name": "weather"}, [3], '{"name": "weather"}'])
def test_tools_that_are_no_list_are_named(tools: Any) -> None:
    assert "'tools' must be a list of functions" in refusal(USER, turn(content="Sunny."), tools=tools)


@pytest.mark.parametrize("variables", ["enable_thinking", [1], 3])
def test_variables_that_are_no_object_are_named(variables: Any) -> None:
    assert "'chat_template_kwargs' must be an object" in refusal(USER, turn(content="Sunny."), chat_template_kwargs=variables)


def test_a_variable_that_is_not_the_templates_is_named() -> None:
    assert "may not set chat_template, tokenize" in refusal(
        USER, turn(content="x"), chat_template_kwargs={"tokenize": True, "chat_template": "", "x": 1}
    )


@pytest.mark.parametrize("weight", [0, 1, 0.0, 1.0])
def test_an_answer_may_have_a_weight_of_0_or_1(weight: float) -> None:
    assert parsed(USER, turn(content="x", weight=weight))["messages"][1]["weight"] == weight


@pytest.mark.parametrize("weight", [2, 0.5, "0", [0]])
def test_another_weight_is_named(weight: Any) -> None:
    assert f"messages[1]: weight is {weight!r}, but an answer is trained (1) or not (0)" in refusal(USER, turn(content="x", weight=weight))


def test_everything_that_apply_chat_template_takes_for_itself_is_reserved() -> None:
    taken = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs", "documents"}
    assert len(taken) > 10
    assert taken | {"messages"} <= RESERVED
