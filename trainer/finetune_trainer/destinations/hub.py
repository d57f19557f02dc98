"""hf:// destinations: one commit with the model, the adapter, the report, the model card and the manifest.

A commit is all or nothing, so a reader never sees half a model; when all that is there is the same, there is nothing to do.
"""

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune_api.names import MANIFEST

from finetune_trainer.context import RunContext
from finetune_trainer.destinations.manifest import Publication, PublishedFile, named_files
from finetune_trainer.errors import AccessError
from finetune_trainer.sources.credentials import hub_api
from finetune_trainer.sources.hub_errors import give_token, hub_errors
from finetune_trainer.sources.location import Location, hub_address

_WRITE_SCOPES = {"repo.write", "repo.content.write"}


def check_write(ctx: RunContext, where: Location) -> None:
    """The token is valid and may write to the repository, or make it, and one that is there is as private as the spec wants; nothing is made yet.

    Raises:
        AccessError, InfrastructureError, SpecError
    """
    repo_id, _ = _repository(where)
    api = hub_api(ctx, where.role)
    if not api.token:
        raise AccessError(f"{where.field}: {where.uri} needs a Hub token with write access, and none was given; {give_token(where)}.")
    with hub_errors(where):
        identity = api.whoami()
        if api.repo_exists(repo_id):
            api.auth_check(repo_id, write=True)
            _require_private(api, repo_id, where)
            return
    if not may_create(identity, repo_id.partition("/")[0]):
        raise AccessError(
            f"{where.field}: this token may not make {where.uri}; give a token with write access to that account (key HF_TOKEN)."
        )


def publish(ctx: RunContext, where: Location, publication: Publication) -> str:
    """Makes the repository if needed, and one commit if the content differs.

    Returns:
        The repository's URI at the commit.

    Raises:
        AccessError, InfrastructureError, SpecError
    """
    repo_id, branch = _repository(where)
    api = hub_api(ctx, where.role)
    with hub_errors(where, tokenless=not api.token):
        api.create_repo(repo_id, private=where.private or None, exist_ok=True)
        _require_private(api, repo_id, where)  # what was there before is not changed by that
        if branch:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        older = _manifest_there(api, repo_id, branch)
        there = _files_there(api, repo_id, branch)
        changed = [item for item in publication.files if not _is_same(there.get(item.path), item)]
        if older == publication.manifest and not changed:
            return f"hf://{repo_id}@{api.model_info(repo_id, revision=branch).sha}"
        stale = (named_files(older or b"") - publication.paths - {MANIFEST}) & there.keys()
        commit = api.create_commit(
            repo_id,
            revision=branch,
            commit_message=f"{ctx.job.name}: run {ctx.job.run_digest[:12]}",
            operations=_operations(changed, publication.manifest, stale),
        )
    return f"hf://{repo_id}@{commit.oid}"


def may_create(identity: dict[str, Any], owner: str) -> bool:
    """Whether an answer of whoami allows a new repository under `owner`; pure.

    A fine-grained token needs a write scope on that account; a plain one the write role and membership.
    """
    organizations = {item["name"]: item.get("roleInOrg", "") for item in identity.get("orgs", ())}
    if owner != identity["name"] and organizations.get(owner, "read") == "read":
        return False
    token = identity.get("auth", {}).get("accessToken", {})
    if token.get("role") != "fineGrained":
        return token.get("role", "write") != "read"
    scopes = token.get("fineGrained", {}).get("scoped", ())
    granted = {scope for item in scopes if item.get("entity", {}).get("name") == owner for scope in item.get("permissions", ())}
    return bool(_WRITE_SCOPES & granted)


def _require_private(api: Any, repo_id: str, where: Location) -> None:
    if where.private and not api.model_info(repo_id).private:
        raise AccessError(
            f"{where.field}: {where.uri} is not private on the Hub, but the destination has private: true; "
            "make the repository private on the Hub, name another repository, or set private: false."
        )


def _repository(where: Location) -> tuple[str, str | None]:
    address = hub_address(where, with_path=False)
    return address.repo_id, address.revision


def _manifest_there(api: Any, repo_id: str, branch: str | None) -> bytes | None:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(api.hf_hub_download(repo_id, MANIFEST, revision=branch, local_dir=folder)).read_bytes()
        except RemoteEntryNotFoundError:  # not its base class, which also stands for a Hub that did not answer
            return None


def _files_there(api: Any, repo_id: str, branch: str | None) -> dict[str, Any]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo_id, recursive=True, revision=branch)
    return {item.path: item for item in tree if isinstance(item, RepoFile)}


def _is_same(there: Any, item: PublishedFile) -> bool:
    """Whether the Hub has this content: it knows a large file by its sha256, a small one by what git calls it."""
    if there is None or there.size != item.bytes:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == item.sha256)
    return bool(there.blob_id == _git_blob(item.local.read_bytes()))


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _operations(changed: list[PublishedFile], manifest: bytes, stale: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    return [
        *(CommitOperationAdd(item.path, str(item.local)) for item in changed),
        CommitOperationAdd(MANIFEST, manifest),
        *(CommitOperationDelete(path) for path in sorted(stale)),
    ]
