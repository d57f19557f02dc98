"""The offline verdicts: each names the field, what stands there and the mend; and no text makes them raise."""

import json
from typing import Any

import pytest
import yaml
from finetune_api.fields import leaves, marks_of
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import Problem, parse_job, spec_problems, verdicts
from hypothesis import example, given
from hypothesis import strategies as st
from support.bad_specs import BAD_SPECS, LAPTOP_ONLY, NOT_YET, RULES, STRICTER_OFFLINE, STRUCTURE, BadSpec
from support.mutations import mutated
from support.specs import changed, full_spec, job, minimal_spec

GOOD = yaml.safe_dump(job(minimal_spec()))
NOT_YET_FIELDS = {".".join(path) for path, info, _ in leaves(FineTuneJobSpec) if "notYet" in marks_of(info)}


def sentences(text: str, *, local: bool = False) -> list[str]:
    """The verdicts as a terminal shows them: they must be text that can be printed."""
    found = [str(problem) for problem in verdicts(text, local=local)]
    assert all(sentence.encode() for sentence in found)
    return found


def of_job(**changes: Any) -> str:
    return yaml.safe_dump(job(minimal_spec()) | changes)


def quoted(spec: Any, name: str = "test") -> str:
    """A job as YAML whose strings are in quotes; PyYAML writes 5e-5 without, which kubectl takes for a number."""
    return json.dumps(job(spec, name))


def with_line(line: str) -> str:
    """A good job with one more line of YAML in its spec."""
    return f"{GOOD}  {line}\n"


REFUSED = BAD_SPECS | STRICTER_OFFLINE
each_bad = pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED.keys())


def test_the_table_is_a_table() -> None:
    assert len(STRUCTURE) >= 25
    assert len(RULES) >= 20


@each_bad
def test_a_bad_spec_has_one_problem_at_its_field(bad: BadSpec) -> None:
    (problem,) = spec_problems(bad.spec, local=False)
    assert problem.path == bad.path


@each_bad
def test_a_bad_specs_sentence_says_what_is_expected(bad: BadSpec) -> None:
    (sentence,) = sentences(quoted(bad.spec))
    assert sentence.startswith(f"{bad.path}: ")
    assert bad.sentence in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize("bad", NOT_YET.values(), ids=NOT_YET.keys())
def test_a_field_that_nothing_serves_yet_is_refused_on_a_laptop_too(bad: BadSpec) -> None:
    (problem,) = spec_problems(bad.spec, local=True)
    assert bad.sentence in str(problem)


def test_the_table_has_every_field_that_nothing_serves_yet() -> None:
    assert set(NOT_YET) == NOT_YET_FIELDS


@pytest.mark.parametrize("bad", LAPTOP_ONLY.values(), ids=LAPTOP_ONLY.keys())
def test_a_file_is_good_on_a_laptop_and_nowhere_else(bad: BadSpec) -> None:
    (problem,) = spec_problems(bad.spec, local=False)
    assert problem.path == bad.path
    assert bad.sentence in str(problem)
    assert spec_problems(bad.spec, local=True) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model.source", "pvc://claim/model"),
        ("dataset.source", "pvc://claim/rows.jsonl"),
        ("dataset.source", "configmap://rows/rows.jsonl"),
        ("dataset.evaluation.source", "configmap://rows/held-out.jsonl"),
    ],
)
def test_a_volume_is_good_in_a_cluster_and_nowhere_else(path: str, source: str) -> None:
    spec = changed(minimal_spec(), path, source)
    assert spec_problems(spec, local=False) == []
    (problem,) = spec_problems(spec, local=True)
    assert str(problem) == f'spec.{path}: found "{source}", but pvc:// and configmap:// work only in a cluster; use file:// here.'


def test_every_problem_of_a_spec_is_told_at_once() -> None:
    spec = changed(changed(minimal_spec(), "lora.rank", 0), "training.epochs", "one")
    assert [problem.path for problem in spec_problems(spec, local=False)] == ["spec.lora.rank", "spec.training.epochs"]


def test_a_problem_without_a_finding_is_a_sentence_too() -> None:
    assert str(Problem("spec.x", "", "remove it")) == "spec.x: remove it."


def test_what_was_found_is_shown_up_to_a_line() -> None:
    (sentence,) = sentences(of_job(spec=changed(minimal_spec(), "runPolicy.rerun", "x" * 5000)))
    assert len(sentence) < 200


def test_every_kind_of_white_space_is_told_apart_as_the_server_does() -> None:
    assert spec_problems(changed(minimal_spec(), "model.source", "s3://models/a\u2003b"), local=False) == []
    for control in ("\x00", "\t", "\x0b", " "):
        assert spec_problems(changed(minimal_spec(), "model.source", f"s3://models/a{control}b"), local=False)


@pytest.mark.parametrize("spec", [None, [], "x", 1, True], ids=repr)
def test_a_spec_that_is_no_object_is_said_so(spec: Any) -> None:
    (problem,) = spec_problems(spec, local=False)
    assert problem.path == "spec"
    assert problem.expected.startswith("an object with model, dataset and outputs is expected")


BAD_TEXTS: dict[str, tuple[str, str]] = {
    "nothing": ("", "document: found nothing, but a FineTuneJob is expected; write one."),
    "only a comment": ("# soon", "document: found nothing"),
    "no YAML": ("a: [", "not YAML"),
    "a tab": ("a:\n\tb: c", "line 2, column 1: not YAML (found character '\\t' that cannot start any token)"),
    "a control character": ("a: \x00", "not YAML"),
    "a tag of Python's": ("!!python/object:os.system {}", "not YAML"),
    "a list": ("- a", 'document: found ["a"], but an object with apiVersion'),
    "a word": ("hello", 'document: found "hello"'),
    "another version": (of_job(apiVersion="finetune.dev/v1"), 'apiVersion: found "finetune.dev/v1", but finetune.dev/v1alpha1 is expected'),
    "another kind": (of_job(kind="Job"), 'kind: found "Job", but FineTuneJob is expected'),
    "no metadata": (of_job(metadata=None), "metadata.name: found nothing, but a name is expected"),
    "metadata that is a word": (of_job(metadata="x"), "metadata.name: found nothing"),
    "a name with capitals": (of_job(metadata={"name": "Bot"}), 'metadata.name: found "Bot", but lower-case letters'),
    "a name that is a number": (of_job(metadata={"name": 5}), "metadata.name: found 5"),
    "a name that is too long": (of_job(metadata={"name": "x" * 254}), "at most 253 of them"),
    "a name with a line's end": (of_job(metadata={"name": "bot\n"}), 'metadata.name: found "bot\\n"'),
    "an unknown section": (of_job(sepc={}), "sepc: found an unknown field"),
    "no spec": ("{apiVersion: finetune.dev/v1alpha1, kind: FineTuneJob, metadata: {name: x}}", "spec: found nothing, but model, dataset"),
    "bytes": (GOOD.replace("hf://acme/tiny", "!!binary aGk="), "strings, numbers, booleans, lists and objects are expected"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_bad_document_has_one_problem(text: str, sentence: str) -> None:
    (found,) = sentences(text)
    assert sentence in found


def test_a_good_document_has_no_problem() -> None:
    assert sentences(GOOD) == []
    assert sentences(quoted(full_spec())) == []


def test_the_operators_status_is_no_problem() -> None:
    assert sentences(of_job(status={"phase": "Running"})) == []


def test_json_is_yaml() -> None:
    assert sentences(json.dumps(job(changed(minimal_spec(), "runPolicy.rerun", "😀")), indent=1)) == []


def test_a_date_is_a_string_as_it_is_for_kubectl() -> None:
    assert parse_job(with_line("runPolicy: {rerun: 2026-01-01}")).spec.run_policy.rerun == "2026-01-01"


def test_a_learning_rate_without_quotes_is_a_number_as_it_is_for_kubectl() -> None:
    (found,) = sentences(with_line("training: {learningRate: 2e-4}"))
    assert found == "spec.training.learningRate: found 0.0002, but a string is expected; put it in quotes."


@pytest.mark.parametrize("rate", ['"2e-4"', "'2e-4'", "!!str 2e-4"])
def test_a_learning_rate_in_quotes_is_a_string(rate: str) -> None:
    assert parse_job(with_line(f"training: {{learningRate: {rate}}}")).spec.training.learning_rate == "2e-4"


@pytest.mark.parametrize("number", ["2e4", "2E-4", "+2e-4", "-2e4", "1.5e3", ".5e3", "2.e3", "0.5", ".5", "08"])
def test_a_number_without_quotes_is_no_string(number: str) -> None:
    (found,) = sentences(with_line(f"runPolicy: {{rerun: {number}}}"))
    assert "a string is expected; put it in quotes" in found


@given(st.floats(allow_nan=False, allow_infinity=False).map(repr))
@example("1e-05")
@example("1e+16")
def test_every_number_as_python_writes_it_is_no_string(number: str) -> None:
    (found,) = sentences(with_line(f"runPolicy: {{rerun: {number}}}"))
    assert "a string is expected; put it in quotes" in found


@pytest.mark.parametrize("word", ["e5", "1e", "2e-", "1e5x", "x1e5", "1.2.3", ".", "-", "+.e3", "1-2", "2026-01-01", "1e5-1"])
def test_what_only_resembles_a_number_is_a_string(word: str) -> None:
    assert parse_job(with_line(f"runPolicy: {{rerun: {word}}}")).spec.run_policy.rerun == word


@pytest.mark.parametrize(("number", "value"), [("8", 8), ("+8", 8), ("0x10", 16), ("010", 8), ("0b11", 3), ("1_6", 16)])
def test_a_whole_number_stays_one(number: str, value: int) -> None:
    assert parse_job(with_line(f"lora: {{rank: {number}}}")).spec.lora.rank == value


def test_an_alias_is_what_it_names() -> None:
    lines = ["credentials: &keys {secretName: keys}", "credentials: *keys"]
    text = GOOD
    for source, line in zip(("source: s3://corpora/rows.jsonl", "source: hf://acme/tiny"), lines, strict=True):
        text = text.replace(source, f"{source}\n    {line}")
    assert parse_job(text).spec.model.credentials.secret_name == "keys"


def test_empty_documents_are_left_out() -> None:
    assert sentences(f"---\n---\n{GOOD}---\n") == []


def test_several_good_documents_have_no_problem() -> None:
    assert sentences(f"{GOOD}---\n{GOOD}") == []


def test_a_problem_names_its_document_when_there_are_several() -> None:
    (found,) = sentences(f"{GOOD}---\n{of_job(kind='Job')}")
    assert found == 'document 2, kind: found "Job", but FineTuneJob is expected; correct it.'


def test_problems_come_in_the_order_of_the_text() -> None:
    text = of_job(zeta=1, alpha=2, mid=3)
    assert sentences(text) == sentences(text)
    assert [sentence.partition(":")[0] for sentence in sentences(json.dumps(job(minimal_spec()) | {"zeta": 1, "alpha": 2, "mid": 3}))] == [
        "zeta",
        "alpha",
        "mid",
    ]


def test_a_good_document_is_parsed_with_its_metadata() -> None:
    parsed = parse_job(quoted(full_spec(), name="bot"))
    assert parsed.metadata == {"name": "bot"}
    assert parsed.spec.wire() == full_spec()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
# Whatever a YAML text can hold: keys that are no strings, dates, bytes.
YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates() | st.datetimes() | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.dates() | st.none() | st.integers() | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
SECTIONS = st.sampled_from([*sorted(FineTuneJobSpec.model_fields), "runPolicy", "source", "uri", "destinations"])


@given(JSON)
def test_no_json_makes_them_raise(value: Any) -> None:
    sentences(json.dumps(value))
    spec_problems(value, local=True)


@given(YAML_VALUES)
def test_no_yaml_value_makes_them_raise(value: Any) -> None:
    sentences(yaml.safe_dump(value))
    sentences(yaml.safe_dump(job(value)))


@given(st.dictionaries(SECTIONS, st.dictionaries(SECTIONS, YAML_VALUES, max_size=2) | YAML_VALUES, max_size=3))
def test_no_spec_makes_them_raise(spec: Any) -> None:
    sentences(yaml.safe_dump(job(minimal_spec() | spec)))


@given(st.text(st.characters(exclude_categories=())))
@example("!!int x")
@example('!!int ""')
@example("!!bool x")
@example("!!timestamp x")
@example("!!float x")
@example("1e400")
@example("1e400: 2e-4")
@example("!!float 1:2e3")
@example("2026-13-45")
@example("a: 2026-02-30")
@example("[" * 1500)
@example("a: &a [*a]")
@example("&a {spec: *a}")
@example("apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: x}\nspec: &a {lora: *a}\n")
@example("apiVersion: 0x" + "f" * 5000)
@example("1" * 5000)
@example("- {2026-01-01: x}")
@example("- {!!binary aGk=: x}")
@example('kind: "\\ud800"')
@example("a: \ud800")
@example("<<: 3")
@example("{=: 1}")
@example("- ? [a]\n  : b")
def test_no_text_makes_them_raise(text: str) -> None:
    assert sentences(text)
    assert sentences(text, local=True)


@given(st.text(max_size=5), st.integers(0, len(GOOD)), st.integers(0, 5))
def test_no_edit_of_a_good_text_makes_them_raise(inserted: str, start: int, removed: int) -> None:
    sentences(GOOD[:start] + inserted + GOOD[start + removed :])


@given(st.integers(0, 10_000))
def test_what_is_good_is_parsed(seed: int) -> None:
    spec = mutated(seed)
    if not spec_problems(spec, local=False):
        assert parse_job(json.dumps(job(spec))).spec.wire()


def test_many_aliases_are_refused_at_once() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    text = f"apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {{name: x}}\nspec: {{{bomb.replace(chr(10), ', ')}}}"
    assert "the aliases expand to too much" in sentences(text)[0]
