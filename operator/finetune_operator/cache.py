"""What watches, listings and our own writes have shown of the cluster, so that a pass over one job needs no request to see it.

Nothing here is relied on where being wrong would cost a training: writes are fenced by the resourceVersion they were decided on, and observation.py
says when the API server itself is asked. Objects are kept as JSON text of the fields that decisions read, and not at all once their job has ended.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api import names

from finetune_operator.subject import Json, Key

_TOMBSTONE = 1 << 62  # newer than any version: an event that comes after the deletion's is an old one


class Kind(StrEnum):
    """What is watched."""

    FINETUNEJOB = "FineTuneJob"
    JOB = "Job"
    POD = "Pod"


def _fields(*plain: str, **nested: Json | None) -> Json:
    return {**dict.fromkeys(plain), **nested}


_CHILD = _fields("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", ownerReferences=_fields("uid", "controller"))
_CONDITION = _fields("type", "status", "reason", "message", "lastTransitionTime")
# The fields that are kept. None keeps a value as a whole; the fields of a list are those of its items.
_KEPT: dict[Kind, Json] = {
    Kind.FINETUNEJOB: _fields(
        "spec",
        "status",
        metadata=_fields("name", "namespace", "uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp"),
    ),
    Kind.JOB: _fields(
        metadata=_CHILD,
        spec=_fields("suspend", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"),
        status=_fields("completionTime", conditions=_CONDITION),
    ),
    Kind.POD: _fields(
        metadata=_CHILD,
        spec=_fields("nodeName", containers=_fields("name", "image")),
        status=_fields("phase", "reason", "message", "podIP", conditions=_CONDITION, containerStatuses=_fields("name", "state")),
    ),
}


@dataclass(frozen=True)
class _Known:
    """An object that was seen: its resourceVersion, and the job that it belongs to. This outlives what is kept of the object."""

    version: int
    place: Key


class Cache:
    """Objects by the FineTuneJob that they are or belong to.

    resourceVersions of one kind are compared as numbers, which Kubernetes promises since 1.35 (KEP-5504) and has always done.
    """

    def __init__(self) -> None:
        self._known: dict[Kind, dict[str, _Known]] = {kind: {} for kind in Kind}
        self._kept: dict[Kind, dict[Key, dict[str, bytes]]] = {kind: {} for kind in Kind}
        self._finished: set[Key] = set()
        self._long_names: dict[Key, str] = {}
        self._tombstones: set[tuple[Kind, str]] = set()
        self._earlier_tombstones: set[tuple[Kind, str]] = set()

    def update(self, kind: Kind, raw: Json) -> Key | None:
        """Takes in an object from an event, a listing or an answer, unless a newer one is known.

        Returns:
            The job to look at; None when nothing that matters has changed.
        """
        uid, version, place = raw["metadata"]["uid"], int(raw["metadata"]["resourceVersion"]), self._place(kind, raw["metadata"])
        known = self._known[kind].get(uid)
        if known and known.version >= version:
            return None
        self._known[kind][uid] = _Known(version, place)
        if kind is Kind.FINETUNEJOB:
            self._finished.discard(place)
        elif place in self._finished:
            return None
        kept = json.dumps(_picked(raw, _KEPT[kind]), separators=(",", ":")).encode()
        objects = self._kept[kind].setdefault(place, {})
        before, objects[uid] = objects.get(uid), kept
        return self._key(place) if kept != before and self._is_kept(place) else None

    def delete(self, kind: Kind, raw: Json) -> Key | None:
        """Takes in that an object was deleted. Returns the job to look at, as update() does."""
        uid, place = raw["metadata"]["uid"], self._place(kind, raw["metadata"])
        self._known[kind][uid] = _Known(_TOMBSTONE, place)
        self._tombstones.add((kind, uid))
        is_kept = self._is_kept(place)
        self._remove(kind, place, uid)
        return self._key(place) if is_kept else None

    def evict_finetunejob(self, key: Key) -> None:
        """Evicts a FineTuneJob that is gone. Its Jobs and pods stay until their own deletion is seen, since one of the same name must know of them."""
        self._kept[Kind.FINETUNEJOB].pop(_place_of(key), None)
        self._long_names.pop(_place_of(key), None)

    def mark_finished(self, key: Key) -> None:
        """Evicts a FineTuneJob that has ended, its Jobs and its pods. Until it changes itself, nothing of them is kept and nothing is news.

        Which versions were seen stays known, so that their echoes are no news either.
        """
        place = _place_of(key)
        for kind in Kind:
            self._kept[kind].pop(place, None)
        self._long_names.pop(place, None)
        self._finished.add(place)

    def finetunejob(self, key: Key) -> Json | None:
        """The FineTuneJob as it was last seen; None when it is not kept."""
        objects = self._kept[Kind.FINETUNEJOB].get(_place_of(key), {})
        newest = max(objects, key=lambda uid: self._known[Kind.FINETUNEJOB][uid].version, default=None)
        return dict(json.loads(objects[newest])) if newest else None

    def children(self, kind: Kind, key: Key) -> tuple[Json, ...]:
        """The Jobs or pods that carry the job's label."""
        return tuple(json.loads(text) for text in self._kept[kind].get(_place_of(key), {}).values())

    def is_child(self, uid: str) -> bool:
        """Whether a Job or pod of this UID carries a job's label."""
        return uid in self._known[Kind.JOB] or uid in self._known[Kind.POD]

    def delete_unlisted(self, kind: Kind, uids: Iterable[str], version: int, key: Key | None = None) -> list[Key]:
        """Deletes what a listing should have shown and has not.

        Args:
            uids: what was listed.
            version: resourceVersion of the listing; what is newer is left alone.
            key: the job that was asked for; None for all.

        Returns:
            The jobs to look at.
        """
        listed, keys = set(uids), []
        for uid in list(self._kept[kind].get(_place_of(key), {}) if key else self._known[kind]):
            known = self._known[kind][uid]
            if uid not in listed and known.version <= version:
                del self._known[kind][uid]
                if self._is_kept(known.place):
                    keys.append(self._key(known.place))
                self._remove(kind, known.place, uid)
        return keys

    def prune_tombstones(self) -> None:
        """Removes the tombstones that have outlasted two rounds of listings. Called when a round has ended."""
        for kind, uid in self._earlier_tombstones:
            self._known[kind].pop(uid, None)
        self._tombstones, self._earlier_tombstones = set(), self._tombstones

    def _is_kept(self, place: Key) -> bool:
        """Whether the job itself is kept. Where it is not, its Jobs and pods are no news: it has ended, is gone, or will be news itself."""
        return place in self._kept[Kind.FINETUNEJOB]

    def _remove(self, kind: Kind, place: Key, uid: str) -> None:
        if kind is Kind.FINETUNEJOB:
            self._finished.discard(place)
        objects = self._kept[kind].get(place, {})
        objects.pop(uid, None)
        if not objects:
            self._kept[kind].pop(place, None)

    def _place(self, kind: Kind, metadata: Json) -> Key:
        """Where an object is kept. A Job or pod stays where it was seen first: kept under another label too, its deletion would leave the first copy."""
        if kind is not Kind.FINETUNEJOB:
            known = self._known[kind].get(metadata["uid"])
            return known.place if known else Key(metadata["namespace"], (metadata.get("labels") or {}).get(names.LABEL_JOB, ""))
        place = Key(metadata["namespace"], names.job_label(metadata["name"]))
        if place.name != metadata["name"]:
            self._long_names[place] = metadata["name"]
        return place

    def _key(self, place: Key) -> Key:
        return Key(place.namespace, self._long_names.get(place, place.name))


def _place_of(key: Key) -> Key:
    return Key(key.namespace, names.job_label(key.name))


def _picked(value: Any, wanted: Json | None) -> Any:
    if wanted is None or not value:
        return value
    if isinstance(value, list):
        return [_picked(item, wanted) for item in value]
    return {name: _picked(value[name], inner) for name, inner in wanted.items() if name in value}
