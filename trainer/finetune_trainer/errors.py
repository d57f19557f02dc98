"""Every way a run can end badly: a small hierarchy, one exit code each.

FineTuneError
├── SpecError            the job description is wrong
├── DataError            the dataset or the model's files are wrong
├── AccessError          credentials are missing, wrong or not allowed
├── CapacityError        this machine can't do it
├── ProofError           the exported model is not the trained one
├── QualityError         the quality gate refused the model
├── InfrastructureError  network, storage or a service failed; a retry may pass
├── NotPublishedError    trained, but an upload failed
└── Checkpointed         stopped by SIGTERM or Ctrl-C after saving the last completed step

The message is one sentence for the user: the thing, what was found, and the mend. cli.py prints it without a traceback.
"""

from typing import ClassVar

from finetune_api.exits import REASONS, ExitCode


class FineTuneError(Exception):
    """A failure that a user can read: `str()` is the whole sentence."""

    exit_code: ClassVar[ExitCode] = ExitCode.INFRASTRUCTURE

    @property
    def reason(self) -> str:
        """The CamelCase reason for status and termination message."""
        return REASONS[self.exit_code]


class SpecError(FineTuneError):
    """The job description is wrong."""

    exit_code = ExitCode.SPEC


class DataError(FineTuneError):
    """The dataset or the model's files are wrong."""

    exit_code = ExitCode.DATA


class AccessError(FineTuneError):
    """Credentials are missing, wrong or not allowed."""

    exit_code = ExitCode.ACCESS


class CapacityError(FineTuneError):
    """This machine can't do it: memory, disk, no kernel for the scheme."""

    exit_code = ExitCode.CAPACITY


class ProofError(FineTuneError):
    """The exported model is not the trained one."""

    exit_code = ExitCode.PROOF


class QualityError(FineTuneError):
    """The quality gate refused the model."""

    exit_code = ExitCode.QUALITY


class InfrastructureError(FineTuneError):
    """Network, storage or a service failed; a retry may pass."""

    exit_code = ExitCode.INFRASTRUCTURE


class NotPublishedError(FineTuneError):
    """Trained, but an upload failed; a retry resumes at publishing."""

    exit_code = ExitCode.NOT_PUBLISHED


class Checkpointed(FineTuneError):  # noqa: N818 an orderly end, not an error of anyone's
    """Stopped by SIGTERM or Ctrl-C after saving the last completed step."""

    exit_code = ExitCode.CHECKPOINTED
