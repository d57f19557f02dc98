"""hf:// sources against a small Hub: what is fetched, at which commit, what the cache saves, and what is said of a bad address."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from finetune_trainer import sources
from finetune_trainer.context import RunContext
from finetune_trainer.errors import AccessError, DataError, FineTuneError, InfrastructureError, SpecError
from finetune_trainer.sources.hub_errors import hub_errors
from finetune_trainer.sources.location import Location
from huggingface_hub import constants
from huggingface_hub.utils import hf_raise_for_status
from support.hub_server import HubServer
from support.run_contexts import CONFIG, MODEL_FILES, context, read_files, refused, run_spec
from support.s3_server import free_port

ROWS = b'{"text": "one"}\n'
MODEL, DATASET = "spec.model.source", "spec.dataset.source"


def reading(folder: Path, model: str = "", dataset: str = "") -> RunContext:
    """A laptop's run that reads a model or a dataset from the Hub."""
    return context(folder, run_spec(model or "builtin://smollm2-135m", dataset or "builtin://python-docs"))


def watched(hub: HubServer) -> list[str]:
    """The paths of all files that are downloaded from now on."""
    downloaded: list[str] = []

    def note(method: str, path: str) -> None:
        if method == "GET" and "/resolve/" in path:
            downloaded.append(path.rpartition("/")[2])

    hub.refuse = note
    return downloaded


def test_a_model_is_its_safetensors_configuration_and_tokenizer(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES | {"README.md": b"# base", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"})

    fetched = sources.fetch_model(reading(tmp_path, "hf://acme/base"))

    assert read_files(fetched.path) == MODEL_FILES


def test_a_licence_is_known_by_the_card_and_no_part_of_what_the_model_is(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES)
    without = sources.fetch_model(reading(tmp_path, "hf://acme/base"))
    card = b"---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE\nbase_model: acme/older\n---\n# base"
    commit = hub.put("acme/base", {"README.md": card})

    fetched = sources.fetch_model(reading(tmp_path, "hf://acme/base"))

    link = f"{hub.endpoint}/acme/base/blob/{commit}/LICENSE"
    assert fetched.license == {"license": "other", "license_name": "acme", "license_link": link}
    assert without.license == {}
    assert fetched.identify() == without.identify()
    assert read_files(fetched.path) == MODEL_FILES


def test_python_files_come_along_where_their_code_may_run(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES | {"modeling.py": b"code"})
    spec = run_spec("hf://acme/base")
    spec["model"]["trustRemoteCode"] = True

    assert read_files(sources.fetch_model(context(tmp_path, spec)).path) == MODEL_FILES | {"modeling.py": b"code"}


def test_a_branch_is_resolved_to_its_commit_and_stays_there(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.put("acme/base", MODEL_FILES)
    first = sources.fetch_model(reading(tmp_path, "hf://acme/base@main"))
    hub.put("acme/base", {"config.json": b"{}"})

    assert first.resolved == f"hf://acme/base@{commit}"
    assert sources.fetch_model(reading(tmp_path, first.resolved)) == first


def test_a_branch_that_has_moved_is_fetched_anew(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES)
    first = sources.fetch_model(reading(tmp_path, "hf://acme/base"))
    hub.put("acme/base", {"config.json": b"{}"})

    second = sources.fetch_model(reading(tmp_path, "hf://acme/base"))

    assert second.resolved != first.resolved
    assert (second.path / "config.json").read_bytes() == b"{}"


def test_a_commit_to_what_is_not_loaded_changes_the_commit_and_not_the_identity(hub: HubServer, tmp_path: Path) -> None:
    """A finished training is not made again for a README."""
    found = []
    for changed in (MODEL_FILES, {"README.md": b"# base"}, {"model.safetensors": b"others"}):
        hub.put("acme/base", changed)
        found.append(sources.fetch_model(reading(tmp_path, "hf://acme/base"), weights=False))
    assert len({item.resolved for item in found}) == 3
    assert found[0].identify() == found[1].identify() != found[2].identify()


def test_one_look_up_decides_which_commit_is_read(hub: HubServer, tmp_path: Path) -> None:
    """The branch moves right after it was resolved: what is fetched is what was resolved."""
    commit = hub.put("acme/base", MODEL_FILES)
    asked: list[str] = []

    def move(_: str, path: str) -> None:
        asked.append(path)
        if len(asked) == 2:
            hub.put("acme/base", {"config.json": b"{}"})

    hub.refuse = move
    fetched = sources.fetch_model(reading(tmp_path, "hf://acme/base"))

    assert fetched.resolved == f"hf://acme/base@{commit}"
    assert read_files(fetched.path) == MODEL_FILES


def test_the_second_fetch_downloads_nothing(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES)
    first = sources.fetch_model(reading(tmp_path, "hf://acme/base"))
    downloaded = watched(hub)

    assert sources.fetch_model(reading(tmp_path, "hf://acme/base")) == first
    assert downloaded == []


def test_a_download_that_broke_off_is_continued_at_the_missing_files(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES)
    before = watched(hub)
    note = hub.refuse
    hub.refuse = lambda method, path: 403 if path.endswith("/model.safetensors") else note(method, path)
    with refused(AccessError, MODEL):
        sources.fetch_model(reading(tmp_path, "hf://acme/base"))
    downloaded = watched(hub)

    assert read_files(sources.fetch_model(reading(tmp_path, "hf://acme/base")).path) == MODEL_FILES
    assert sorted(downloaded) == sorted(MODEL_FILES.keys() - set(before))  # those that had not begun when one was refused are missing too


def test_a_file_of_a_dataset_repository_is_fetched_at_its_commit(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.put("acme/rows", {"data/train.jsonl": ROWS}, kind="dataset")

    fetched = sources.fetch_dataset(reading(tmp_path, dataset="hf://acme/rows@main/data/train.jsonl"))

    assert fetched.path.read_bytes() == ROWS
    assert fetched.resolved == f"hf://acme/rows@{commit}/data/train.jsonl"


def test_a_slash_in_a_branch_is_written_in_percent_form(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.put("acme/base", MODEL_FILES)
    hub.repository("acme/base").branches["team/next"] = commit

    assert sources.fetch_model(reading(tmp_path, "hf://acme/base@team%2Fnext")).resolved == f"hf://acme/base@{commit}"


def test_a_private_repository_opens_with_its_token(hub_laptop: HubServer, tmp_path: Path) -> None:
    hub_laptop.put("acme/base", MODEL_FILES, private=True)
    ctx = reading(tmp_path, "hf://acme/base")

    sources.check(ctx)

    assert read_files(sources.fetch_model(ctx).path) == MODEL_FILES


BAD_MODELS: list[tuple[str, dict[str, bytes], str, type[FineTuneError], tuple[str, ...]]] = [
    ("no such revision", MODEL_FILES, "hf://acme/base@v9", DataError, ("no such revision", "after '@'")),
    ("no such repository", MODEL_FILES, "hf://acme/bose", AccessError, ("does not exist on the Hub", "correct the name")),
    ("no config.json", {"model.safetensors": b"x"}, "hf://acme/base", DataError, ("no config.json",)),
    ("no weights", {"config.json": CONFIG}, "hf://acme/base", DataError, ("upload the weights as safetensors",)),
    ("only a pickle", {"config.json": CONFIG, "model.bin": b"x"}, "hf://acme/base", DataError, ("convert them to safetensors",)),
    ("no owner", MODEL_FILES, "hf://base", SpecError, ("hf://owner/name[@revision]",)),
    ("an empty revision", MODEL_FILES, "hf://acme/base@", SpecError, ("hf://owner/name[@revision]",)),
    ("a file after a model", MODEL_FILES, "hf://acme/base/config.json", SpecError, ("hf://owner/name[@revision]",)),
    ("a name that no repository can have", MODEL_FILES, "hf://acme/-base-", SpecError, ("write hf://owner/name",)),
]


@pytest.mark.parametrize(("files", "uri", "kind", "words"), [case[1:] for case in BAD_MODELS], ids=[case[0] for case in BAD_MODELS])
@pytest.mark.parametrize("call", [sources.check, sources.fetch_model])
def test_a_bad_model_is_refused(
    hub_laptop: HubServer,
    tmp_path: Path,
    files: dict[str, bytes],
    uri: str,
    kind: type[FineTuneError],
    words: tuple[str, ...],
    call: Callable[[RunContext], Any],
) -> None:
    hub_laptop.put("acme/base", files)

    with refused(kind, MODEL, uri, *words, hidden=(hub_laptop.token,)):
        call(reading(tmp_path, uri))


BAD_DATASETS: list[tuple[str, dict[str, bytes], str, type[FineTuneError], tuple[str, ...]]] = [
    ("no such file", {"train.jsonl": ROWS}, "hf://acme/rows/test.jsonl", DataError, ("no such file", "correct the path")),
    ("an empty file", {"train.jsonl": b""}, "hf://acme/rows/train.jsonl", DataError, ("is empty", "at least one row")),
    ("no such revision", {"train.jsonl": ROWS}, "hf://acme/rows@v9/train.jsonl", DataError, ("no such revision",)),
    ("no file named", {"train.jsonl": ROWS}, "hf://acme/rows", SpecError, ("hf://owner/name[@revision]/file",)),
]


@pytest.mark.parametrize(("files", "uri", "kind", "words"), [case[1:] for case in BAD_DATASETS], ids=[case[0] for case in BAD_DATASETS])
def test_a_bad_dataset_is_refused(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], uri: str, kind: type[FineTuneError], words: tuple[str, ...]
) -> None:
    hub.put("acme/rows", files, kind="dataset")

    with refused(kind, DATASET, uri, *words):
        sources.check(reading(tmp_path, dataset=uri))


@pytest.mark.parametrize("call", [sources.check, sources.fetch_model])
def test_a_private_repository_without_a_token_looks_like_none(hub: HubServer, tmp_path: Path, call: Callable[[RunContext], Any]) -> None:
    hub.put("acme/base", MODEL_FILES, private=True)

    words = ("does not exist on the Hub, or is private, and no token was given", "correct the name", "set HF_TOKEN or run hf auth login")
    with refused(AccessError, MODEL, *words, hidden=("this token", "secretName")):
        call(reading(tmp_path, "hf://acme/base"))


@pytest.mark.parametrize("call", [sources.check, sources.fetch_dataset])
def test_a_pod_without_a_token_is_told_which_field_names_a_secret(
    hub: HubServer, tmp_path: Path, call: Callable[[RunContext], Any]
) -> None:
    hub.put("acme/rows", {"train.jsonl": ROWS}, kind="dataset", private=True)

    words = ("no token was given", "name a Secret with HF_TOKEN in spec.dataset.credentials.secretName")
    with refused(AccessError, DATASET, *words, hidden=("this token", "hf auth login")):
        call(context(tmp_path, run_spec(dataset="hf://acme/rows/train.jsonl"), in_cluster=True))


def test_a_token_that_may_not_see_a_repository_is_not_called_missing(hub_laptop: HubServer, tmp_path: Path) -> None:
    with refused(AccessError, MODEL, "or this token may not see it", "HF_TOKEN", hidden=("no token was given",)):
        sources.check(reading(tmp_path, "hf://acme/hidden"))


def test_a_wrong_token_is_named_and_not_quoted(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("acme/base", MODEL_FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    with refused(AccessError, MODEL, "the Hub refused the token (401)", "HF_TOKEN", hidden=("hf_wrong",)):
        sources.check(reading(tmp_path, "hf://acme/base"))


def test_a_listing_that_is_public_is_no_proof_that_the_files_may_be_read(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES)
    hub.refuse = lambda _, path: 403 if "/resolve/" in path else None

    with refused(AccessError, MODEL, "the Hub refused the request (403), and no token was given", "HF_TOKEN"):
        sources.check(reading(tmp_path, "hf://acme/base"))


GATED: list[tuple[bool, bool, tuple[str, ...], str]] = [
    (False, False, ("is gated; accept its terms", "a token of that account (key HF_TOKEN)"), "no token was given"),
    (True, False, ("is gated, and no token was given; accept its terms", "name a Secret with HF_TOKEN in spec.model."), "hf auth login"),
    (True, True, ("is gated, and no token was given; accept its terms", "set HF_TOKEN or run hf auth login"), "secretName"),
]


@pytest.mark.parametrize(("tokenless", "laptop", "words", "other"), GATED)
def test_a_gated_repository_asks_for_its_terms_to_be_accepted(tokenless: bool, laptop: bool, words: tuple[str, ...], other: str) -> None:
    where = Location(MODEL, "hf://acme/base", "model", laptop=laptop)
    request = httpx2.Request("GET", "http://127.0.0.1/acme/base/resolve/main/config.json", headers={"Authorization": "Bearer hf_mine"})
    answer = httpx2.Response(401 if tokenless else 403, headers={"X-Error-Code": "GatedRepo"}, request=request)

    with refused(AccessError, MODEL, *words, hidden=("hf_mine", other)), hub_errors(where, tokenless=tokenless):
        hf_raise_for_status(answer)


def test_a_hub_that_fails_is_an_infrastructure_error(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES)
    hub.refuse = lambda _method, _path: 500

    with refused(InfrastructureError, MODEL, "the Hub answered 500", "try again later"):
        sources.check(reading(tmp_path, "hf://acme/base"))


def test_a_hub_that_is_out_of_reach_is_named_without_what_its_address_hides(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://me:hidden@127.0.0.1:{free_port('127.0.0.1')}")

    with refused(InfrastructureError, MODEL, "127.0.0.1 could not be reached", "check HF_ENDPOINT", hidden=("hidden",)):
        sources.check(reading(tmp_path, "hf://acme/base"))


def test_a_check_downloads_no_weights(hub: HubServer, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES)
    downloaded = watched(hub)

    sources.check(reading(tmp_path, "hf://acme/base"))

    assert downloaded == []
    assert not (tmp_path / "cache" / "hub").exists()
