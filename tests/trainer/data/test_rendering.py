"""What of a row is trained: completions and their end-of-sequence token only, never a prompt nor what a template puts around an answer."""

from typing import Any

import pytest
from finetune_trainer.chat_template import Render, TemplateError
from finetune_trainer.conversation import Messages
from finetune_trainer.dataset import Form, Row
from finetune_trainer.errors import DataError
from finetune_trainer.rendering import Segment, is_conversation, preview, render
from hypothesis import given
from hypothesis import strategies as st

EOS = "</s>"
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<>/"), max_size=12)


def chatml(messages: Messages, generation_prompt: bool) -> str:
    """A template that ends a turn with the end-of-sequence token and a line end."""
    turns = "".join(f"<{item['role']}>{item['content']}{EOS}\n" for item in messages)
    return turns + ("<assistant>" if generation_prompt else "")


def without_eos(messages: Messages, generation_prompt: bool) -> str:
    """A template that ends no turn by itself."""
    return "".join(f"<{item['role']}>{item['content']}\n" for item in messages) + ("<assistant>" if generation_prompt else "")


def turns(*contents: str) -> Messages:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def rendered(form: Form, template: Render | None = None, **values: Any) -> list[Segment]:
    """The pieces of a row that is one example."""
    [segments] = render(Row(3, values), form, template, EOS, "rows.jsonl")
    return segments


def previews(template: Render, messages: Messages) -> list[str]:
    """The examples of a conversation."""
    return [preview(segments) for segments in render(Row(3, {"messages": messages}), "chat", template, EOS, "rows.jsonl")]


def trained(segments: list[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.trained]


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def test_a_text_is_trained_whole_with_its_end() -> None:
    assert rendered("text", text="Once.") == [Segment(f"Once.{EOS}", trained=True)]


@pytest.mark.parametrize("end", [EOS, f"{EOS}\n"])
def test_an_end_that_a_text_has_already_is_not_added_again(end: str) -> None:
    assert trained(rendered("text", text=f"Once.{end}")) == [f"Once.{end}"]
    assert trained(rendered("prompt-completion", prompt="1+1=", completion=f"2{end}")) == [f"2{end}"]
    assert trained(rendered("instruction", instruction="Add.", output=f"2{end}")) == [f"2{end}"]


def test_an_end_in_the_midst_of_a_text_is_none() -> None:
    assert trained(rendered("text", text=f"Once.{EOS}Twice.")) == [f"Once.{EOS}Twice.{EOS}"]


def test_a_text_is_never_put_into_a_template() -> None:
    assert rendered("text", chatml, text="Once.") == rendered("text", text="Once.")


def test_of_prompt_and_completion_the_completion_is_trained() -> None:
    assert rendered("prompt-completion", prompt="1+1=", completion="2") == [
        Segment("1+1=", trained=False),
        Segment(f"2{EOS}", trained=True),
    ]


def test_string_prompts_are_not_put_into_a_template() -> None:
    assert rendered("prompt-completion", chatml, prompt="1+1=", completion="2")[0].text == "1+1="


def test_an_instruction_without_a_template_gets_headings() -> None:
    segments = rendered("instruction", instruction="Add.", output="2")
    assert segments == [Segment("### Instruction:\nAdd.\n\n### Response:\n", trained=False), Segment(f"2{EOS}", trained=True)]


def test_an_instructions_input_stands_under_a_heading_of_its_own() -> None:
    prompt = rendered("instruction", instruction="Add.", input="1, 1", output="2")[0].text
    assert prompt == "### Instruction:\nAdd.\n\n### Input:\n1, 1\n\n### Response:\n"


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_input_adds_nothing(empty: str | None) -> None:
    assert rendered("instruction", instruction="Add.", input=empty, output="2") == rendered("instruction", instruction="Add.", output="2")


def test_an_instruction_with_a_template_becomes_a_conversation() -> None:
    segments = rendered("instruction", chatml, instruction="Add.", input="1, 1", output="2")
    assert preview(segments) == f"<user>Add.\n\n1, 1{EOS}\n<assistant>⟦2{EOS}⟧\n"


def test_of_a_conversation_the_answer_is_trained_up_to_its_end() -> None:
    assert preview(rendered("chat", chatml, messages=turns("Hi", "Hello"))) == f"<user>Hi{EOS}\n<assistant>⟦Hello{EOS}⟧\n"


def test_every_assistant_turn_is_trained() -> None:
    segments = rendered("chat", chatml, messages=turns("a", "b", "c", "d"))
    assert preview(segments) == f"<user>a{EOS}\n<assistant>⟦b{EOS}⟧\n<user>c{EOS}\n<assistant>⟦d{EOS}⟧\n"


def test_an_answer_of_weight_0_is_shown_and_not_trained() -> None:
    first, *others = turns("a", "b", "c", "d")
    messages = [first, others[0] | {"weight": 0}, *others[1:]]
    assert preview(rendered("chat", chatml, messages=messages)) == f"<user>a{EOS}\n<assistant>b{EOS}\n<user>c{EOS}\n<assistant>⟦d{EOS}⟧\n"


def test_a_system_turn_is_not_trained() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *turns("Hi", "Hello")]
    assert trained(rendered("chat", chatml, messages=messages)) == [f"Hello{EOS}"]


def test_a_question_behind_the_last_answer_is_left_out() -> None:
    assert text_of(rendered("chat", chatml, messages=turns("a", "b", "c"))) == text_of(rendered("chat", chatml, messages=turns("a", "b")))


def test_a_first_turn_of_the_assistant_is_trained() -> None:
    assert trained(rendered("chat", chatml, messages=turns("", "Hello")[1:])) == [f"<assistant>Hello{EOS}"]


def test_assistant_turns_of_a_prompt_are_given_and_not_trained() -> None:
    segments = rendered("prompt-completion", chatml, prompt=turns("a", "b", "c"), completion=turns("", "d")[1:])
    assert preview(segments) == f"<user>a{EOS}\n<assistant>b{EOS}\n<user>c{EOS}\n<assistant>⟦d{EOS}⟧\n"


def test_a_template_that_ends_no_turn_gets_an_end_that_is_trained() -> None:
    assert trained(rendered("chat", without_eos, messages=turns("Hi", "Hello"))) == [f"Hello\n{EOS}"]


def test_where_a_template_ends_no_turn_only_the_last_one_gets_an_end() -> None:
    messages = turns("a", "b", "c", "d")
    segments = rendered("chat", without_eos, messages=messages)
    assert trained(segments) == ["b\n", f"d\n{EOS}"]
    assert text_of(segments) == without_eos(messages, generation_prompt=False) + EOS


def test_where_a_template_ends_the_last_turn_alone_nothing_is_added() -> None:
    def ends_once(messages: Messages, generation_prompt: bool) -> str:
        return without_eos(messages, generation_prompt) + ("" if generation_prompt or len(messages) < 4 else f"{EOS}\n")

    messages = turns("a", "b", "c", "d")
    segments = rendered("chat", ends_once, messages=messages)
    assert trained(segments) == ["b\n", f"d\n{EOS}"]
    assert text_of(segments) == ends_once(messages, generation_prompt=False)


def test_where_the_generation_prompt_opens_more_than_the_answer_holds_the_header_is_trained_with_it() -> None:
    def thinking(messages: Messages, generation_prompt: bool) -> str:
        return without_eos(messages, generation_prompt=False) + ("<assistant><think>" if generation_prompt else "")

    assert trained(rendered("chat", thinking, messages=turns("Hi", "Hello"))) == [f"<assistant>Hello\n{EOS}"]


@given(contents=st.lists(TEXT, min_size=2, max_size=6).filter(lambda items: len(items) % 2 == 0))
def test_the_pieces_of_a_conversation_are_its_text_and_the_trained_ones_its_answers(contents: list[str]) -> None:
    messages = turns(*contents)
    segments = rendered("chat", chatml, messages=messages)
    assert text_of(segments) == chatml(messages, generation_prompt=False)
    assert trained(segments) == [f"{answer}{EOS}" for answer in contents[1::2]]


@pytest.mark.parametrize(
    ("form", "values"),
    [("chat", {"messages": turns("a", "b")}), ("prompt-completion", {"prompt": turns("a"), "completion": turns("", "b")[1:]})],
)
def test_conversations_without_a_template_are_refused(form: Form, values: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"rows\.jsonl holds conversations, but the model has no chat template; use an instruction-tuned model"
    ):
        rendered(form, **values)


def thinks_once(messages: Messages, generation_prompt: bool) -> str:
    """A template that puts a thought in front of the last turn alone, if that is an answer."""
    *before, last = messages
    return chatml([*before, last | {"content": f"(){last['content']}"} if last["role"] == "assistant" else last], generation_prompt)


def test_where_a_template_writes_earlier_answers_otherwise_each_is_an_example_of_its_own() -> None:
    assert previews(thinks_once, turns("a", "b", "c", "d")) == [
        f"<user>a{EOS}\n<assistant>⟦()b{EOS}⟧\n",
        f"<user>a{EOS}\n<assistant>b{EOS}\n<user>c{EOS}\n<assistant>⟦()d{EOS}⟧\n",
    ]


def test_a_row_of_one_answer_is_one_example_whatever_the_template_does_to_earlier_ones() -> None:
    messages = turns("a", "b", "c", "d")
    segments = rendered("prompt-completion", thinks_once, prompt=messages[:3], completion=messages[3:])
    assert preview(segments) == f"<user>a{EOS}\n<assistant>b{EOS}\n<user>c{EOS}\n<assistant>⟦()d{EOS}⟧\n"


def test_an_end_behind_the_last_turn_alone_is_left_out_of_the_midst() -> None:
    def as_phi(messages: Messages, generation_prompt: bool) -> str:
        turns = "".join(f"<{item['role']}>{item['content']}<end>\n" for item in messages)
        return turns + ("<assistant>" if generation_prompt else EOS)

    assert previews(as_phi, turns("a", "b", "c", "d")) == [f"<user>a<end>\n<assistant>⟦b<end>\n⟧<user>c<end>\n<assistant>⟦d<end>\n{EOS}⟧"]


def test_where_the_last_turn_alone_has_an_end_each_answer_learns_it() -> None:
    def as_gpt_oss(messages: Messages, generation_prompt: bool) -> str:
        text = "".join(f"<{item['role']}>{item['content']}<end>" for item in messages)
        ends = not generation_prompt and messages[-1]["role"] == "assistant"
        return (text.removesuffix("<end>") + EOS if ends else text) + ("<assistant>" if generation_prompt else "")

    assert previews(as_gpt_oss, turns("a", "b", "c", "d")) == [
        f"<user>a<end><assistant>⟦b{EOS}⟧",
        f"<user>a<end><assistant>b<end><user>c<end><assistant>⟦d{EOS}⟧",
    ]


def test_a_template_that_rewrites_the_question_is_refused_with_the_line() -> None:
    def forgetful(messages: Messages, generation_prompt: bool) -> str:
        return chatml(messages[-2:], generation_prompt)

    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: the model's chat template writes the turns before turn 4 otherwise"):
        rendered("chat", forgetful, messages=turns("a", "b", "c", "d"))


def trimming(messages: Messages, generation_prompt: bool) -> str:
    """A template that trims its turns and reads no reasoning."""
    return chatml([message | {"content": message["content"].split("</think>")[-1].strip()} for message in messages], generation_prompt)


def test_white_space_around_an_answer_may_be_left_out() -> None:
    assert trained(rendered("chat", trimming, messages=turns("Hi", " Hello \n"))) == [f"Hello{EOS}"]


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ({"content": "<think>Greet.</think>Hello"}, "content"),
        ({"content": "Hello", "reasoning_content": "Greet."}, "reasoning_content"),
        ({"content": "Hello", "thinking": "Greet."}, "thinking"),
    ],
)
def test_an_answer_that_the_template_leaves_a_part_of_out_is_refused(answer: dict[str, str], part: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: the model's chat template does not render the whole {part} of turn 2"):
        rendered("chat", trimming, messages=[*turns("Hi"), {"role": "assistant", **answer}])


def test_a_question_that_has_the_answer_does_not_make_up_for_it() -> None:
    with pytest.raises(DataError, match="does not render the whole content of turn 2"):
        rendered("chat", trimming, messages=turns("<think>a</think>Hello", "<think>a</think>Hello"))


def test_the_generation_prompt_may_open_the_answer() -> None:
    def thinking(messages: Messages, generation_prompt: bool) -> str:
        return chatml(messages, generation_prompt) + ("<think>\n" if generation_prompt else "")

    assert trained(rendered("chat", thinking, messages=turns("Hi", "<think>\nGreet.</think>Hello"))) == [f"Greet.</think>Hello{EOS}"]


def test_what_the_template_leaves_out_of_a_given_turn_is_not_missed() -> None:
    messages = [*turns("a", "<think>b</think>c", "d"), *turns("", "e")[1:]]
    segments = rendered("prompt-completion", trimming, prompt=messages[:3], completion=messages[3:])
    assert preview(segments) == f"<user>a{EOS}\n<assistant>c{EOS}\n<user>d{EOS}\n<assistant>⟦e{EOS}⟧\n"


def test_a_call_that_the_template_leaves_out_of_several_is_refused() -> None:
    def first_call_alone(messages: Messages, generation_prompt: bool) -> str:
        calls = (message["content"] + message.get("tool_calls", [{"name": ""}])[0]["name"] for message in messages)
        return chatml([message | {"content": text} for message, text in zip(messages, calls, strict=True)], generation_prompt)

    calls = [{"name": "weather", "arguments": {}}, {"name": "traffic", "arguments": {}}]
    with pytest.raises(DataError, match="does not render the whole call of traffic of turn 2"):
        rendered("chat", first_call_alone, messages=[*turns("Hi"), {"role": "assistant", "content": "", "tool_calls": calls}])


def test_an_answer_with_an_end_in_its_midst_is_refused() -> None:
    with pytest.raises(DataError, match=rf"line 3: turn 2 holds the end-of-sequence token {EOS} in its midst"):
        rendered("chat", chatml, messages=turns("Hi", f"Hello{EOS}you"))
    assert trained(rendered("chat", chatml, messages=turns("Hi", f"Hello{EOS}"))) == [f"Hello{EOS}"]


def test_a_conversation_that_the_template_refuses_is_refused_with_the_line() -> None:
    def strict(messages: Messages, generation_prompt: bool) -> str:
        raise TemplateError("roles must alternate", refused=True)

    with pytest.raises(
        DataError,
        match=r"rows\.jsonl, line 3: the model's chat template refuses the conversation \(roles must alternate\); change its turns",
    ):
        rendered("chat", strict, messages=turns("a", "b"))


def test_a_template_that_fails_is_said_to_be_at_fault() -> None:
    def broken(messages: Messages, generation_prompt: bool) -> str:
        raise TemplateError("division by zero")

    with pytest.raises(
        DataError, match=r"line 3: the model's chat template fails on the conversation \(division by zero\); correct the template"
    ):
        rendered("chat", broken, messages=turns("a", "b"))


@pytest.mark.parametrize(
    ("form", "values", "with_template", "without"),
    [
        ("chat", {"messages": turns("a", "b")}, True, True),
        ("prompt-completion", {"prompt": turns("a"), "completion": turns("b")}, True, True),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, False, False),
        ("instruction", {"instruction": "a", "output": "b"}, True, False),
        ("text", {"text": "a"}, False, False),
    ],
)
def test_what_counts_as_a_conversation(form: Form, values: dict[str, Any], with_template: bool, without: bool) -> None:
    row = Row(1, values)
    assert (is_conversation(row, form, has_template=True), is_conversation(row, form, has_template=False)) == (with_template, without)


def test_a_preview_marks_what_is_trained() -> None:
    assert preview([Segment("ask ", trained=False), Segment("answer", trained=True), Segment("\n", trained=False)]) == "ask ⟦answer⟧\n"
