"""What a row holds that a chat template renders: turns, tools and further variables, brought into the one form that templates read. Pure.

Called by dataset.py while it checks a row. Rows come in OpenAI's form (arguments as JSON text, content null beside tool calls), in transformers', and
as datasets stores either (tools as JSON text, null for whatever a turn lacks). Templates would escape a text twice, and print null as None.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]
TOOLS, VARIABLES = "tools", "chat_template_kwargs"
RESERVED = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""What decides how a template is rendered, and is no variable of it: a row must not bring a template of its own."""


class RowError(ValueError):
    """What is wrong with a row: a sentence that lacks file and line."""


def parse(values: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The row with its conversation, tools and variables in the form that templates read; tools and variables only where it has some.

    Args:
        values: the row.
        columns: those that hold messages.

    Raises:
        RowError: names the column and the turn.
    """
    rest = {name: value for name, value in values.items() if name not in (TOOLS, VARIABLES)}
    messages = {column: _messages(values[column], column) for column in columns}
    tools, variables = _tools(values.get(TOOLS)), _variables(values.get(VARIABLES))
    return rest | messages | ({TOOLS: tools} if tools else {}) | ({VARIABLES: variables} if variables else {})


def is_learnt(turn: Mapping[str, Any]) -> bool:
    """Whether it is an answer that is to be trained; OpenAI's rows keep one from it by a weight of 0."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def _messages(messages: Any, column: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise RowError(f'{column!r} must be a list of {{"role": ..., "content": ...}} with text contents.')
    return [_turn(message, f"{column}[{index}]") for index, message in enumerate(messages)]


def _turn(message: Any, place: str) -> dict[str, Any]:
    turn = {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else {}
    calls = turn.pop("tool_calls", None)
    if calls:
        turn["tool_calls"] = _calls(calls, place)
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content", "" if calls else None), str):
        raise RowError(
            f'{place} must be {{"role": ..., "content": ...}} with a text as content; only a turn with tool_calls may have none.'
        )
    if turn.get("weight", 1) not in (0, 1):
        raise RowError(f"{place}: weight is {turn['weight']!r}, but an answer is trained (1) or not (0); correct it.")
    return turn


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise RowError(f'{place}: tool_calls must be a list of {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}.')
    return [call | {"function": _function(call["function"], place)} if "function" in call else _function(call, place) for call in calls]


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _function(function: dict[str, Any], place: str) -> dict[str, Any]:
    arguments = _from_json(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise RowError(f"{place}: the arguments of a call of {function['name']} must be an object, or the JSON text of one.")
    return function | {"arguments": arguments}


def _tools(tools: Any) -> list[dict[str, Any]]:
    found = _from_json(tools or [])
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowError(f"{TOOLS!r} must be a list of functions, or the JSON text of one.")
    return found


def _variables(variables: Any) -> dict[str, Any]:
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise RowError(f"{VARIABLES!r} must be an object of the chat template's variables, but is {type(variables).__name__}.")
    if taken := sorted(RESERVED & set(variables)):
        raise RowError(f"{VARIABLES!r} may not set {', '.join(taken)}, which the training decides; remove it.")
    return variables


def _from_json(value: Any) -> Any:
    """What a text says; None where it is no JSON, or holds half of a surrogate pair."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return found
