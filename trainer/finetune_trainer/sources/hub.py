"""hf:// sources: a model repository's safetensors, configuration and tokenizer, or one file of a dataset repository.

A branch or tag is resolved to a commit once; everything is then read at that commit. Called by sources/__init__.py.
"""

import glob
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.context import RunContext
from finetune_trainer.errors import DataError
from finetune_trainer.sources.credentials import hub_api
from finetune_trainer.sources.hub_errors import hub_errors
from finetune_trainer.sources.license import Card, stated_license
from finetune_trainer.sources.location import HubAddress, Location, hub_address
from finetune_trainer.sources.model_files import require_model, wanted_files

LOOKUP_TIMEOUT_SECONDS = 10
_PARALLEL_DOWNLOADS = 8


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        files: by name, git's own digest of each file's content, or of the pointer that has its sha256; the commit where no digest is known.
        card: the front matter of the repository's README.md.
    """

    address: HubAddress
    commit: str
    files: Mapping[str, str]
    card: Card


def check_model(ctx: RunContext, where: Location) -> None:
    """The repository exists, opens and holds a model, and its config.json may be read (a gated repository's listing is public).

    Raises:
        AccessError, DataError, InfrastructureError, SpecError
    """
    api = hub_api(ctx, where.role)
    found = _find(api, where, dataset=False)
    _may_read(api, where, found, "config.json", dataset=False)


def check_file(ctx: RunContext, where: Location) -> None:
    """The dataset repository exists and has the file, and it may be read.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError
    """
    api = hub_api(ctx, where.role)
    found = _find(api, where, dataset=True)
    _may_read(api, where, found, found.address.path, dataset=True)


def fetch_model(ctx: RunContext, where: Location, *, weights: bool) -> tuple[Path, str, str, dict[str, Any]]:
    """The model's folder in the cache (without `weights` only its small files are sure to be there), its URI at the commit, a digest of what is loaded, and its licence.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError
    """
    api = hub_api(ctx, where.role)
    found = _find(api, where, dataset=False, digests=True)
    trusted = ctx.spec.model.trust_remote_code
    loaded = wanted_files(found.files, trust_remote_code=trusted)
    wanted = wanted_files(found.files, trust_remote_code=trusted, weights=weights)
    with hub_errors(where, tokenless=not api.token):
        folder = api.snapshot_download(
            found.address.repo_id,
            revision=found.commit,
            cache_dir=ctx.cache / "hub",
            allow_patterns=[glob.escape(name) for name in wanted],
            max_workers=_PARALLEL_DOWNLOADS,
        )
    identity = hashlib.sha256("".join(f"{name} {found.files[name]}\n" for name in loaded).encode()).hexdigest()
    stated = stated_license(found.card, home=f"{api.endpoint}/{found.address.repo_id}/blob/{found.commit}/")
    return Path(folder), f"hf://{found.address.repo_id}@{found.commit}", identity, stated


def fetch_file(ctx: RunContext, where: Location) -> tuple[Path, str, str]:
    """The file of a dataset repository in the cache, its URI at the commit, and a digest of its content.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError
    """
    api = hub_api(ctx, where.role)
    found = _find(api, where, dataset=True)
    with hub_errors(where, tokenless=not api.token):
        path = api.hf_hub_download(
            found.address.repo_id, found.address.path, repo_type="dataset", revision=found.commit, cache_dir=ctx.cache / "hub"
        )
    return (
        Path(path),
        f"hf://{found.address.repo_id}@{found.commit}/{found.address.path}",
        _metadata(api, where, found, found.address.path, dataset=True).etag or found.commit,
    )


def _find(api: Any, where: Location, *, dataset: bool, digests: bool = False) -> Snapshot:
    """Resolves the revision and requires what the job needs to be there; without `digests`, which are long for many files, names alone are sure."""
    address = hub_address(where, with_path=dataset)
    with hub_errors(where, tokenless=not api.token):
        read = api.dataset_info if dataset else api.model_info
        info = read(address.repo_id, revision=address.revision, timeout=LOOKUP_TIMEOUT_SECONDS, files_metadata=digests)
    # A mirror of the Hub may know none: there every commit counts as other content.
    files = {item.rfilename: item.blob_id or info.sha for item in info.siblings or ()}
    if not dataset:
        require_model(files, f"{where.field}: {where.uri}")
    elif address.path not in files:
        raise DataError(f"{where.field}: {where.uri} has no such file; correct the path after the repository's name.")
    return Snapshot(address, info.sha, files, info.card_data or {})


def _metadata(api: Any, where: Location, found: Snapshot, name: str, *, dataset: bool) -> Any:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(found.address.repo_id, name, repo_type="dataset" if dataset else None, revision=found.commit, endpoint=api.endpoint)
    with hub_errors(where, tokenless=not api.token):
        return api.get_hf_file_metadata(url=url, timeout=LOOKUP_TIMEOUT_SECONDS)


def _may_read(api: Any, where: Location, found: Snapshot, name: str, *, dataset: bool) -> None:
    size = _metadata(api, where, found, name, dataset=dataset).size
    if dataset and size == 0:
        raise DataError(f"{where.field}: {where.uri} is empty, but a dataset needs at least one row; check what wrote it.")
