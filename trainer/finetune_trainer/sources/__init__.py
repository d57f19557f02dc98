"""Fetches what a job reads: the base model, the dataset, the held-out data. Called by preflight (`check`), load and data.

One module a scheme: local (file, pvc, configmap), s3, hub, builtin. A source is resolved once (branch to commit, key to ETag), and the
resolved form is what the report and the status quote. Must not import torch at the top: `check` runs before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_trainer.context import RunContext
from finetune_trainer.sources import builtin, hub, local, location, s3
from finetune_trainer.sources.credentials import note_ambient
from finetune_trainer.sources.license import license_of_folder
from finetune_trainer.sources.location import Location

_LOCAL = ("file", "pvc", "configmap")


@dataclass(frozen=True)
class Fetched:
    """A source on this machine: a model's folder or a JSON Lines file.

    Attributes:
        resolved: its URI with the commit, version or digest that was found.
        identify: gives what changes with the content that is used, and with nothing else, such as a commit to another file; of a model in a
            local folder it reads all weights.
        license: of a model, what its own card states, as the Hub's front matter has it; empty where that is not known.
    """

    path: Path
    resolved: str
    identify: Callable[[], str] = field(compare=False)
    license: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, resolved: str, identity: str, license: dict[str, Any] | None = None) -> "Fetched":  # noqa: A002 the field's name
        """A source whose identity is known already."""
        return cls(path, resolved, lambda: identity, license or {})


def fetch_model(ctx: RunContext, *, weights: bool = True) -> Fetched:
    """The base model's folder; without `weights`, which take long to download, only configuration and tokenizer are sure to be in it.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    where = location.model(ctx.job)
    if where.scheme in _LOCAL:
        path = local.local_path(where, in_cluster=ctx.job.in_cluster)
        local.check_model(where, path)
        trusted = ctx.spec.model.trust_remote_code
        return Fetched(path, where.uri, lambda: local.model_digest(where, path, trust_remote_code=trusted), license_of_folder(path))
    if where.scheme == "s3":
        return Fetched.of(*s3.fetch_model(ctx, where, weights=weights))
    if where.scheme == "hf":
        return Fetched.of(*hub.fetch_model(ctx, where, weights=weights))
    builtin.check(where, builtin.MODEL)
    return Fetched.of(builtin.fetch_model(ctx.cache, ctx.reporter.note, weights=weights), where.uri, where.uri, builtin.LICENSE)


def keeps_weights(ctx: RunContext) -> bool:
    """Whether the model's weights lie here without a download, or stay here when this pod ends: in a folder, a claim, or a cache on a claim."""
    here = location.model(ctx.job).scheme in _LOCAL
    return here or (ctx.job.in_cluster and bool(ctx.spec.storage.cache.persistent_volume_claim))


def fetch_dataset(ctx: RunContext) -> Fetched:
    """The dataset's JSON Lines file.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    return _fetch_file(ctx, location.dataset(ctx.job))


def fetch_evaluation(ctx: RunContext) -> Fetched | None:
    """The held-out data's JSON Lines file, or None where a share of the dataset is held out.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    where = location.evaluation(ctx.job)
    return _fetch_file(ctx, where) if where else None


def check(ctx: RunContext) -> None:
    """Every source exists and opens; weights are not downloaded, torch is not imported. Ends within seconds.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    note_ambient(ctx)
    _check_model(ctx, location.model(ctx.job))
    _check_file(ctx, location.dataset(ctx.job))
    held_out = location.evaluation(ctx.job)
    if held_out:
        _check_file(ctx, held_out)


def _check_model(ctx: RunContext, where: Location) -> None:
    if where.scheme in _LOCAL:
        local.check_model(where, local.local_path(where, in_cluster=ctx.job.in_cluster))
    elif where.scheme == "s3":
        s3.check_model(ctx, where)
    elif where.scheme == "hf":
        hub.check_model(ctx, where)
    else:
        builtin.check(where, builtin.MODEL)


def _check_file(ctx: RunContext, where: Location) -> None:
    if where.scheme in _LOCAL:
        local.check_file(where, local.local_path(where, in_cluster=ctx.job.in_cluster))
    elif where.scheme == "s3":
        s3.check_file(ctx, where)
    elif where.scheme == "hf":
        hub.check_file(ctx, where)
    else:
        builtin.check(where, builtin.DATASET)


def _fetch_file(ctx: RunContext, where: Location) -> Fetched:
    if where.scheme in _LOCAL:
        path = local.local_path(where, in_cluster=ctx.job.in_cluster)
        local.check_file(where, path)
        return _digested(path, where)
    if where.scheme == "s3":
        return Fetched.of(*s3.fetch_file(ctx, where))
    if where.scheme == "hf":
        return Fetched.of(*hub.fetch_file(ctx, where))
    builtin.check(where, builtin.DATASET)
    return _digested(builtin.fetch_dataset(ctx.cache), where)


def _digested(path: Path, where: Location) -> Fetched:
    digest = local.file_digest(path)
    return Fetched.of(path, f"{where.uri}?sha256={digest}", digest)
