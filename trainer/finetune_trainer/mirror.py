"""Checkpoints that outlast the pod: copied to S3 when they are sealed, fetched when a new pod starts with an empty workspace, gone after success.

Used by preflight (`check_listing`), stages/train.py (`fetch_latest`), phases.py (`push`) and pipeline.py (`remove`). The seal is uploaded
last, so that a half-copied checkpoint is never taken for one. Never mirrors to a Hub repository.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import credentials
from finetune_api.spec import DestinationSpec

from finetune_trainer import atomic
from finetune_trainer.checkpoints import SEAL, folder_of, problem_of, step_of
from finetune_trainer.context import RunContext
from finetune_trainer.destinations.manifest import PublishedFile
from finetune_trainer.destinations.s3_upload import abort_uploads, upload
from finetune_trainer.sources.credentials import s3_client
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.s3_errors import error_code, s3_errors

DEFAULT_FOLDER = ".checkpoints"
_KEPT = 2
_FIELD = "spec.storage.checkpoints.uri"


@dataclass(frozen=True)
class Mirror:
    """The mirror of one training, for one use: the keys of a Secret may be others an hour later.

    Attributes:
        where: bucket and prefix, this training's digest included.
        client: a boto3 S3 client.
    """

    where: Location
    client: Any

    @classmethod
    def of(cls, ctx: RunContext) -> "Mirror | None":
        """The run's mirror; None on a laptop, with a workspace that lasts, and without any S3 address.

        Raises:
            AccessError: the Secret is missing or lacks a key. SpecError: the endpoint is not a URL.
        """
        where = mirror_location(ctx)
        if where is None:
            return None
        with s3_errors(where):
            return cls(where, s3_client(ctx, where.role, where.endpoint))

    def check_listing(self) -> None:
        """The checkpoints may be listed, which resuming needs and write access does not show.

        Raises:
            AccessError, InfrastructureError: one sentence each.
        """
        with s3_errors(self.where):
            self._steps()

    def push(self, folder: Path) -> None:
        """Copies a sealed checkpoint and removes all but the newest two.

        Raises:
            AccessError, InfrastructureError: one sentence each.
        """
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
        with s3_errors(self.where):
            for path in (*paths, folder / SEAL):
                name = f"{folder.name}/{path.relative_to(folder)}"
                upload(self.client, self.where.authority, self._key(name), PublishedFile.of(name, path))
            # A later step than this one was passed over, damaged or of other data: nobody goes on from it any more.
            steps = self._steps()
            kept = [step for step in steps if step <= step_of(folder)][-_KEPT:]
            for step in set(steps) - set(kept):
                self._delete(f"checkpoint-{step}/")
            self._abort("checkpoint-")  # this one is whole, and nobody goes on sending another

    def fetch_latest(self, outputs: Path, warn: Callable[[str], None]) -> None:
        """Downloads the newest complete checkpoint into `outputs`; nothing when there is none.

        Damaged ones are removed, here and there, with a warning; one that is removed meanwhile is passed over like them.

        Raises:
            AccessError, CapacityError, InfrastructureError: one sentence each.
        """
        with s3_errors(self.where):
            for step in reversed(self._steps()):
                folder = folder_of(outputs, step)
                # A copy may be damaged on its way: what is damaged twice is damaged there.
                problem = self._download(folder) and self._download(folder)
                if not problem:
                    return
                warn(f"The mirrored {folder.name} is passed over: {problem}.")
                self._delete(f"{folder.name}/")

    def remove(self) -> None:
        """Removes everything, after success.

        Raises:
            AccessError, InfrastructureError: one sentence each.
        """
        with s3_errors(self.where):
            self._delete("")
            self._abort("")

    def _download(self, folder: Path) -> str:
        """Downloads a checkpoint; returns what is wrong with it, and leaves nothing then."""
        keys = self._keys(f"{folder.name}/")
        with atomic.folder(folder) as partial:
            targets = [partial / key.removeprefix(self._key(f"{folder.name}/")) for key in keys]
            whole = bool(keys) and all(self._fetch(key, target) for key, target in zip(keys, targets, strict=True))
        problem = problem_of(folder) if whole else "it was removed while it was fetched"
        if problem:
            shutil.rmtree(folder)
        return problem

    def _fetch(self, key: str, target: Path) -> bool:
        """Whether an object is there still: another run of this training may be finished, or have newer checkpoints, and remove this one."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.client.download_file(self.where.authority, key, str(target))
        except self.client.exceptions.ClientError as error:
            if error_code(error) in ("NoSuchKey", "404"):
                return False
            raise
        return True

    def _key(self, name: str) -> str:
        return f"{self.where.path}/{name}"

    def _keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.where.authority, Prefix=self._key(prefix))
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def _steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [key.removeprefix(self._key("checkpoint-")) for key in self._keys("checkpoint-") if key.endswith(f"/{SEAL}")]
        steps = [name.partition("/")[0] for name in names]
        return sorted(int(step) for step in steps if step.isdigit())

    def _delete(self, prefix: str) -> None:
        # The seal first: from then on nobody takes what is left for a checkpoint.
        for key in sorted(self._keys(prefix), key=lambda key: not key.endswith(f"/{SEAL}")):
            self.client.delete_object(Bucket=self.where.authority, Key=key)

    def _abort(self, prefix: str) -> None:
        abort_uploads(self.client, self.where.authority, self._key(prefix), lambda _: True)


def mirror_location(ctx: RunContext) -> Location | None:
    """Where the run's checkpoints are mirrored; None when its workspace lasts by itself or no S3 address is known. Pure."""
    storage = ctx.spec.storage
    if not ctx.job.in_cluster or storage.workspace.persistent_volume_claim:
        return None
    index, first = _first_s3(ctx.spec.outputs.destinations)
    root = storage.checkpoints.uri or (f"{first.uri.rstrip('/')}/{DEFAULT_FOLDER}" if first else "")
    if not root:
        return None
    secret, role = storage.checkpoints.credentials.secret_name, credentials.CHECKPOINTS
    if not secret and first:
        secret, role = first.credentials.secret_name, credentials.destination_role(index)
    endpoint = storage.checkpoints.endpoint or (first.endpoint if first else "")
    return Location(_FIELD, f"{root.rstrip('/')}/{ctx.job.train_digest}", role, secret=secret, endpoint=endpoint)


def _first_s3(destinations: tuple[DestinationSpec, ...]) -> tuple[int, DestinationSpec | None]:
    found = ((index, item) for index, item in enumerate(destinations) if item.uri.startswith("s3://"))
    return next(found, (0, None))
