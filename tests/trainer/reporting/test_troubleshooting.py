"""docs/troubleshooting.md is the generated page, has every error class and every hint, and quotes only what the code says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import finetune_trainer
import pytest
from finetune_trainer import errors
from finetune_trainer.errors import FineTuneError
from finetune_trainer.results.hints import hints
from finetune_trainer.troubleshooting import DOCS_FILE, TOPICS, Symptom, markdown
from support.slow_runs import CASES

SYMPTOMS = [(topic, symptom) for topic, symptoms in TOPICS.items() for symptom in symptoms]


def literals() -> Iterator[str]:
    """Every text in the trainer's code but that of the page itself, with … for what is put into it."""
    for path in Path(finetune_trainer.__file__).parent.rglob("*.py"):
        if path.name == "troubleshooting.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_page_is_the_generated_one() -> None:
    assert DOCS_FILE.read_text(encoding="utf-8") == markdown(), "run `make crd`"


def test_every_class_of_error_has_a_row_with_its_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FineTuneError)]
    assert len(kinds) >= 10
    for kind in kinds:
        assert (f"| {kind.__name__} | {kind.exit_code.value} | " in markdown()) == (kind is not FineTuneError)


@pytest.mark.parametrize(("topic", "symptom"), SYMPTOMS, ids=[f"{topic}: {symptom.says}" for topic, symptom in SYMPTOMS])
def test_each_sentence_is_one_that_the_code_says(topic: str, symptom: Symptom) -> None:
    assert any(symptom.says in text for text in TEXTS)
    assert symptom.why.endswith(".")
    assert symptom.mend.endswith(".")


def test_every_hint_about_a_slow_run_has_a_row() -> None:
    said = [sentence for _, run, _ in CASES for sentence in hints(run)]
    rows = [symptom.says.split("…")[0] for symptom in TOPICS["Slow training"]]
    assert {row for row in rows for sentence in said if sentence.startswith(row)} == set(rows)
    assert all(any(sentence.startswith(row) for row in rows) for sentence in said)


TEXTS = tuple(literals())
