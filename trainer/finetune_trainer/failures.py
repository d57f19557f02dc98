"""Turns any exception into a typed failure with a sentence: full disks, lost memory, and what nobody foresaw. Used by pipeline.py and cli.py."""

import errno

from finetune_trainer.errors import CapacityError, FineTuneError, InfrastructureError


def classify(error: BaseException) -> FineTuneError:
    """The failure as one of errors.py's; what was typed already stays as it is."""
    if isinstance(error, FineTuneError):
        return error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return CapacityError("Out of memory; lower training.maxLength or lora.rank, use dtype bfloat16, or give the job more memory.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(f"No space is left on the disk while writing {error.filename or 'a file'}; free some, or raise storage.workspace.size.")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CapacityError(f"{error.filename or 'A file'} may not be written ({error.strerror}); mend its permissions or choose another --workdir.")
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return InfrastructureError(f"Unexpected {type(error).__name__}: {first or 'no message'}. The whole traceback is in the debug log; please report it.")
