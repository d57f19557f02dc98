"""The resolved job description: what the operator puts into the pod's environment, and what the trainer runs.

The same shape as the YAML a user applies, with the object's identity and the two digests.
"""

from typing import Any

from pydantic import Field

from finetune_api.digests import run_digest, train_digest
from finetune_api.fields import ApiModel
from finetune_api.spec import FineTuneJobSpec


class JobDescription(ApiModel):
    """One run of one FineTuneJob."""

    name: str = Field(description="Name of the FineTuneJob.")
    namespace: str = Field("", description="Its namespace; empty on a laptop.")
    uid: str = Field("", description="Its UID; empty on a laptop.")
    train_digest: str = Field(description="Digest of the fields that change the weights.")
    run_digest: str = Field(description="Digest of the fields that change the run.")
    in_cluster: bool = Field(False, description="Whether credentials and volumes are mounted where names.py says.")
    spec: FineTuneJobSpec = Field(description="The spec as written.")

    @classmethod
    def of(cls, metadata: dict[str, Any], spec: FineTuneJobSpec, *, in_cluster: bool) -> "JobDescription":
        """The description of an object's current run."""
        return cls(
            name=metadata.get("name") or "job",
            namespace=metadata.get("namespace", ""),
            uid=metadata.get("uid", ""),
            train_digest=train_digest(spec),
            run_digest=run_digest(spec),
            in_cluster=in_cluster,
            spec=spec,
        )

    def to_json(self) -> str:
        """For the environment variable `names.ENV_JOB`."""
        return self.model_dump_json(by_alias=True, exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str) -> "JobDescription":
        """Reads what `to_json` wrote.

        Raises:
            pydantic.ValidationError: when the text is not a description of this version.
        """
        return cls.model_validate_json(text)
