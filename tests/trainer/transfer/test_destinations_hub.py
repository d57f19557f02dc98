"""hf:// destinations against a small Hub: one commit or none, and a token that may not write is found out before the training."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import destinations
from finetune_trainer.context import RunContext
from finetune_trainer.destinations.hub import may_create
from finetune_trainer.errors import AccessError, FineTuneError, InfrastructureError, SpecError
from finetune_trainer.sources.location import destinations as locations
from support.hub_server import HubServer
from support.run_contexts import CONFIG, MODEL_FILES, WEIGHTS, context, refused, report_of, run_spec, write_artifacts

FIELD = "spec.outputs.destinations[0].uri"
BOT = "hf://acme/bot"
TWO_SHARDS = {"config.json": b"{}", "model-1.safetensors": b"one", "model-2.safetensors": b"two"}


def shipping(folder: Path, uri: str = BOT, model: dict[str, bytes] | None = None, **more: Any) -> RunContext:
    """A finished run on a laptop that goes to the Hub; `model` are the quantized model's files."""
    ctx = context(folder, run_spec("hf://acme/base", "builtin://python-docs", {"uri": uri, **more}))
    write_artifacts(ctx, report_of(ctx), model=model)
    return ctx


def publish(ctx: RunContext) -> tuple[Any, ...]:
    """Publishes to the run's only destination."""
    return destinations.publish(ctx, locations(ctx.job)[0], report_of(ctx))


def titles(hub: HubServer) -> list[str]:
    """The repository's commits."""
    return list(hub.repository("acme/bot").titles.values())


def test_one_commit_carries_everything(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path))

    assert len(titles(hub_laptop)) == 2, "the repository's first commit, and one"
    expected = {"lora_model/adapter_config.json", "lora_model/adapter_model.safetensors", "proof/expected.json"}
    expected |= {"proof/reference.safetensors", "README.md", "report.json", "manifest.json", *MODEL_FILES}
    assert expected == set(hub_laptop.files("acme/bot"))


def test_the_quantized_model_stands_at_the_root_as_it_is(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path))

    arrived = hub_laptop.files("acme/bot")
    assert {name: arrived[name] for name in MODEL_FILES} == MODEL_FILES


def test_an_adapter_alone_stands_at_the_root(hub_laptop: HubServer, tmp_path: Path) -> None:
    spec = run_spec("hf://acme/base", "builtin://python-docs", {"uri": BOT}, quantization={"scheme": "none"})
    ctx = context(tmp_path, spec)
    write_artifacts(ctx, report_of(ctx))

    publish(ctx)

    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "report.json", "manifest.json"}
    assert set(hub_laptop.files("acme/bot")) == names


def test_large_files_arrive_as_lfs_objects_with_equal_content(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path))

    assert hub_laptop.repository("acme/bot").lfs == {"model.safetensors"}
    assert hub_laptop.files("acme/bot")["model.safetensors"] == WEIGHTS


def test_the_card_is_ours_and_not_peft_s(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path))

    card = hub_laptop.files("acme/bot")["README.md"].decode()
    assert "# bot" in card
    assert "peft's empty card" not in card


def test_each_artifact_is_reported_at_the_commit(hub_laptop: HubServer, tmp_path: Path) -> None:
    adapter, quantized = publish(shipping(tmp_path))

    commit = hub_laptop.repository("acme/bot").branches["main"]
    assert (adapter.kind, adapter.uri) == ("adapter", f"hf://acme/bot@{commit}/lora_model")
    assert (quantized.kind, quantized.uri) == ("quantized", f"hf://acme/bot@{commit}")


def test_publishing_twice_makes_no_second_commit(hub_laptop: HubServer, tmp_path: Path) -> None:
    first = publish(shipping(tmp_path))

    assert publish(shipping(tmp_path)) == first
    assert len(titles(hub_laptop)) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "lora_model/adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["deleted", "replaced by as many bytes"])
def test_what_somebody_has_changed_is_put_back(hub_laptop: HubServer, tmp_path: Path, name: str, how: str) -> None:
    publish(shipping(tmp_path))
    repository, before = hub_laptop.repository("acme/bot"), hub_laptop.files("acme/bot")
    blobs = dict(repository.commits[repository.branches["main"]])
    if how == "deleted":
        del blobs[name]
    else:
        blobs[name] = hub_laptop.store(before[name][::-1])
    repository.commit("main", blobs, "by hand")

    adapter, _ = publish(shipping(tmp_path))

    assert hub_laptop.files("acme/bot") == before
    assert adapter.uri == f"hf://acme/bot@{repository.branches['main']}/lora_model"


def test_a_file_of_others_is_no_reason_for_a_commit(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path))
    hub_laptop.put("acme/bot", {"notes.txt": b"mine"})
    before = titles(hub_laptop)

    publish(shipping(tmp_path))

    assert titles(hub_laptop) == before


def test_a_commit_that_fails_leaves_the_repository_as_it_was(hub_laptop: HubServer, tmp_path: Path) -> None:
    hub_laptop.refuse = lambda _, path: 500 if "/commit/" in path else None

    with refused(InfrastructureError, FIELD, "the Hub answered 500", hidden=(hub_laptop.token,)):
        publish(shipping(tmp_path))
    assert hub_laptop.files("acme/bot") == {}


def test_a_publication_that_broke_off_is_finished_by_the_next(hub_laptop: HubServer, tmp_path: Path) -> None:
    hub_laptop.refuse = lambda _, path: 500 if "/commit/" in path else None
    with refused(InfrastructureError, FIELD):
        publish(shipping(tmp_path))
    hub_laptop.refuse = lambda _method, _path: None

    publish(shipping(tmp_path))

    assert len(titles(hub_laptop)) == 2
    assert hub_laptop.files("acme/bot")["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize(("status", "kind"), [(403, AccessError), (507, InfrastructureError)])
def test_a_large_file_that_the_hub_refuses_is_a_typed_error(
    hub_laptop: HubServer, tmp_path: Path, status: int, kind: type[FineTuneError]
) -> None:
    hub_laptop.refuse = lambda method, _: status if method == "PUT" else None

    with refused(kind, FIELD, BOT, str(status), hidden=(hub_laptop.token,)):
        publish(shipping(tmp_path, model={"config.json": CONFIG, "model.safetensors": os.urandom(20_000)}))
    assert hub_laptop.files("acme/bot") == {}


def test_a_manifest_that_the_hub_does_not_hand_out_is_not_taken_for_none(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path / "old", model=TWO_SHARDS))
    hub_laptop.refuse = lambda _, path: 500 if path.endswith("/resolve/main/manifest.json") else None

    with refused(InfrastructureError, FIELD, "the Hub answered 500", hidden=(hub_laptop.token,)):
        publish(shipping(tmp_path / "new"))
    assert len(titles(hub_laptop)) == 2


def test_stale_files_are_deleted_in_the_same_commit(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path / "old", model=TWO_SHARDS))

    publish(shipping(tmp_path / "new", model={"config.json": CONFIG, "model.safetensors": WEIGHTS}))

    assert [name for name in hub_laptop.files("acme/bot") if "/" not in name and name.startswith("model")] == ["model.safetensors"]
    assert len(titles(hub_laptop)) == 3


def test_a_stale_file_that_somebody_deleted_is_no_obstacle(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path / "old", model=TWO_SHARDS))
    repository = hub_laptop.repository("acme/bot")
    left = {path: blob for path, blob in repository.commits[repository.branches["main"]].items() if path != "model-1.safetensors"}
    repository.commit("main", left, "by hand")

    publish(shipping(tmp_path / "new"))

    assert hub_laptop.files("acme/bot")["model.safetensors"] == WEIGHTS


def test_files_of_others_are_left_alone(hub_laptop: HubServer, tmp_path: Path) -> None:
    hub_laptop.put("acme/bot", {"notes.txt": b"mine", "manifest.json": json.dumps({"files": [{"path": "../x"}]}).encode()})

    publish(shipping(tmp_path))

    assert hub_laptop.files("acme/bot")["notes.txt"] == b"mine"


def test_a_branch_is_made_and_main_is_left_alone(hub_laptop: HubServer, tmp_path: Path) -> None:
    adapter, _ = publish(shipping(tmp_path, f"{BOT}@next"))

    repository = hub_laptop.repository("acme/bot")
    assert adapter.uri == f"hf://acme/bot@{repository.branches['next']}/lora_model"
    assert hub_laptop.files("acme/bot") == {}
    assert hub_laptop.files("acme/bot", "next")["model.safetensors"] == WEIGHTS


def test_a_branch_that_exists_gets_the_second_publication(hub_laptop: HubServer, tmp_path: Path) -> None:
    publish(shipping(tmp_path / "old", f"{BOT}@next", model=TWO_SHARDS))

    publish(shipping(tmp_path / "new", f"{BOT}@next"))

    assert hub_laptop.files("acme/bot", "next")["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_made_private_where_the_spec_says_so(hub_laptop: HubServer, tmp_path: Path, private: bool) -> None:
    publish(shipping(tmp_path, private=private))

    assert hub_laptop.repository("acme/bot").private is private


@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_a_public_repository_is_refused_where_the_spec_wants_a_private_one(
    hub_laptop: HubServer, tmp_path: Path, call: Callable[[RunContext], Any]
) -> None:
    hub_laptop.put("acme/bot", {"notes.txt": b"mine"})

    words = ("is not private", "make the repository private on the Hub", "another repository", "private: false")
    with refused(AccessError, FIELD, BOT, *words, hidden=(hub_laptop.token,)):
        call(shipping(tmp_path, private=True))
    assert hub_laptop.files("acme/bot") == {"notes.txt": b"mine"}


@pytest.mark.parametrize(("public", "private"), [(False, True), (False, False), (True, False)])
def test_a_repository_that_hides_enough_is_published_to(hub_laptop: HubServer, tmp_path: Path, public: bool, private: bool) -> None:
    hub_laptop.put("acme/bot", {"notes.txt": b"mine"}, private=not public)

    destinations.check_write(shipping(tmp_path, private=private))
    publish(shipping(tmp_path, private=private))

    assert "model.safetensors" in hub_laptop.files("acme/bot")


def test_a_check_makes_nothing(hub_laptop: HubServer, tmp_path: Path) -> None:
    destinations.check_write(shipping(tmp_path))

    assert hub_laptop.repositories == {}


def test_a_check_passes_where_the_repository_is_there(hub_laptop: HubServer, tmp_path: Path) -> None:
    hub_laptop.put("acme/bot", {"notes.txt": b"mine"}, private=True)

    destinations.check_write(shipping(tmp_path))

    assert hub_laptop.files("acme/bot") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_token_that_may_only_read_is_found_out_by_the_check(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    if exists:
        hub.put("acme/bot", {})

    with refused(AccessError, FIELD, BOT, "HF_TOKEN", hidden=(hub.read_token,)):
        destinations.check_write(shipping(tmp_path))


@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_a_wrong_token_is_named_and_not_quoted(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[RunContext], Any]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    with refused(AccessError, FIELD, BOT, "the Hub refused the token (401)", "HF_TOKEN", hidden=("hf_wrong",)):
        call(shipping(tmp_path))


@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_no_token_at_all_is_an_access_error(hub: HubServer, tmp_path: Path, call: Callable[[RunContext], Any]) -> None:
    with refused(AccessError, FIELD, BOT, "given; set HF_TOKEN or run hf auth login", hidden=("refused the token",)):
        call(shipping(tmp_path))


@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_a_pod_without_a_token_is_told_which_field_names_a_secret(
    hub: HubServer, tmp_path: Path, call: Callable[[RunContext], Any]
) -> None:
    ctx = context(tmp_path, run_spec("hf://acme/base", "builtin://python-docs", {"uri": BOT}), in_cluster=True)
    write_artifacts(ctx, report_of(ctx))

    mend = "given; name a Secret with HF_TOKEN in spec.outputs.destinations[0].credentials.secretName"
    with refused(AccessError, FIELD, BOT, mend, hidden=("refused the token",)):
        call(ctx)


@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_an_account_that_is_not_the_token_s_is_an_access_error(
    hub_laptop: HubServer, tmp_path: Path, call: Callable[[RunContext], Any]
) -> None:
    with refused(AccessError, FIELD, "hf://globex/bot", "HF_TOKEN", hidden=(hub_laptop.token,)):
        call(shipping(tmp_path, "hf://globex/bot"))


@pytest.mark.parametrize("uri", ["hf://bot", "hf://acme/bot/folder", "hf://acme/bot@"])
def test_an_address_that_names_no_repository_is_a_spec_error(hub_laptop: HubServer, tmp_path: Path, uri: str) -> None:
    with refused(SpecError, FIELD, uri, "hf://owner/name[@revision]"):
        destinations.check_write(shipping(tmp_path, uri))


def fine_grained(owner: str, *permissions: str) -> dict[str, Any]:
    """A whoami answer's token that is scoped to one account."""
    return {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": owner}, "permissions": list(permissions)}]}}


TOKENS: list[tuple[str, dict[str, Any], str, bool]] = [
    ("a write token, its own account", {"role": "write"}, "me", True),
    ("a read token", {"role": "read"}, "me", False),
    ("a write token, an organization it writes to", {"role": "write"}, "team", True),
    ("a write token, an organization it reads", {"role": "write"}, "readers", False),
    ("a write token, somebody else", {"role": "write"}, "other", False),
    ("a fine-grained token with the scope", fine_grained("me", "repo.write"), "me", True),
    ("a fine-grained token that only reads", fine_grained("me", "repo.content.read"), "me", False),
    ("a fine-grained token for another account", fine_grained("me", "repo.write"), "team", False),
]


@pytest.mark.parametrize(("token", "owner", "allowed"), [case[1:] for case in TOKENS], ids=[case[0] for case in TOKENS])
def test_who_may_make_a_repository(token: dict[str, Any], owner: str, allowed: bool) -> None:
    organizations = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    assert may_create({"name": "me", "orgs": organizations, "auth": {"accessToken": token}}, owner) is allowed
