"""Turns any exception into a typed failure with a sentence: full disks, lost memory, and what nobody foresaw.

Used by pipeline.py and cli.py; load.py and verify.py ask it which errors speak of memory and not of the model.
"""

import errno

from finetune_api.redaction import without_secrets

from finetune_trainer.errors import CapacityError, FineTuneError, InfrastructureError

DEBUG_LOG = "debug.log"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "MemoryError",
    "can't allocate memory",
    "Cannot allocate memory",
    "CUDA out of memory",  # the caching allocator's words; the driver's and the libraries' are others
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "bad_alloc",
)


def classify(error: BaseException) -> FineTuneError:
    """The failure as one of errors.py's; what was typed already stays as it is."""
    if isinstance(error, FineTuneError):
        return error
    if is_out_of_memory(error):
        return CapacityError("Out of memory; lower training.maxLength or lora.rank, use dtype bfloat16, or give the job more memory.")
    if isinstance(error, OSError) and error.errno in _FULL:
        place = error.filename or "a file"
        return CapacityError(f"No space is left on the disk while writing {place}; free some, or raise storage.workspace.size.")
    if isinstance(error, OSError) and error.errno in _REFUSED:
        place = error.filename or "A file"
        return CapacityError(f"{place} may not be written ({error.strerror}); mend its permissions or choose another --workdir.")
    if "No space left on device" in str(error):  # safetensors and tokenizers bring the system's words, but no number
        return CapacityError("No space is left on the disk; free some, or raise storage.workspace.size.")
    return InfrastructureError(
        f"Unexpected {type(error).__name__}: {first_line(error) or 'no message'}. "
        f"FINETUNE_DEBUG=1 shows the traceback, and a run leaves it in {DEBUG_LOG} in its working directory; please report it."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on the GPU (by name, since torch may not be loaded)."""
    named = type(error).__name__ == "OutOfMemoryError"
    return named or isinstance(error, MemoryError) or speaks_of_memory(str(error))


def speaks_of_memory(text: str) -> bool:
    """Whether these words, such as the output of a process, say that memory ran out."""
    return any(words in text for words in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """The beginning of what a library says, short enough for a sentence, without what looks like a credential: nobody knows what it quotes."""
    return (without_secrets(str(error)).strip().splitlines() or [""])[0][:300].rstrip(".")
