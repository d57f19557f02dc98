"""Inputs that are wrong in one way each, of every kind: data, model, config, access, machine. One table, for tests of what a run says of them.

Each row makes its mistake in a folder that holds a good tiny job, and says which exit code and which words answer it. tests/support/bad_specs.py has
what the schema and the rules refuse, in full.
"""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.exits import ExitCode
from safetensors.torch import load_file, save_file
from support.hub_server import HubServer
from support.s3_server import S3Server
from support.tiny_model import tiny_tokenizer

OWNED = "owned"  # what malicious code would write
TURNS = '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
CHAT = f"{{{TURNS}}}\n"


@dataclass(frozen=True)
class Ground:
    """Where a mistake is made.

    Attributes:
        folder: holds model/, rows.jsonl and job.yaml.
        patch: for the environment.
        s3: a real S3 server whose keys are in the environment, for rows that need it,
        bucket: an empty bucket on it,
        hub: likewise a Hub, whose token is not in the environment.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    s3: S3Server | None = None
    bucket: str = ""
    hub: HubServer | None = None


Spoil = Callable[[Ground], dict[str, Any] | str]
"""Makes the mistake; returns changes of the spec, or the whole text of job.yaml."""


@dataclass(frozen=True)
class BadInput:
    """One row.

    Attributes:
        code: the exit code of `finetune run` and `finetune preflight`.
        words: parts of the sentence: the field or file, what was found, the mend.
        needs: "s3" or "hub", where a server takes part.
    """

    spoil: Spoil
    code: ExitCode
    words: tuple[str, ...]
    needs: str = ""


def _data(text: str | bytes, **dataset: Any) -> Spoil:
    def spoil(ground: Ground) -> dict[str, Any]:
        (ground.folder / "bad.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
        return {"dataset": {"source": f"file://{ground.folder}/bad.jsonl", **dataset}}

    return spoil


def _spec(**changes: Any) -> Spoil:
    return lambda _: changes


def _job(old: str, new: str) -> Spoil:
    return lambda ground: (ground.folder / "job.yaml").read_text().replace(old, new)


def _config(**changes: Any) -> Spoil:
    def spoil(ground: Ground) -> dict[str, Any]:
        path = ground.folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return {}

    return spoil


def _model(change: Callable[[Path], object]) -> Spoil:
    def spoil(ground: Ground) -> dict[str, Any]:
        change(ground.folder / "model")
        return {}

    return spoil


def _template(text: str) -> Spoil:
    def spoil(ground: Ground) -> dict[str, Any]:
        (ground.folder / "model" / "chat_template.jinja").write_text(text.replace("OWNED", str(ground.folder / OWNED)))
        (ground.folder / "bad.jsonl").write_text(CHAT * 4)
        return {"dataset": {"source": f"file://{ground.folder}/bad.jsonl"}}

    return spoil


def _no_dataset(ground: Ground) -> dict[str, Any]:
    return {"dataset": {"source": f"file://{ground.folder}/nowhere.jsonl"}}


def _no_held_out_file(ground: Ground) -> dict[str, Any]:
    return {"dataset": {"evaluation": {"source": f"file://{ground.folder}/nowhere.jsonl"}}}


def _bad_held_out_row(ground: Ground) -> dict[str, Any]:
    (ground.folder / "held.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    return {"dataset": {"evaluation": {"source": f"file://{ground.folder}/held.jsonl"}}}


def _a_folder_of_rows(ground: Ground) -> dict[str, Any]:
    return {"dataset": {"source": f"file://{ground.folder}/model"}}


def _a_file_as_model(ground: Ground) -> dict[str, Any]:
    return {"model": {"source": f"file://{ground.folder}/rows.jsonl"}}


def _no_model(ground: Ground) -> dict[str, Any]:
    return {"model": {"source": f"file://{ground.folder}/nowhere"}}


def _no_chat_template(ground: Ground) -> dict[str, Any]:
    tiny_tokenizer(chat=False).save_pretrained(ground.folder / "model")
    (ground.folder / "model" / "chat_template.jinja").unlink()
    (ground.folder / "chat.jsonl").write_text(CHAT * 4)
    return {"dataset": {"source": f"file://{ground.folder}/chat.jsonl"}}


def _gate_without_held_out_rows(ground: Ground) -> dict[str, Any]:
    changes = _data('{"instruction": "a", "output": "b"}\n')(ground)
    assert isinstance(changes, dict)
    return changes | {"quality": {"maxLossIncreasePercent": "5"}}


def _cut_off(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _lack_one(model: Path) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def _foreign_tokenizer(model: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["unused", " make "])
    tokenizer.save_pretrained(model)


def _no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def _no_end_of_sequence(model: Path) -> None:
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in {"eos_token", "pad_token"}}))


def _shards_that_are_not_there(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


class _Malice:
    """What a pickle makes of it is a call."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._target, "code ran")


def _pickle_alone(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Malice(model.parent / OWNED)))


def _pickle_beside_cut_off_weights(model: Path) -> None:
    _cut_off(model)
    torch.save(_Malice(model.parent / OWNED), model / "pytorch_model.bin")


def _code_of_its_own(model: Path) -> None:
    (model / "modeling.py").write_text(
        f"import pathlib\npathlib.Path({str(model.parent / OWNED)!r}).write_text('code ran')\nclass Model: ...\n"
    )
    path = model / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


def _tokenizer_with_code_of_its_own(model: Path) -> None:
    (model / "tokenization.py").write_text(
        f"import pathlib\npathlib.Path({str(model.parent / OWNED)!r}).write_text('code ran')\nclass Made: ...\n"
    )
    path = model / "tokenizer_config.json"
    changes = {"tokenizer_class": "Made", "auto_map": {"AutoTokenizer": ["tokenization.Made", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (model / "tokenizer.json").unlink()


def _foreign_destination(ground: Ground) -> dict[str, Any]:
    (ground.folder / "published").mkdir()
    (ground.folder / "published" / "thesis.txt").write_text("years of work")
    return {}


def _destination_around_the_run(ground: Ground) -> dict[str, Any]:
    return {"outputs": {"destinations": [{"uri": f"file://{ground.folder / 'work'}/published"}]}}


def _s3(uri: str, **keys: str) -> Spoil:
    """A destination on the S3 server."""

    def spoil(ground: Ground) -> dict[str, Any]:
        assert ground.s3
        for name, value in keys.items():
            ground.patch.setenv(name, value)
        return {"outputs": {"destinations": [{"uri": uri.format(bucket=ground.bucket), "endpoint": ground.s3.endpoint}]}}

    return spoil


def _s3_source(field: str, uri: str) -> Spoil:
    def spoil(ground: Ground) -> dict[str, Any]:
        assert ground.s3
        return {field: {"source": uri.format(bucket=ground.bucket), "endpoint": ground.s3.endpoint}}

    return spoil


def _s3_without_keys(ground: Ground) -> dict[str, Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        ground.patch.delenv(name)
    changes = _s3("s3://{bucket}/bot")(ground)
    assert isinstance(changes, dict)
    return changes


def _closed_endpoint(_: Ground) -> dict[str, Any]:
    return {"model": {"source": "s3://models/base", "endpoint": "http://127.0.0.1:1"}}


def _hub_destination(token: str) -> Spoil:
    def spoil(ground: Ground) -> dict[str, Any]:
        assert ground.hub
        known = {"read": ground.hub.read_token, "wrong": "hf_" + "x" * 24, "write": ground.hub.token}
        if token:
            ground.patch.setenv("HF_TOKEN", known[token])
        return {"outputs": {"destinations": [{"uri": "hf://other/bot" if token == "write" else "hf://acme/bot"}]}}

    return spoil


def _private_hub_model(ground: Ground) -> dict[str, Any]:
    assert ground.hub
    ground.hub.put("acme/secret", {"config.json": b"{}", "model.safetensors": b""}, private=True)
    return {"model": {"source": "hf://acme/secret"}}


def _hub_revision(ground: Ground) -> dict[str, Any]:
    assert ground.hub
    ground.hub.put("acme/base", {"config.json": b"{}", "model.safetensors": b""})
    return {"model": {"source": "hf://acme/base@nowhere"}}


def _hub_file(ground: Ground) -> dict[str, Any]:
    assert ground.hub
    ground.hub.put("acme/rows", {"rows.jsonl": b"{}"}, kind="dataset")
    return {"dataset": {"source": "hf://acme/rows/nowhere.jsonl"}}


def _a_file_as_workdir(ground: Ground) -> dict[str, Any]:
    (ground.folder / "work").write_text("years of work")
    return {}


_DATA = ExitCode.DATA
_SPEC = ExitCode.SPEC
_ACCESS = ExitCode.ACCESS
_CAPACITY = ExitCode.CAPACITY

DATA: dict[str, BadInput] = {
    "no dataset": BadInput(_no_dataset, _DATA, ("spec.dataset.source", "nowhere.jsonl", "does not exist; correct the path")),
    "a folder as dataset": BadInput(_a_folder_of_rows, _DATA, ("spec.dataset.source", "is a folder", "name the file")),
    "an empty dataset": BadInput(_data(""), _DATA, ("bad.jsonl", "is empty", "at least one row; check what wrote it")),
    "a dataset of empty lines": BadInput(_data("\n \n"), _DATA, ("bad.jsonl", "is empty", "at least one row; check what wrote it")),
    "a line that is cut off": BadInput(
        _data('{"instruction": "a", "output": "b"}\n{"instruction": \n'),
        _DATA,
        ("bad.jsonl", "line 2", "not JSON", "; write one JSON object a line"),
    ),
    "a JSON array over many lines": BadInput(
        _data('[\n{"text": "a"}\n]\n'), _DATA, ("bad.jsonl", "line 1", "not JSON", "; write one JSON object a line")
    ),
    "a row that is a list": BadInput(
        _data('["a", "b"]\n'), _DATA, ("bad.jsonl", "line 1", "is an array", "a row is an object; write it as")
    ),
    "Latin-1": BadInput(_data('{"text": "ä"}\n'.encode("latin-1")), _DATA, ("bad.jsonl", "not UTF-8", "save it as UTF-8")),
    "a Parquet file": BadInput(_data(b"PAR1\x15\x04\x15\xff\x80"), _DATA, ("bad.jsonl", "not UTF-8", "save it as UTF-8 JSON Lines")),
    "half of a surrogate pair": BadInput(
        _data('{"text": "\\ud800"}\n'), _DATA, ("line 1", "surrogate pair", "save the row as UTF-8 again")
    ),
    "unknown columns": BadInput(
        _data('{"question": "a", "answer": "b"}\n'), _DATA, ("bad.jsonl", "line 1", "answer, question", "rename the columns")
    ),
    "a row without its second column": BadInput(
        _data('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n'), _DATA, ("line 2", "no column 'completion'", "add it")
    ),
    "rows of another form than was said": BadInput(
        _data('{"text": "a"}\n', format="chat"), _DATA, ("line 1", "no column 'messages'", "form is chat", "set dataset.format")
    ),
    "a number where a text belongs": BadInput(
        _data('{"prompt": "1 + 1", "completion": 2}\n'), _DATA, ("line 1", "'completion' is a number", "a string is expected; write one")
    ),
    "messages that are one text": BadInput(
        _data('{"messages": "hello"}\n'), _DATA, ("line 1", "'messages' must be a list", "with text contents")
    ),
    "a conversation without an answer": BadInput(
        _data('{"messages": [{"role": "user", "content": "a"}]}\n'), _DATA, ("line 1", "no assistant turn", "add one or drop the row")
    ),
    "a turn without text": BadInput(
        _data('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}\n'),
        _DATA,
        ("bad.jsonl, line 1", "messages[1] must be", "with a text as content"),
    ),
    "arguments that are no object": BadInput(
        _data('{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]}\n'),
        _DATA,
        ("bad.jsonl, line 1", "messages[0]: the arguments of a call of f", "must be an object"),
    ),
    "tools that are one text": BadInput(
        _data(f'{CHAT}{{{TURNS}, "tools": "search"}}\n'), _DATA, ("bad.jsonl, line 2", "'tools' must be a list of functions")
    ),
    "a row that brings a template of its own": BadInput(
        _data(f'{CHAT}{{{TURNS}, "chat_template_kwargs": {{"chat_template": "x"}}}}\n'),
        _DATA,
        ("bad.jsonl, line 2", "'chat_template_kwargs' may not set chat_template", "remove it"),
    ),
    "tools that the model's template leaves out": BadInput(
        _data(f'{CHAT}{{{TURNS}, "tools": [{{"name": "f"}}]}}\n'),
        _DATA,
        ("bad.jsonl, line 2", "makes no use of the row's tools", "remove them"),
    ),
    "rows that are all too long": BadInput(
        _data('{"instruction": "%s", "output": "b"}\n' % ("a" * 200)), _DATA, ("bad.jsonl", "training.maxLength (64 tokens)", "raise it")
    ),
    "no held-out file": BadInput(
        _no_held_out_file, _DATA, ("spec.dataset.evaluation.source", "nowhere.jsonl", "does not exist; correct the path")
    ),
    "a held-out row without an answer": BadInput(
        _bad_held_out_row, _DATA, ("held.jsonl", "line 2", "no column 'output'", "add it or set dataset.format")
    ),
    "a gate without held-out rows": BadInput(
        _gate_without_held_out_rows, _DATA, ("bad.jsonl", "no row to hold out", "quality.maxLossIncreasePercent", "add rows")
    ),
    "conversations for a model without a chat template": BadInput(
        _no_chat_template, _DATA, ("chat.jsonl", "no chat template", "use an instruction-tuned model")
    ),
}

MODEL: dict[str, BadInput] = {
    "no model": BadInput(_no_model, _DATA, ("spec.model.source", "nowhere", "does not exist; correct the path")),
    "a file as model": BadInput(_a_file_as_model, _DATA, ("spec.model.source", "is a file", "name the folder")),
    "no config.json": BadInput(
        _model(lambda model: (model / "config.json").unlink()), _DATA, ("has no config.json", "must name the folder")
    ),
    "a config.json that is not JSON": BadInput(
        _model(lambda model: (model / "config.json").write_text("{")),
        _DATA,
        ("config.json", "not a JSON object", "download the model again"),
    ),
    "an unknown architecture": BadInput(
        _config(model_type="nonesuch"), _DATA, ("does not load", "nonesuch", "choose a model whose architecture transformers")
    ),
    "a model that is none of language": BadInput(
        _config(model_type="vit"), _DATA, ("of the type vit", "no causal language model; choose one that is")
    ),
    "weights that are quantized already": BadInput(
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        _DATA,
        ("is quantized already (bitsandbytes)", "set spec.model.source to the model that it was made from"),
    ),
    "weights that are cut off": BadInput(_model(_cut_off), _DATA, ("does not load", "header", "; download it again")),
    "weights that are empty": BadInput(
        _model(lambda model: (model / "model.safetensors").write_bytes(b"")), _DATA, ("does not load", "; download it again")
    ),
    "a weight that is missing": BadInput(
        _model(_lack_one), _DATA, ("lacks 1 weights", "model.layers.1.mlp.up_proj.weight", "download it again")
    ),
    "weights of other shapes": BadInput(
        _config(intermediate_size=96), _DATA, ("down_proj.weight", "has the shape 64 x 128", "makes it 64 x 96; download both")
    ),
    "no weights": BadInput(
        _model(lambda model: (model / "model.safetensors").unlink()), _DATA, ("no .safetensors file", "upload the weights as safetensors")
    ),
    "a shard that is missing": BadInput(
        _model(_shards_that_are_not_there), _DATA, ("does not load", "model-00002-of-00002.safetensors", "; download it again")
    ),
    "no tokenizer": BadInput(
        _model(_no_tokenizer),
        _DATA,
        ("The tokenizer in", "does not load", "; download it again, with every file that its save_pretrained writes"),
    ),
    "a tokenizer that is cut off": BadInput(
        _model(lambda model: (model / "tokenizer.json").write_text('{"version": ')),
        _DATA,
        ("The tokenizer in", "does not load", "; download it again"),
    ),
    "the tokenizer of another model": BadInput(
        _model(_foreign_tokenizer), _DATA, ("token 260, but the model knows 260 tokens only", "use the tokenizer that belongs to the model")
    ),
    "a tokenizer without an end": BadInput(
        _model(_no_end_of_sequence), _DATA, ("no end-of-sequence token", "set eos_token in its tokenizer_config.json")
    ),
    "pickled weights": BadInput(_model(_pickle_alone), _DATA, ("only as .bin", "can run code", "convert them to safetensors")),
    "pickled weights beside damaged ones": BadInput(
        _model(_pickle_beside_cut_off_weights), _DATA, ("does not load", "; download it again")
    ),
    "code of its own": BadInput(_model(_code_of_its_own), _SPEC, ("auto_map in config.json", "set spec.model.trustRemoteCode to true")),
    "a tokenizer with code of its own": BadInput(
        _model(_tokenizer_with_code_of_its_own), _SPEC, ("auto_map in tokenizer_config.json", "set spec.model.trustRemoteCode to true")
    ),
    "a chat template that looks for a way out": BadInput(
        _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        _DATA,
        ("line 1", "chat template fails", "unsafe", "; correct the template"),
    ),
    "a chat template that opens a file": BadInput(
        _template("{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}"),
        _DATA,
        ("line 1", "chat template fails", "; correct the template"),
    ),
    "a chat template that is not closed": BadInput(
        _template("{% for message in messages %}"), _DATA, ("line 1", "chat template fails", "; correct the template")
    ),
    "a chat template that counts for ever": BadInput(
        _template("{% for turn in range(10**9) %}{% endfor %}"),
        _DATA,
        ("line 1", "chat template fails", "Range too big", "; correct the template"),
    ),
    "a chat template that divides by zero": BadInput(
        _template("{{ 1 // 0 }}"), _DATA, ("line 1", "chat template fails", "zero", "; correct the template")
    ),
    "a chat template that calls itself": BadInput(
        _template("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"),
        _DATA,
        ("line 1", "chat template fails", "calls itself without end", "; correct the template"),
    ),
    "a chat template that wants all memory": BadInput(
        _template("{{ 'a' * 10**15 }}"), _DATA, ("line 1", "chat template fails", "; correct the template")
    ),
    "a chat template that drops the reasoning": BadInput(
        _template("{% for message in messages %}{{ message.content.split('b')[-1] }}<|im_end|>{% endfor %}"),
        _DATA,
        ("line 1", "does not render the whole content of turn 2", "remove from the row what it leaves out"),
    ),
    "a chat template that refuses": BadInput(
        _template("{{ raise_exception('no such roles') }}"), _DATA, ("line 1", "no such roles", "change its turns")
    ),
}

CONFIG: dict[str, BadInput] = {
    "a job that is not YAML": BadInput(lambda _: "spec: [\n", _SPEC, ("job.yaml", "not YAML", "correct the syntax")),
    "an empty job": BadInput(lambda _: "", _SPEC, ("job.yaml", "a FineTuneJob is expected; write one")),
    "another kind": BadInput(_job('"FineTuneJob"', '"Job"'), _SPEC, ("kind", '"Job"', "FineTuneJob is expected; correct it")),
    "no name": BadInput(_job('"name": "tiny"', '"names": "tiny"'), _SPEC, ("metadata.name", "a name is expected; add one")),
    "a name that Kubernetes does not take": BadInput(
        _job('"tiny"', '"My Job"'), _SPEC, ("metadata.name", "lower-case letters", "; change it")
    ),
    "a misspelt field": BadInput(_spec(lora={"rnak": 8}), _SPEC, ("spec.lora.rnak", "rename it to rank")),
    "a rank of nothing": BadInput(_spec(lora={"rank": 0}), _SPEC, ("spec.lora.rank", "found 0", "1 or more is expected; raise it")),
    "a learning rate without quotes": BadInput(
        _spec(training={"learningRate": 0.001}), _SPEC, ("spec.training.learningRate", "put it in quotes")
    ),
    "an unknown scheme": BadInput(
        _spec(quantization={"scheme": "int3"}), _SPEC, ("spec.quantization.scheme", "one of 'none', 'int8'", "; choose one")
    ),
    "a claim on a laptop": BadInput(
        _spec(model={"source": "pvc://models/base"}), _SPEC, ("spec.model.source", "pvc://models/base", "use file:// here")
    ),
    "an unknown builtin": BadInput(_spec(model={"source": "builtin://gpt"}), _SPEC, ("spec.model.source", "use builtin://smollm2-135m")),
    "a module that the model has not": BadInput(
        _spec(lora={"targetModules": "no_such_proj"}),
        _SPEC,
        ("spec.lora.targetModules", "no_such_proj", "; choose from its linear layers: ", "q_proj"),
    ),
    "the output head as a target": BadInput(
        _spec(lora={"targetModules": "q_proj,lm_head"}), _SPEC, ("spec.lora.targetModules", "'lm_head'", "leave it out")
    ),
    "a destination with other files": BadInput(
        _foreign_destination, _SPEC, ("spec.outputs.destinations[0].uri", "not an earlier publication", "choose a new folder")
    ),
    "a destination inside the working directory": BadInput(
        _destination_around_the_run, _SPEC, ("spec.outputs.destinations[0].uri", "lie in each other", "choose a folder outside")
    ),
}

ACCESS: dict[str, BadInput] = {
    "a bucket that is not there": BadInput(
        _s3("s3://no-such-bucket/bot"), _ACCESS, ("spec.outputs.destinations[0].uri", "the bucket does not exist", "create it"), "s3"
    ),
    "an unknown access key": BadInput(
        _s3("s3://{bucket}/bot", AWS_ACCESS_KEY_ID="nobody"), _ACCESS, ("destinations[0].uri", "correct AWS_ACCESS_KEY_ID"), "s3"
    ),
    "a wrong secret key": BadInput(
        _s3("s3://{bucket}/bot", AWS_SECRET_ACCESS_KEY="wrong"), _ACCESS, ("destinations[0].uri", "correct AWS_SECRET_ACCESS_KEY"), "s3"
    ),
    "no keys at all": BadInput(
        _s3_without_keys, _ACCESS, ("spec.outputs.destinations[0].uri", "no credentials were given", "set AWS_ACCESS_KEY_ID"), "s3"
    ),
    "a dataset that is not in its bucket": BadInput(
        _s3_source("dataset", "s3://{bucket}/nowhere.jsonl"), _DATA, ("spec.dataset.source", "does not exist; correct the key"), "s3"
    ),
    "a model that is not in its bucket": BadInput(
        _s3_source("model", "s3://{bucket}/nowhere"), _DATA, ("spec.model.source", "nothing lies under", "correct the prefix"), "s3"
    ),
    "a server that does not answer": BadInput(
        _closed_endpoint, ExitCode.INFRASTRUCTURE, ("spec.model.source", "could not be reached", "check the endpoint")
    ),
    "a Hub destination without a token": BadInput(
        _hub_destination(""), _ACCESS, ("spec.outputs.destinations[0].uri", "needs a Hub token", "; set HF_TOKEN"), "hub"
    ),
    "a Hub token that only reads": BadInput(
        _hub_destination("read"), _ACCESS, ("may not make hf://acme/bot", "give a token with write access", "HF_TOKEN"), "hub"
    ),
    "a Hub token that nobody knows": BadInput(
        _hub_destination("wrong"), _ACCESS, ("the Hub refused the token (401)", "give one that is valid", "HF_TOKEN"), "hub"
    ),
    "another account's repository": BadInput(
        _hub_destination("write"), _ACCESS, ("may not make hf://other/bot", "give a token with write access", "HF_TOKEN"), "hub"
    ),
    "a private model without a token": BadInput(
        _private_hub_model,
        _ACCESS,
        ("spec.model.source", "does not exist on the Hub, or is private, and no token was given", "correct the name", "HF_TOKEN"),
        "hub",
    ),
    "a revision that is not there": BadInput(_hub_revision, _DATA, ("spec.model.source", "no such revision", "correct the branch"), "hub"),
    "a file that is not in its repository": BadInput(_hub_file, _DATA, ("spec.dataset.source", "no such file; correct the path"), "hub"),
}

MACHINE: dict[str, BadInput] = {
    "a file where the working directory should be": BadInput(
        _a_file_as_workdir, _CAPACITY, ("work is not writable", "choose another --workdir")
    ),
    "a scheme that fits little of the model": BadInput(
        _spec(quantization={"scheme": "fp8-int4"}), _SPEC, ("fp8-int4", "only 22%", "input size 64", "choose scheme fp8-fp8 or scheme int4")
    ),
    "a group that nothing fits": BadInput(
        _spec(quantization={"groupSize": 256}), _SPEC, ("spec.quantization.groupSize", "256", "32, 64 or 128 is expected; choose one")
    ),
}

BAD_INPUTS: dict[str, BadInput] = {**DATA, **MODEL, **CONFIG, **ACCESS, **MACHINE}


def was_run(folder: Path) -> bool:
    """Whether malicious code has left its mark."""
    return os.path.lexists(folder / OWNED)
