"""Many FineTuneJobs with people who change their minds about them: what the fault tests apply, edit, suspend, rerun and delete. Acts beside any proxy."""

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

from support.api_client import MERGE, ApiClient, Json, RefusedError
from support.promises import paths_in, phase_of
from support.specs import job, minimal_spec

# How tests/cluster/kwok/stages.yaml ends a job of this name, and what its FineTuneJob comes to.
ENDINGS = {
    "exit-0": "Succeeded", "flaky-16": "Succeeded", "exit-11": "Failed", "evicted": "Succeeded", "wait": "Running", "oom": "Failed"
}  # fmt: skip
_ROUND = ("exit-0", "flaky-16", "exit-11", "evicted", "exit-0", "wait", "flaky-16", "exit-0", "oom", "evicted")
_CHANGES = {"suspend": 3, "resume": 3, "train": 2, "rerun": 2, "live": 1, "delete": 1, "replace": 1}


@dataclass
class Crowd:
    """FineTuneJobs of one namespace.

    Attributes:
        done: how often each kind of change was made.
    """

    api: ApiClient
    namespace: str
    dice: random.Random
    names: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    @property
    def path(self) -> str:
        """Where they lie."""
        return paths_in(self.namespace)["finetunejobs"]

    async def apply(self, count: int, seconds: float = 0.0, kinds: tuple[str, ...] = _ROUND) -> list[str]:
        """Makes so many within about so many seconds and returns their names."""
        made = []
        for _ in range(count):
            number = next(self._numbers)
            name = f"{kinds[number % len(kinds)]}-{number:03}"
            await self._create(name)
            made.append(name)
            self.names.append(name)
            await asyncio.sleep(self.dice.uniform(0, 2 * seconds / count))
        return made

    async def change(self, kind: str, name: str) -> None:
        """One change; none where the object is gone."""
        number = next(self._numbers)
        edits: dict[str, Json] = {
            "suspend": {"runPolicy": {"suspend": True}},
            "resume": {"runPolicy": {"suspend": False}},
            "train": {"training": {"seed": number}},
            "rerun": {"runPolicy": {"rerun": f"again-{number}"}},
            "live": {"runPolicy": {"backoffLimit": 3 + number % 5}},
        }
        try:
            if kind in edits:
                await self.api.request("PATCH", f"{self.path}/{name}", {"spec": edits[kind]}, MERGE)
            else:
                await self.api.request("DELETE", f"{self.path}/{name}")
                self.names.remove(name)
            if kind == "replace":
                await self._create(name)
                self.names.append(name)
        except RefusedError as error:
            if error.status != 404:
                raise
        self.done[kind] += 1

    async def disturb(self, count: int, seconds: float) -> None:
        """So many changes of mind within about so many seconds."""
        for _ in range(count):
            await asyncio.sleep(self.dice.uniform(0, 2 * seconds / count))
            if self.names:
                (kind,) = self.dice.choices(list(_CHANGES), list(_CHANGES.values()))
                await self.change(kind, self.dice.choice(self.names))

    async def resume_all(self) -> None:
        """Nothing that would end stays suspended."""
        for name in list(self.names):
            if expected(name) != "Running":
                await self.change("resume", name)
                self.done["resume"] -= 1

    async def unexpected(self) -> list[str]:
        """What came to another end than its name says."""
        found = {item["metadata"]["name"]: phase_of(item) async for item in self.api.list(self.path)}
        problems = [f"{name} is missing" for name in self.names if name not in found]
        problems += [f"{name} should be gone" for name in found if name not in self.names]
        allowed = {name: {expected(name), "Suspended" if expected(name) == "Running" else expected(name)} for name in found}
        return problems + [f"{name} is {phase}, not {expected(name)}" for name, phase in found.items() if phase not in allowed[name]]

    async def _create(self, name: str) -> None:
        number = int(name.rpartition("-")[2])
        cleaned_up = {"runPolicy": {"ttlSecondsAfterFinished": 2}} if number % 4 == 0 else {}
        await self.api.request("POST", self.path, job(minimal_spec() | cleaned_up, name))


def expected(name: str) -> str:
    """The phase that a job of this name comes to when nobody suspends it."""
    return ENDINGS[name.rpartition("-")[0]]
