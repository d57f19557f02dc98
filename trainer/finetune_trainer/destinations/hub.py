"""hf:// destinations: one commit with the model, the adapter, the report, the model card and the manifest.

A commit is all or nothing, so a reader never sees half a model; when the manifest that is there is the same, there is nothing to do.
"""

import tempfile
from pathlib import Path
from typing import Any

from finetune_api.names import MANIFEST

from finetune_trainer.context import RunContext
from finetune_trainer.destinations.manifest import Publication, named_files
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
        if older == publication.manifest:
            return f"hf://{repo_id}@{api.model_info(repo_id, revision=branch).sha}"
        commit = _commit(api, repo_id, branch, publication, older, f"{ctx.job.name}: run {ctx.job.run_digest[:12]}")
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


def _commit(api: Any, repo_id: str, branch: str | None, publication: Publication, older: bytes | None, title: str) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    stale = named_files(older or b"") - {item.path for item in publication.files} - {MANIFEST}
    there = set(api.list_repo_files(repo_id, revision=branch)) if stale else set()
    return api.create_commit(
        repo_id,
        revision=branch,
        commit_message=title,
        operations=[
            *(CommitOperationAdd(item.path, str(item.local)) for item in publication.files),
            CommitOperationAdd(MANIFEST, publication.manifest),
            *(CommitOperationDelete(path) for path in sorted(stale & there)),
        ],
    )
