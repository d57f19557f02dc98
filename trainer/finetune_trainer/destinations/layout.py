"""Which local file goes where at a destination. Pure, besides listing the job's own folders. Called by destinations/__init__.py.

S3 and folders keep the names of the working directory. On the Hub the artifact that people load stands at the root, so that
`from_pretrained("owner/name")` works: the quantized model, or the adapter where it is the only one.
"""

from pathlib import Path

from finetune_api import names
from finetune_api.spec import Artifact

from finetune_trainer.context import RunContext
from finetune_trainer.errors import NotPublishedError

MODEL_CARD = "README.md"
_FOLDERS = {Artifact.ADAPTER: names.ADAPTER, Artifact.QUANTIZED: names.QUANTIZED}


def folders(wanted: tuple[Artifact, ...], *, hub: bool) -> dict[Artifact, str]:
    """The folder of each wanted artifact at the destination; "" is the destination itself."""
    kept = {artifact: folder for artifact, folder in _FOLDERS.items() if artifact in wanted}
    if not hub or not kept:
        return kept
    at_root = Artifact.QUANTIZED if Artifact.QUANTIZED in kept else Artifact.ADAPTER
    return {artifact: "" if artifact is at_root else folder for artifact, folder in kept.items()}


def layout(ctx: RunContext, card: Path, *, hub: bool) -> dict[str, Path]:
    """Path at the destination -> local file: the wanted artifacts, the report, the model card, and for a quantized model its proof.

    Raises:
        NotPublishedError: a wanted artifact's folder is missing or empty.
    """
    files = {names.REPORT: ctx.report, MODEL_CARD: card}
    if Artifact.QUANTIZED in ctx.spec.wanted_artifacts:
        files |= {f"{names.PROOF}/{name}": ctx.proof / name for name in (names.PROOF_REFERENCE, names.PROOF_EXPECTED)}
    for artifact, folder in folders(ctx.spec.wanted_artifacts, hub=hub).items():
        local = ctx.workdir / _FOLDERS[artifact]
        found = [path for path in sorted(local.rglob("*")) if path.is_file() and is_shipped(path.relative_to(local))]
        if not found:
            raise NotPublishedError(f"The {artifact} is to be published, but {local} has no files; run the job again from the start.")
        files |= {str(Path(folder) / path.relative_to(local)): path for path in found}
    return files


def is_shipped(path: Path) -> bool:
    """Whether a file of an artifact's folder is published, by its path in it: not hidden files, and not the empty model card that peft leaves beside an adapter."""
    return not any(part.startswith(".") for part in path.parts) and path.name != MODEL_CARD
