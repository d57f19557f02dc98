"""Rows become tokens: labels only on what is trained, what is cut off is counted, and the digest is exact."""

import signal
import tracemalloc
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import tokenizing
from finetune_trainer.batch import pad
from finetune_trainer.context import RunContext
from finetune_trainer.errors import DataError
from finetune_trainer.example import IGNORED, Example, chunks, cut
from finetune_trainer.rendering import Segment
from finetune_trainer.stages import data
from finetune_trainer.stages.data import Cuts, Data
from finetune_trainer.tokenizing import tokenize
from hypothesis import assume, given
from hypothesis import strategies as st
from support.exact_models import lora_opt
from support.run_contexts import context, notes, refused, run_spec
from support.tiny_model import sums, tiny_llama, tiny_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

TOKENIZER = tiny_tokenizer()
EOS_ID, PAD_ID = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
PIECES = st.lists(st.builds(Segment, st.text(st.characters(exclude_categories=("Cs",)), max_size=8), st.booleans()), min_size=1, max_size=5)
EXAMPLES = st.lists(
    st.lists(st.integers(0, 259), min_size=2, max_size=6).map(lambda ids: Example(tuple(ids), (IGNORED, *ids[1:]))), min_size=1, max_size=6
)


def example(length: int) -> Example:
    """An example that its length tells from others."""
    return Example(tuple(range(length)), tuple(range(length)))


def made(train: list[Example], held_out: list[Example]) -> Data:
    return Data(tuple(train), tuple(held_out), Cuts(), "text", "here", "", {}, "", (1,) * len(held_out), 0)


def run_context(folder: Path, rows: list[dict[str, Any]], *, max_length: int = 256, **evaluation: Any) -> RunContext:
    """A run on these rows, with 20 percent held out unless told otherwise."""
    path = write_jsonl(folder / "rows.jsonl", rows)
    spec = run_spec(dataset=f"file://{path}", training={"maxLength": max_length})
    spec["dataset"]["evaluation"] = evaluation or {"percent": 20}
    return context(folder, spec)


def run(folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast = TOKENIZER, **options: Any) -> Data:
    return data.run(run_context(folder, rows, **options), tokenizer)


def with_bos(*, chat: bool) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, putting a beginning-of-sequence token in front as Llama's does."""
    tokenizer = tiny_tokenizer(chat=chat)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def text_of(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(list(ids))


def test_a_row_longer_than_a_model_has_positions_is_refused() -> None:
    model = lora_opt(max_position_embeddings=16)
    data.require_known_tokens(made([example(16)], []), model)
    with refused(DataError, "longest row has 17 tokens", "model has 16 positions", "training.maxLength to 16"):
        data.require_known_tokens(made([example(4)], [example(17)]), model)


def test_positions_that_are_computed_have_no_end() -> None:
    data.require_known_tokens(made([example(17)], []), tiny_llama(max_position_embeddings=16))


def test_a_limit_that_has_no_step_to_compare_with_is_refused(tmp_path: Path) -> None:
    spec = run_spec(dataset=f"file://{write_jsonl(tmp_path / 'rows.jsonl', sums(10))}", quality={"maxLossIncreasePercent": "5"})
    with refused(DataError, "single optimizer step", "quality.maxLossIncreasePercent", "add rows or epochs"):
        data.make(context(tmp_path, spec), TOKENIZER)


def test_prompts_have_no_labels_and_completions_have_their_own_tokens() -> None:
    found = tokenize([Segment("ask", trained=False), Segment("tell", trained=True)], TOKENIZER, bos=False)
    assert found.labels[:3].tolist() == [IGNORED] * 3
    assert found.labels[3:] == found.input_ids[3:]
    assert text_of(found.input_ids) == "asktell"


@given(pieces=PIECES)
def test_a_label_is_its_token_or_nothing(pieces: list[Segment]) -> None:
    found = tokenize(pieces, TOKENIZER, bos=False)
    assert len(found.labels) == len(found.input_ids)
    assert all(label in (IGNORED, token) for token, label in zip(found.input_ids, found.labels, strict=True))


@given(pieces=PIECES)
def test_the_tokens_with_labels_are_the_trained_text(pieces: list[Segment]) -> None:
    found = tokenize(pieces, TOKENIZER, bos=False)
    wanted = [token for piece in pieces if piece.trained for token in TOKENIZER(piece.text)["input_ids"]]
    assert [label for label in found.labels if label != IGNORED] == wanted


def test_a_beginning_token_stands_first_and_is_not_trained() -> None:
    tokenizer = with_bos(chat=False)
    found = tokenize([Segment("tell", trained=True)], tokenizer, bos=True)
    assert (found.input_ids[0], found.labels[0]) == (tokenizer.bos_token_id, IGNORED)
    assert len(found.input_ids) == 5


def test_a_token_across_the_border_of_prompt_and_completion_is_split_there() -> None:
    def joining(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text.replace("ab", "Ω")]}

    found = tokenize([Segment("xa", trained=False), Segment("bc", trained=True)], joining, bos=False)  # type: ignore[arg-type]
    assert found == Example(map(ord, "xabc"), (IGNORED, IGNORED, ord("b"), ord("c")))


def test_trained_tokens_leave_out_the_first_which_nothing_predicts() -> None:
    assert Example((1, 2, 3), (1, IGNORED, 3)).trained_tokens == 1


def test_a_token_takes_four_bytes_and_so_does_its_label() -> None:
    ids = list(range(1000, 2000))
    tracemalloc.start()
    try:
        kept = [Example(ids, ids) for _ in range(1000)]
        assert tracemalloc.get_traced_memory()[0] < 9 * 1000 * len(kept)
    finally:
        tracemalloc.stop()


def test_examples_of_the_same_tokens_and_labels_are_equal() -> None:
    assert {Example((1, 2), (IGNORED, 2)), Example([1, 2], [IGNORED, 2])} == {Example((1, 2), (IGNORED, 2))}
    assert Example((1, 2), (IGNORED, 2)) != Example((1, 2), (1, 2))
    assert repr(Example((1, 2), (IGNORED, 2))) == "Example([1, 2], [-100, 2])"


@given(ids=st.lists(st.integers(0, 259), min_size=1, max_size=100), longest=st.integers(8, 40), bos=st.booleans())
def test_the_parts_of_a_text_train_every_token_once_and_in_order(ids: list[int], longest: int, bos: bool) -> None:
    whole = Example([7, *ids], [IGNORED, *ids]) if bos else Example(ids, ids)
    parts = chunks(whole, longest, 7 if bos else None)
    assert all(len(part.input_ids) == longest for part in parts[:-1])
    assert 0 < len(parts[-1].input_ids) <= longest
    assert [token for part in parts for token in part.labels[1:]] == whole.labels[1:].tolist()
    assert [token for part in parts for token in part.input_ids[1:]] == whole.input_ids[1:].tolist()


@given(ids=st.lists(st.integers(0, 259), max_size=20), longest=st.integers(1, 25))
def test_a_row_is_cut_at_the_end(ids: list[int], longest: int) -> None:
    assert cut(Example(ids, ids), longest) == Example(ids[:longest], ids[:longest])


def test_padding_is_masked_and_never_trained() -> None:
    batch = pad([Example((5, 6, 7), (IGNORED, 6, 7)), Example((8,), (8,))], PAD_ID)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD_ID, PAD_ID]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_padded_batch_holds_every_example(lengths: list[int]) -> None:
    batch = pad([example(length) for length in lengths], PAD_ID)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    assert all(ids[:length] == list(range(length)) and set(labels[length:]) <= {IGNORED} for ids, labels, length in rows)


@given(train=EXAMPLES, held_out=EXAMPLES, row=st.integers(0, 5), place=st.integers(0, 5), label=st.booleans())
def test_any_other_token_or_label_is_another_digest(
    train: list[Example], held_out: list[Example], row: int, place: int, label: bool
) -> None:
    both = [*train, *held_out]
    row %= len(both)
    place %= len(both[row].input_ids)
    ids, labels = list(both[row].input_ids), list(both[row].labels)
    (labels if label else ids)[place] += 1
    other = [*both[:row], Example(tuple(ids), tuple(labels)), *both[row + 1 :]]
    assert made(other[: len(train)], other[len(train) :]).digest != made(train, held_out).digest


@given(examples=EXAMPLES)
def test_the_border_between_rows_is_part_of_the_digest(examples: list[Example]) -> None:
    assume(len(examples) > 1)
    joined = Example([*examples[0].input_ids, *examples[1].input_ids], [*examples[0].labels, *examples[1].labels])
    assert made([joined, *examples[2:]], []).digest != made(examples, []).digest


@given(examples=EXAMPLES)
def test_what_is_held_out_is_part_of_the_digest(examples: list[Example]) -> None:
    assert made(examples, []).digest != made(examples[:-1], examples[-1:]).digest


def test_the_digest_is_the_same_in_every_process() -> None:
    assert made([example(3)], [example(2)]).digest == "d9ada668196d405abbf78c86aedca7000ade8eb5e0a6d72373d7b4bbb4902135"


def test_a_run_trains_on_answers_and_their_end_alone(tmp_path: Path) -> None:
    found = run(tmp_path, sums(10))
    assert (len(found.train), len(found.held_out), found.cuts, found.form) == (8, 2, Cuts(), "instruction")
    for item in (*found.train, *found.held_out):
        trained = tuple(label for label in item.labels if label != IGNORED)
        assert trained[-1] == EOS_ID
        assert " make " in text_of(trained)
        assert "?" not in text_of(trained)


def test_a_run_shows_the_first_example_with_its_marks(tmp_path: Path) -> None:
    ctx = run_context(tmp_path, sums(10))
    found = data.run(ctx, TOKENIZER)
    assert found.preview == "<|im_start|>user\n0 + 0?<|im_end|>\n<|im_start|>assistant\n⟦0 and 0 make 0.<|im_end|>⟧\n"
    assert any(found.preview in note for note in notes(ctx))


def test_a_pods_log_holds_no_row(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec(dataset="builtin://python-docs", training={"maxLength": 2048}), in_cluster=True)
    found = data.run(ctx, TOKENIZER)
    assert "⟦" in found.preview
    assert not any("⟦" in note for note in notes(ctx))


def test_the_same_rows_give_the_same_digest_and_other_rows_another(tmp_path: Path) -> None:
    digests = []
    for index, rows in enumerate((sums(10), sums(10), sums(11))):
        (tmp_path / str(index)).mkdir()
        digests.append(run(tmp_path / str(index), rows).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_template_that_prints_the_date_gives_the_same_tokens_on_every_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: " + str(tokenizer.chat_template)
    made = []
    for day in (1, 2):
        (tmp_path / str(day)).mkdir()
        clock = type("Clock", (), {"now": lambda day=day: datetime(2031, 5, day)})
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        made.append(run(tmp_path / str(day), sums(10), tokenizer))
        assert chat_template_utils.datetime is clock
    assert made[0].digest == made[1].digest
    assert made[0].preview.startswith("26 Jul 2024: ")


def test_rows_whose_completion_is_cut_off_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * length, "completion": "yes"} for length in (10, 12, 16, 40)]
    ctx = run_context(tmp_path, rows, max_length=16, percent=0)
    found = data.run(ctx, TOKENIZER)
    assert (len(found.train), found.cuts) == (2, Cuts(dropped=2, cut=0, tokens=8))
    [note] = [note for note in notes(ctx) if "training.maxLength" in note]
    assert "2 rows were dropped: nothing of their completion fits into training.maxLength (16 tokens)." in note
    assert "8 tokens of them would have been trained" in note


def test_rows_that_lose_their_end_are_counted_with_what_they_lose(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * length, "completion": "yes"} for length in (10, 12, 13, 15, 16)]
    ctx = run_context(tmp_path, rows, max_length=16, percent=0)
    found = data.run(ctx, TOKENIZER)
    assert (len(found.train), found.cuts) == (4, Cuts(dropped=1, cut=2, tokens=1 + 3 + 4))
    assert [item.input_ids[-1] == EOS_ID for item in found.train] == [True, True, False, False]
    [note] = [note for note in notes(ctx) if "training.maxLength" in note]
    assert "2 rows were cut at training.maxLength (16 tokens) and do not learn where to end." in note
    assert "8 tokens of them would have been trained" in note


def test_what_is_cut_off_and_was_not_to_be_trained_is_no_loss(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    whole = len(run(tmp_path, sums(1), tokenizer, max_length=256).train[0].input_ids)
    found = run(tmp_path, sums(1), tokenizer, max_length=whole - 1)  # without the line end behind the last turn
    assert (len(found.train[0].input_ids), found.cuts) == (whole - 1, Cuts())


def test_cut_rows_of_the_held_out_file_are_counted_too(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "p" * 15, "completion": "yes"}])
    ctx = run_context(tmp_path, [{"prompt": "p" * 14, "completion": "yes"}], max_length=16, source=f"file://{held_out}")
    assert data.make(ctx, TOKENIZER).cuts == Cuts(dropped=0, cut=2, tokens=5)


def test_a_text_longer_than_a_row_becomes_several(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(40))
    ctx = run_context(tmp_path, [{"text": text}, {"text": "short"}], max_length=16, percent=0)
    found = data.make(ctx, TOKENIZER)
    assert [text_of(item.input_ids) for item in found.train] == [text[:16], text[15:31], f"{text[30:]}<|im_end|>", "short<|im_end|>"]
    assert found.cuts == Cuts()
    assert any("2 rows became 4 examples of at most training.maxLength (16 tokens)" in note for note in notes(ctx))


def test_a_template_that_loops_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its ranges is within what the sandbox allows."""
    monkeypatch.setattr(tokenizing, "RENDER_SECONDS", 0.2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)  # pytest-timeout's
    with pytest.raises(
        DataError, match=r"line 1: the model's chat template fails on the conversation \(it is not done after 0\.2 s\); correct"
    ):
        run(tmp_path, sums(4), tokenizer)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == bool(timer[0])


def test_each_part_of_a_text_begins_as_a_text_does(tmp_path: Path) -> None:
    tokenizer = with_bos(chat=False)
    found = run(tmp_path, [{"text": "x" * 40}], tokenizer, max_length=16).train
    assert [len(item.input_ids) for item in found] == [16, 16, 12]
    assert {(item.input_ids[0], item.labels[0]) for item in found} == {(tokenizer.bos_token_id, IGNORED)}
    assert sum(item.trained_tokens for item in found) == 41


def test_the_parts_of_a_text_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    found = run(tmp_path, [{"text": letter * 40} for letter in "abcdefghij"], max_length=16)
    sides = [{text_of(item.input_ids)[0] for item in side} for side in (found.train, found.held_out)]
    assert (len(sides[0]), len(sides[1])) == (8, 2)
    assert sides[0].isdisjoint(sides[1])
    assert found.held_out_rows == (3, 3)


def test_rows_that_are_all_cut_off_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row has a completion that fits into training\.maxLength \(16 tokens\); raise it or shorten"):
        run(tmp_path, [{"prompt": "p" * 20, "completion": "yes"}], max_length=16)


@pytest.mark.parametrize(("count", "told"), [(5, True), (6, False)])
def test_too_few_held_out_rows_for_any_significance_are_told(count: int, told: bool, tmp_path: Path) -> None:
    spec = run_spec(dataset=f"file://{write_jsonl(tmp_path / 'rows.jsonl', sums(20))}")
    spec["dataset"]["evaluation"] = {"source": f"file://{write_jsonl(tmp_path / 'held.jsonl', sums(20 + count)[20:])}"}
    ctx = context(tmp_path, spec)
    data.make(ctx, TOKENIZER)
    assert any(note.startswith(f"Only {count} rows are held out") for note in notes(ctx)) == told


def test_held_out_data_of_its_own_is_not_trained_on(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", sums(3))
    found = run(tmp_path, sums(10), source=f"file://{held_out}")
    assert (len(found.train), len(found.held_out)) == (10, 3)
    assert found.held_out_resolved


def test_a_beginning_token_is_added_where_no_template_brings_it(tmp_path: Path) -> None:
    tokenizer = with_bos(chat=False)
    found = run(tmp_path, sums(4), tokenizer)
    assert {item.input_ids[:2].tolist().count(tokenizer.bos_token_id) for item in found.train} == {1}


@pytest.mark.parametrize(
    "row", [{"text": "<|im_start|>Once."}, {"prompt": "<|im_start|>1+1=", "completion": "2"}, {"prompt": "", "completion": "<|im_start|>2"}]
)
def test_a_beginning_token_is_not_added_to_a_text_that_has_it(row: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = with_bos(chat=False)
    [found] = run(tmp_path, [row], tokenizer).train
    assert found.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert found.input_ids[0] == tokenizer.bos_token_id


def test_a_text_that_is_rendered_already_has_one_beginning_and_one_end(tmp_path: Path) -> None:
    tokenizer = with_bos(chat=True)
    text = "<|im_start|>user\nHi<|im_end|>\n"
    [found] = run(tmp_path, [{"text": text}], tokenizer).train
    assert tokenizer.decode(found.input_ids.tolist()) == text


def test_a_beginning_token_is_not_added_to_what_a_template_has_rendered(tmp_path: Path) -> None:
    tokenizer = with_bos(chat=True)
    found = run(tmp_path, sums(4), tokenizer)
    assert {item.input_ids[:2].tolist().count(tokenizer.bos_token_id) for item in found.train} == {1}


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        run(tmp_path, sums(4), tokenizer)


def test_chat_rows_for_a_model_without_a_template_are_refused(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(DataError, match="the model has no chat template"):
        run(tmp_path, [{"messages": messages}], tiny_tokenizer(chat=False))


def test_a_templates_own_refusal_reaches_the_user_with_the_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only one system turn') }}"
    with pytest.raises(DataError, match=r"line 1: the model's chat template refuses the conversation \(only one system turn\)"):
        run(tmp_path, sums(4), tokenizer)
