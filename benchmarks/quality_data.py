"""The two data sets of `make bench-quality`, from text that Python and its packages ship: the same rows on every machine with the same versions.

docstrings: "What does `module.function(signature)` do?" -> the first paragraph of its docstring, from Python's own library.
bodies: a function of sympy with the first sentence of its docstring -> its body.
Sources are parsed, never imported. Nothing here overlaps with builtin://python-docs, on which the demo trains.
"""

import ast
import hashlib
import importlib.util
import json
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import rendering
from finetune_trainer.dataset import Row
from finetune_trainer.example import Example
from finetune_trainer.tokenizing import tokenize
from transformers import PreTrainedTokenizerBase

LONGEST_TOKENS = 112
_FEWEST_TRAINED = 8
_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "turtledemo"}
_Function = tuple[str, ast.FunctionDef]


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of one data set and seed.

    Attributes:
        train, held_out: drawn with the seed; no row is in both.
        digest: 16 hex digits over the text of the whole data set, before anything is drawn.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    digest: str


def rows(name: str, seed: int, train: int, held_out: int, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Draws rows of at most 112 tokens.

    Raises:
        ValueError: the data set has too few.
    """
    pairs = sorted(set(DATASETS[name]()))
    random.Random(f"{name} {seed}").shuffle(pairs)  # noqa: S311 reproducible, not secret
    examples: list[Example] = []
    for pair in pairs:
        example = _example(pair, tokenizer)
        if example is not None:
            examples.append(example)
        if len(examples) == train + held_out:
            return Rows(tuple(examples[held_out:]), tuple(examples[:held_out]), _digest(sorted(pairs)))
    raise ValueError(f"{name} has {len(examples)} rows of at most {LONGEST_TOKENS} tokens, but {train + held_out} are wanted.")


def docstrings() -> Iterator[tuple[str, str]]:
    """(question, first paragraph) of every documented function of Python's library."""
    for module, function in _functions(Path(sysconfig.get_path("stdlib"))):
        said = " ".join((ast.get_docstring(function) or "").split("\n\n")[0].split())
        yield f"What does `{module}.{function.name}({ast.unparse(function.args)})` do?\n", said


def bodies() -> Iterator[tuple[str, str]]:
    """(definition with the first paragraph of its docstring, body) of every documented function of sympy."""
    for module, function in _functions(_package("sympy")):
        said = " ".join((ast.get_docstring(function) or "").split("\n\n")[0].split())
        body = "\n".join(ast.unparse(statement) for statement in function.body[1:])
        if body:
            yield f"# {module}\ndef {function.name}({ast.unparse(function.args)}):\n# {said}\n", body


DATASETS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {"docstrings": docstrings, "bodies": bodies}


def _functions(root: Path) -> Iterator[_Function]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_LIBRARY & set(relative.parts) or path.name.startswith("test_"):
            continue
        module = ".".join(relative.with_suffix("").parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        yield from ((module, node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"The package {name} is not installed; run `make setup`.")
    return Path(spec.origin).parent


def _example(pair: tuple[str, str], tokenizer: PreTrainedTokenizerBase) -> Example | None:
    """None where the row is too long, or has too little to learn."""
    row = Row(1, {"prompt": pair[0], "completion": pair[1]})
    [pieces] = rendering.render(row, "prompt-completion", None, str(tokenizer.eos_token), "benchmark")
    example = tokenize(pieces, tokenizer, bos=False)
    return example if len(example.input_ids) <= LONGEST_TOKENS and example.trained_tokens >= _FEWEST_TRAINED else None


def _digest(pairs: list[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()[:16]
