"""Which files of a model folder, repository or prefix make up the model. Pure.

Used by every scheme, so that a model means the same thing wherever it comes from: weights in safetensors, configuration, tokenizer.
"""

from collections.abc import Collection
from pathlib import Path

from finetune_trainer.errors import DataError

_WEIGHTS = ".safetensors"
_SUFFIXES = (_WEIGHTS, ".json", ".jinja", ".txt", ".model", ".tiktoken")
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")
_PROCESSOR = "processor_config.json"
_UNSAFE_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def wanted_files(names: Collection[str], *, trust_remote_code: bool, weights: bool = True) -> tuple[str, ...]:
    """The files to fetch, sorted, out of all names relative to the model's root.

    Only the root counts, besides additional_chat_templates/: repositories keep other formats in folders. `consolidated*.safetensors` is the
    same weights in another layout. Python files come along only when their code may run. Without `weights` only the small files
    are left, which say what the model is: configuration and tokenizer.
    """
    suffixes = (*_SUFFIXES, ".py") if trust_remote_code else _SUFFIXES
    return tuple(
        sorted(
            name
            for name in names
            if (name.endswith(suffixes) or _is_legal(name))
            and (weights or not name.endswith(_WEIGHTS))
            and not name.startswith((".", "consolidated"))
            and ("/" not in name or name.startswith("additional_chat_templates/"))
        )
    )


def companions(folder: Path) -> list[Path]:
    """Files of a model's folder that belong beside weights made from it: what its licence asks for, and how a multimodal model sees."""
    return sorted(path for path in folder.iterdir() if path.is_file() and (_is_legal(path.name) or path.name.endswith(_PROCESSOR)))


def require_model(names: Collection[str], where: str) -> None:
    """Refuses a folder that transformers could not load a model from.

    Raises:
        DataError: config.json or weights in safetensors are missing.
    """
    if "config.json" not in names:
        raise DataError(f"{where} has no config.json; it must name the folder of a transformers model.")
    if any(name.endswith(_WEIGHTS) and "/" not in name for name in names):
        return
    if any(name.endswith(_UNSAFE_WEIGHTS) for name in names):
        raise DataError(f"{where} has weights only as .bin or .pt, which can run code when loaded; convert them to safetensors.")
    raise DataError(f"{where} has a config.json but no .safetensors file; upload the weights as safetensors.")


def _is_legal(name: str) -> bool:
    return name.upper().startswith(_LEGAL)
