"""Where a source or destination is, and as whom it is opened: the parsed form of a URI in the spec.

Everything in sources/ and destinations/ works on a Location; the messages of their errors name it by its field. Pure.
"""

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from finetune_api import credentials
from finetune_api.job import JobDescription

from finetune_trainer.errors import SpecError


@dataclass(frozen=True)
class Location:
    """One URI of the spec.

    Attributes:
        field: path in the spec, for messages, such as `spec.model.source`.
        uri: as written.
        role: names the Secret's mount (finetune_api.credentials).
        volume: names the mount of a claim or ConfigMap under names.VOLUMES_ROOT.
        secret: the Secret's name; empty when none is given.
        endpoint: S3 endpoint; empty means AWS.
        private: whether a Hub repository must be private; it is made so when it is created.
        laptop: whether it is opened with this machine's own credentials, since Secrets are a cluster's.
    """

    field: str
    uri: str
    role: str
    volume: str = ""
    secret: str = ""
    endpoint: str = ""
    private: bool = False
    laptop: bool = False

    @property
    def secret_field(self) -> str:
        """Path of the field that names the Secret; held-out data is opened with the dataset's."""
        return f"{self.field.rpartition('.')[0].removesuffix('.evaluation')}.credentials.secretName"

    @property
    def scheme(self) -> str:
        """The part before `://`."""
        return urlsplit(self.uri).scheme

    @property
    def rest(self) -> str:
        """The part after `://`, as written."""
        return self.uri.partition("://")[2]

    @property
    def authority(self) -> str:
        """Bucket, claim, ConfigMap, owner or builtin name: everything up to the first slash."""
        return self.rest.partition("/")[0]

    @property
    def path(self) -> str:
        """Key, prefix or path below the authority, without slashes at its ends."""
        return self.rest.partition("/")[2].strip("/")


def model(job: JobDescription) -> Location:
    """The base model."""
    spec = job.spec.model
    secret = spec.credentials.secret_name
    return Location("spec.model.source", spec.source, credentials.MODEL, "model", secret, spec.endpoint, laptop=not job.in_cluster)


def dataset(job: JobDescription) -> Location:
    """The training data."""
    spec = job.spec.dataset
    secret = spec.credentials.secret_name
    return Location("spec.dataset.source", spec.source, credentials.DATASET, "dataset", secret, spec.endpoint, laptop=not job.in_cluster)


def evaluation(job: JobDescription) -> Location | None:
    """Held-out data of its own, opened with the dataset's credentials; None when a share of the dataset is held out instead."""
    spec = job.spec.dataset
    if not spec.evaluation.source:
        return None
    return Location(
        "spec.dataset.evaluation.source",
        spec.evaluation.source,
        credentials.DATASET,
        "evaluation",
        spec.credentials.secret_name,
        spec.endpoint,
        laptop=not job.in_cluster,
    )


def destinations(job: JobDescription) -> tuple[Location, ...]:
    """Where the artifacts go, in the spec's order."""
    return tuple(
        Location(
            f"spec.outputs.destinations[{index}].uri",
            item.uri,
            credentials.destination_role(index),
            secret=item.credentials.secret_name,
            endpoint=item.endpoint,
            private=item.private,
            laptop=not job.in_cluster,
        )
        for index, item in enumerate(job.spec.outputs.destinations)
    )


@dataclass(frozen=True)
class HubAddress:
    """What an hf:// URI names; `revision` is a branch, tag or commit, or None for the default branch."""

    repo_id: str
    revision: str | None
    path: str


def hub_address(location: Location, *, with_path: bool) -> HubAddress:
    """Reads `owner/name[@revision][/file]`; a slash inside a revision is written %2F.

    Args:
        location: an hf:// location.
        with_path: whether a file must follow (datasets) or must not (models, destinations).

    Raises:
        SpecError: when the form is another one.
    """
    parts = location.rest.strip("/").split("/")
    wanted = "hf://owner/name[@revision]/file" if with_path else "hf://owner/name[@revision]"
    if not all(parts) or (len(parts) < 3 if with_path else len(parts) != 2):
        raise SpecError(f"{location.field} is {location.uri!r}, but a Hub address here has the form {wanted}.")
    name, at, revision = parts[1].partition("@")
    if not name or (at and not revision):
        raise SpecError(f"{location.field} is {location.uri!r}, but a Hub address here has the form {wanted}.")
    return HubAddress(f"{parts[0]}/{name}", unquote(revision) or None, "/".join(parts[2:]))
