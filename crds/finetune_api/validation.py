"""Offline verdicts on FineTuneJob YAML: the same that the API server gives, with path, what was found, what was expected and the mend.

Used by `finetune validate` and `finetune run`, and by the operator for specs that were stored before a schema change. Never raises on bad input.
"""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_api.fields import ApiModel, nested_model
from finetune_api.rules import ALWAYS, LOCAL_ONLY, SERVER_ONLY, Rule, value_at
from finetune_api.spec import API_VERSION, KIND, FineTuneJobSpec

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME_LIMIT = 253
_SHOWN = 80
_SECTIONS = ("apiVersion", "kind", "metadata", "spec", "status")
_MOST_VALUES = 10_000
_GO_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: the field, such as spec.lora.rank.
        found: what stands there.
        expected: what should, and the mend.
    """

    path: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, but {self.expected}." if self.found else f"{self.path}: {self.expected}."


@dataclass(frozen=True)
class FineTuneJob:
    """One good document."""

    metadata: dict[str, Any]
    spec: FineTuneJobSpec


def verdicts(text: str, *, local: bool) -> list[Problem]:
    """Everything that is wrong with the documents of a YAML text; empty when all are good.

    Args:
        text: one or more YAML documents.
        local: for a run on this machine, where file:// is allowed and volumes of a cluster are not.
    """
    try:
        documents = _documents(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "document"
        return [Problem(where, "", f"not YAML ({getattr(error, 'problem', None) or 'unreadable'}); correct the syntax")]
    except RecursionError:
        return [Problem("document", "", "nested too deeply; a job has at most 6 levels")]
    except (ValueError, TypeError, LookupError, AttributeError):  # what PyYAML raises for `!!int x` and the like, and json for bytes
        return [
            Problem("document", "a value that JSON does not know", "strings, numbers, booleans, lists and objects are expected; correct it")
        ]
    if not documents:
        return [Problem("document", "nothing", f"a {KIND} is expected; write one")]
    several = len(documents) > 1
    problems = ((index, problem) for index, document in enumerate(documents) for problem in _document(document, local=local))
    return [Problem(f"document {index + 1}, {item.path}", item.found, item.expected) if several else item for index, item in problems]


def parse_job(text: str) -> FineTuneJob:
    """The one job of a YAML text that has no problem.

    Raises:
        ValueError: it has problems; ask `verdicts` first.
    """
    (document,) = _documents(text)
    return FineTuneJob(dict(document["metadata"]), parse_spec(document["spec"]))


def parse_spec(spec: dict[str, Any]) -> FineTuneJobSpec:
    """The spec of an object as JSON values.

    Raises:
        pydantic.ValidationError: it has another structure.
    """
    return FineTuneJobSpec.model_validate_json(json.dumps(spec), strict=True, by_alias=True, by_name=False)


def spec_problems(spec: Any, *, local: bool) -> list[Problem]:
    """Everything that is wrong with a spec as JSON values: its structure first, then the rules."""
    if not isinstance(spec, dict):
        return [Problem("spec", _shown(spec), "an object with model, dataset and outputs is expected")]
    nulls = [Problem(path, "null", "a value is expected; remove the field to have its default") for path in _nulls(spec, "spec")]
    if nulls:
        return nulls
    try:
        parse_spec(spec)
    except ValidationError as error:
        return [_from_pydantic(item) for item in _deepest(error.errors())]
    except (TypeError, ValueError):
        return [
            Problem("spec", "a value that JSON does not know", "strings, numbers, booleans, lists and objects are expected; quote dates")
        ]
    rules = (*ALWAYS, *(LOCAL_ONLY if local else SERVER_ONLY))
    return [_from_rule(rule, spec) for rule in rules if not rule.holds(spec)]


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it: a date is a string, and 2e-4 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_document(self, node: yaml.Node) -> Any:
        """One document; an alias of itself, or aliases of aliases without end, are refused before anything walks through them."""
        if _expanded_size(node, {}) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "the aliases expand to too much", node.start_mark)
        return super().construct_document(node)


# PyYAML wants a point and a sign in the exponent. Last of the patterns, so that what is a whole number for both stays one.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _GO_FLOAT, list("-+.0123456789"))


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds with its aliases written out."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MOST_VALUES  # for an alias inside of what it names
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    inner = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
    known[id(node)] = 1 + sum(_expanded_size(part, known) for part in inner)
    return known[id(node)]


def _documents(text: str) -> list[Any]:
    """The documents as JSON values, without empty ones."""
    loaded = [document for document in yaml.load_all(text, _Loader) if document is not None]
    as_json = json.loads(json.dumps(loaded))  # keys become strings, and escaped pairs of surrogates one character
    json.dumps(as_json, ensure_ascii=False).encode()  # a lone surrogate is no text
    return list(as_json)


def _document(document: Any, *, local: bool) -> Iterator[Problem]:
    if not isinstance(document, dict):
        yield Problem("document", _shown(document), f"an object with apiVersion: {API_VERSION} and kind: {KIND} is expected")
        return
    for field, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if document.get(field) != wanted:
            yield Problem(field, _shown(document.get(field)), f"{wanted} is expected; correct it")
    yield from _metadata(document.get("metadata"))
    for field in [field for field in document if field not in _SECTIONS]:
        yield Problem(field, "an unknown field", "a job has apiVersion, kind, metadata and spec; remove it")
    if "spec" not in document:
        yield Problem("spec", "nothing", "model, dataset and outputs are expected; add it")
    else:
        yield from spec_problems(document["spec"], local=local)


def _metadata(metadata: Any) -> Iterator[Problem]:
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        yield Problem("metadata.name", _shown(name), "a name is expected; add one")
    elif not _NAME.fullmatch(name) or len(name) > _NAME_LIMIT:
        yield Problem(
            "metadata.name", _shown(name), f"lower-case letters, digits, '-' and '.' are expected, at most {_NAME_LIMIT} of them; change it"
        )


def _from_rule(rule: Rule, spec: dict[str, Any]) -> Problem:
    found = value_at(spec, rule.field)
    return Problem(f"spec.{rule.field}", "" if found is None else _shown(found), rule.message)


def _deepest(errors: list[Any]) -> list[Any]:
    """Without the errors of a list that only repeat that an item of it is wrong."""
    return [
        error
        for error in errors
        if not any(len(other["loc"]) > len(error["loc"]) and other["loc"][: len(error["loc"])] == error["loc"] for other in errors)
    ]


def _from_pydantic(error: Any) -> Problem:
    path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(path, "", f"unknown field; {_did_you_mean(error['loc'])}")
    if kind == "missing":
        return Problem(path, "nothing", "this field has no default; add it")
    return Problem(path, _shown(error["input"]), _expectation(kind, context, error["msg"]))


def _expectation(kind: str, context: dict[str, Any], message: str) -> str:
    sentences = {
        "string_pattern_mismatch": "the form {pattern} is expected; correct it",
        "string_too_long": "at most {max_length} characters are allowed; shorten it",
        "too_short": "at least {min_length} item is expected; add one",
        "too_long": "at most {max_length} items are allowed; remove some",
        "greater_than_equal": "{ge} or more is expected; raise it",
        "less_than_equal": "{le} or less is expected; lower it",
        "string_type": "a string is expected; put it in quotes",
        "int_type": "a whole number is expected; write one without quotes",
        "bool_type": "true or false is expected; write one of the two without quotes",
        "model_type": "an object is expected; write its fields below it",
        "dict_type": "an object is expected; write its fields below it",
        "tuple_type": "a list is expected; write one item a line, each after '- '",
        "literal_error": "one of {expected} is expected; choose one",
        "enum": "one of {expected} is expected; choose one",
    }
    return sentences[kind].format(**context) if kind in sentences else f"{message[:1].lower()}{message[1:]}; correct it"


def _did_you_mean(location: tuple[str | int, ...]) -> str:
    *parents, name = [part for part in location if isinstance(part, str)]
    model: type[ApiModel] | None = FineTuneJobSpec
    for parent in parents:
        model = _child(model, parent)
    known = [info.alias or key for key, info in model.model_fields.items()] if model else []
    close = difflib.get_close_matches(name, known, 1)
    return f"rename it to {close[0]}" if close else f"the fields here are {', '.join(known)}; remove it"


def _child(model: type[ApiModel] | None, name: str) -> type[ApiModel] | None:
    fields = model.model_fields.items() if model else ()
    return next((nested_model(info.annotation) for key, info in fields if name in (info.alias, key)), None)


def _nulls(value: Any, path: str) -> Iterator[str]:
    if value is None:
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nulls(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls(item, f"{path}[{index}]")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
