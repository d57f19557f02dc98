"""How fast and how small the operator is (`make bench-operator`): a real API server, kwok plays the pods, the operator of this checkout at its defaults.

Each part has a fresh cluster of its own without a real node. Ends with a table of each figure beside its bar; `--jobs 300` is a quick look, whose figures
no bar is held against. The file is not named operator.py, which would shadow Python's own module of that name.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_operator import subject
from finetune_operator.decide import decide
from finetune_operator.plan import CreateJob, EmitEvent, WriteStatus
from finetune_operator.settings import Settings
from load import (
    FINETUNEJOBS,
    JOBS,
    NAMESPACE,
    PARALLEL,
    TooSlowError,
    World,
    finetunejob,
    foreign_pods_run,
    in_parallel,
    make_foreign_pods,
    patch_status,
    world,
)

RESULTS = Path(__file__).parent / "results" / "operator.json"
SINGLE, AT_ONCE, FINISHED, FLOOD, FOREIGN, PREFLIGHTS = 100, 1_000, 4_000, 10_000, 20_000, 20
SETTLE_SECONDS = 60.0  # after a restart: one resync
MEGABYTE, KIBIBYTE = 1e6, 1024


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        bar: the most it may be; None where it is only told.
        holds: None where there is no bar, or the size was not the full one.
        detail: what else was seen.
    """

    figure: str
    value: float
    unit: str
    bar: float | None = None
    holds: bool | None = None
    detail: str = ""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    jobs: int
    idle_minutes: float
    number: int

    def limit(self, full: int) -> int:
        """The size of a part: the full one, or as many as were asked for."""
        return min(full, self.jobs) if self.jobs < FLOOD else full

    def figure(self, name: str, value: float, unit: str, bar: float, full: int, detail: str = "") -> Figure:
        """A figure with a bar, which is held against it at full size only."""
        size = self.limit(full)
        said = "; ".join(part for part in (detail, f"size {size} of {full}" if size < full else "") if part)
        return Figure(name, value, unit, bar, None if size < full else value <= bar, said)

    def patience(self, jobs: int) -> float:
        """Seconds after which a part is given up."""
        return 120 + 0.2 * jobs


async def one_at_a_time(sizes: Sizes) -> AsyncIterator[Figure]:
    """Apply to Job on an idle operator; the next is applied when the one before has succeeded."""
    count = sizes.limit(SINGLE)
    async with world(sizes.number, run_seconds=0.5) as made:
        mark = await made.audit.quiet()
        wanted = [f"exit-0-single-{index}" for index in range(count)]
        for name in wanted:
            await made.handled(name)
            await made.seen.until(f"the end of {name}", lambda name=name: made.seen.phases.get(name) == "Succeeded", 60)
        await made.audit.quiet()
        delays = made.seen.delays(made.seen.jobs, wanted)
        yield sizes.figure("apply to Job, idle, one at a time: p50", 1000 * percentile(delays, 50), "ms", 25, SINGLE)
        yield sizes.figure("apply to Job, idle, one at a time: p99", 1000 * percentile(delays, 99), "ms", 80, SINGLE)
        for item in writes_per_job(sizes, made, mark, count, "one at a time", SINGLE):
            yield item


async def at_once(sizes: Sizes) -> AsyncIterator[Figure]:
    """1,000 applied at once, until all have succeeded; before it, what these writes cost without an operator."""
    count = sizes.limit(AT_ONCE)
    bare_apply, bare_writes = await _bare(sizes, count)
    detail = f"apply {bare_apply:.1f} s, writes {bare_writes:.1f} s; {count} jobs"
    yield Figure("1,000 by a bare client: applied, then its writes", bare_apply + bare_writes, "s", detail=detail)
    async with world(sizes.number) as made:
        mark, cpu, started = await made.audit.quiet(), made.cpu_seconds(), time.perf_counter()
        wanted = [f"exit-0-burst-{index}" for index in range(count)]
        await made.apply(wanted)
        await made.seen.until("every Job", lambda: len(made.seen.jobs) > count, sizes.patience(count))
        delays, used = made.seen.delays(made.first_jobs(mark), wanted), cpu_between(cpu, made.cpu_seconds())
        detail = f"p50 {percentile(delays, 50):.1f} s; CPU seconds {used}"
        yield sizes.figure("apply to Job, 1,000 at once: p99", percentile(delays, 99), "s", 10, AT_ONCE, detail)
        await made.seen.until("every success", lambda: made.seen.count("Succeeded") > count, sizes.patience(count))
        ended = time.perf_counter() - started
        yield Figure("1,000 at once: until all have succeeded", ended, "s", detail=f"{count} jobs that run for 1 s")
        await made.audit.quiet()
        for item in writes_per_job(sizes, made, mark, count, "at once", AT_ONCE):
            yield item


async def preflight(sizes: Sizes) -> AsyncIterator[Figure]:
    """Jobs that want a GPU, each checked by a Job without one first."""
    count = sizes.limit(PREFLIGHTS)
    async with world(sizes.number) as made:
        mark = await made.audit.quiet()
        await made.apply([f"exit-0-gpu-{index}" for index in range(count)], gpus=1)
        await made.seen.until("every success", lambda: made.seen.count("Succeeded") > count, sizes.patience(count))
        await made.audit.quiet()
        how = f"with a GPU, {len(made.seen.preflights)} preflight Jobs"
        for item in writes_per_job(sizes, made, mark, count, how, PREFLIGHTS, bar=8):
            yield item


async def finished(sizes: Sizes) -> AsyncIterator[Figure]:
    """What the operator's memory grows by with each job that has ended. A first batch warms it up, and no later one is larger: memory for many at work stays."""
    count = sizes.limit(FINISHED)
    batch = count // 4
    async with world(sizes.number, run_seconds=0.5) as made:
        memory = []
        for number in range(1, 6):
            await made.apply([f"exit-0-batch{number}-{index}" for index in range(batch)])
            await made.seen.until(
                "every success", lambda number=number: made.seen.count("Succeeded") > number * batch, sizes.patience(batch)
            )
            await made.audit.quiet()
            memory.append(made.memory_bytes())
        detail = f"{' / '.join(f'{item / MEGABYTE:.0f}' for item in memory)} MB after each {batch}"
        yield sizes.figure("memory per finished object", (memory[-1] - memory[0]) / (4 * batch) / KIBIBYTE, "KiB", 10, FINISHED, detail)


async def foreign(sizes: Sizes) -> AsyncIterator[Figure]:
    """What 20,000 pods of others, made and running, change the operator's memory by."""
    count = min(FOREIGN, 2 * sizes.jobs)
    async with world(sizes.number, nodes=2) as made:
        await made.audit.quiet()
        before, cpu = made.memory_bytes(), made.cpu_seconds()
        await make_foreign_pods(made.api, count, "fake1")
        await foreign_pods_run(made.api)
        await made.audit.quiet()
        change, size = (made.memory_bytes() - before) / MEGABYTE, f"size {count} of {FOREIGN}" if count < FOREIGN else ""
        detail = "; ".join(part for part in (f"CPU seconds {cpu_between(cpu, made.cpu_seconds())}", size) if part)
        holds = None if size else change < 10
        yield Figure("memory change by 20,000 foreign pods", change, "MB", 10, holds, detail)


async def flood(sizes: Sizes) -> AsyncIterator[Figure]:
    """10,000 that run for ever: the time, against a bare client's; then memory, a restart, and idle minutes among them."""
    count = sizes.limit(FLOOD)
    bare_apply, bare_writes = await _bare(sizes, count)
    async with world(sizes.number) as made:
        mark, cpu, started = made.audit.mark(), made.cpu_seconds(), time.perf_counter()
        wanted = [f"wait-flood-{index}" for index in range(count)]
        await made.apply(wanted)
        everything = lambda: len(made.seen.jobs) > count and len(made.seen.statuses) > count  # noqa: E731
        await made.seen.until("every Job and every first status", everything, sizes.patience(count))
        used = cpu_between(cpu, made.cpu_seconds())
        jobs = made.first_jobs(mark)
        ended = max(*jobs.values(), *made.audit.first("finetunejobs/status", mark).values()) - started
        detail = f"p99 apply to Job {percentile(made.seen.delays(jobs, wanted), 99):.1f} s; CPU seconds {used}"
        yield Figure("10,000 applied: until every Job and first status", ended, "s", detail=detail)
        yield Figure("a bare client: the same applied, and its writes", bare_apply + bare_writes, "s", detail=f"writes {bare_writes:.1f} s")
        yield sizes.figure("10,000 applied, bare client = 1", ended / (bare_apply + bare_writes), "ratio", 2, FLOOD)
        yield Figure("the same against the writes alone", ended / bare_writes, "ratio")
        await made.seen.until("every pod at work", lambda: made.seen.count("Running") >= count, sizes.patience(count))
        await made.audit.quiet()
        yield _unfinished_memory(sizes, made)
        for item in await _restart(sizes, made):
            yield item
        yield await _idle(sizes, made)


async def _bare(sizes: Sizes, count: int) -> tuple[float, float]:
    """Seconds that a bare asyncio client needs to apply as many, and then to write what the operator would write first, with no operator there."""
    settings = Settings()
    async with world(sizes.number, operator=False) as made:
        there: list[dict[str, Any]] = []

        async def apply(index: int) -> None:
            there.append(await made.api.request("POST", FINETUNEJOBS, finetunejob(f"wait-bare-{index}")))

        async def write(planned: tuple[str, str, Any]) -> None:
            name, version, plan = planned
            for action in plan.actions:
                match action:
                    case WriteStatus(patch):
                        await patch_status(made.api, name, version, patch)
                    case CreateJob(manifest):
                        await made.api.request("POST", JOBS, manifest)
                    case EmitEvent(event):
                        await made.api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/events", event)
                    case _:
                        raise AssertionError(f"nothing that a first pass would do: {action}")

        apply_seconds = await _timed(in_parallel(range(count), apply))
        plans = []
        for raw in there:
            plan = decide(subject.World(subject.read_subject(raw)), datetime.now(UTC), settings)
            plans.append((raw["metadata"]["name"], raw["metadata"]["resourceVersion"], plan))
        return apply_seconds, await _timed(in_parallel(plans, write))


async def _timed(work: Awaitable[None]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def _unfinished_memory(sizes: Sizes, made: World) -> Figure:
    peak = f"peak {made.memory_bytes('VmHWM') / MEGABYTE:.0f} MB"
    return sizes.figure("memory at 10,000 unfinished", made.memory_bytes() / MEGABYTE, "MB", 350, FLOOD, peak)


async def _restart(sizes: Sizes, made: World) -> list[Figure]:
    """As in a rollout: one ends well, the next starts, and a new object is applied at that moment. Whatever is written to an old one that does not change it was needless."""
    versions, mark = await _versions(made), made.audit.mark()
    made.operator.stop()
    started = time.perf_counter()
    made.operator.start()
    await made.handled("wait-new", sizes.patience(sizes.jobs))
    first = made.seen.jobs["wait-new"] - started
    await asyncio.sleep(max(0.0, SETTLE_SECONDS - (time.perf_counter() - started)))
    old = [item for item in writes(made, mark) + events(made, mark) if "wait-new" not in item["name"]]
    now = await _versions(made)
    useful = [item for item in old if item["resource"] == "finetunejobs/status" and now[item["name"]] != versions[item["name"]]]
    memory = f"memory {made.memory_bytes() / MEGABYTE:.0f} MB, peak {made.memory_bytes('VmHWM') / MEGABYTE:.0f} MB"
    return [
        sizes.figure("restart: first new object has its Job", first, "s", 10, FLOOD, memory),
        sizes.figure("restart: writes that change nothing", len(old) - len(useful), "writes", 0, FLOOD, f"{len(useful)} that do"),
    ]


async def _versions(made: World) -> dict[str, str]:
    return {item["metadata"]["name"]: item["metadata"]["resourceVersion"] async for item in made.api.list(FINETUNEJOBS)}


async def _idle(sizes: Sizes, made: World) -> Figure:
    await made.seen.until("the new pod at work", lambda: made.seen.phases.get("wait-new") == "Running", 60)
    mark, cpu = await made.audit.quiet(), made.cpu_seconds()
    await asyncio.sleep(60 * sizes.idle_minutes)
    leases = sum(item["resource"] == "leases" for item in made.audit.writes(mark))
    used = cpu_between(cpu, made.cpu_seconds())
    others = len(writes(made, mark)) + len(events(made, mark))
    detail = f"{sizes.idle_minutes:g} minutes, all jobs running; {leases} of the Lease; CPU seconds {used}"
    return sizes.figure("idle: writes apart from the Lease", others, "writes", 0, FLOOD, detail)


PARTS: dict[str, Callable[[Sizes], AsyncIterator[Figure]]] = {
    "one-at-a-time": one_at_a_time,
    "at-once": at_once,
    "preflight": preflight,
    "finished": finished,
    "foreign": foreign,
    "flood": flood,
}


def writes(made: World, mark: int) -> list[dict[str, Any]]:
    """The operator's since a mark, without Events and the Lease."""
    return [item for item in made.audit.writes(mark) if item["resource"] not in ("events", "leases")]


def events(made: World, mark: int) -> list[dict[str, Any]]:
    """The Events that the operator asked for since a mark."""
    return [item for item in made.audit.writes(mark) if item["resource"] == "events"]


def writes_per_job(sizes: Sizes, made: World, mark: int, count: int, how: str, full: int, bar: int = 5) -> list[Figure]:
    """From apply to Succeeded, the TTL included."""
    kinds: dict[str, int] = {}
    for item in writes(made, mark):
        kind = f"{item['verb']} {item['resource']}" + (f" ({item['code']})" if item["code"] >= 300 else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    detail = ", ".join(f"{kind} {number / count:.2f}" for kind, number in sorted(kinds.items()))
    return [
        sizes.figure(f"writes per job, {how}", sum(kinds.values()) / count, "writes", bar, full, detail),
        sizes.figure(f"Events per job, {how}", len(events(made, mark)) / count, "Events", 4, full),
    ]


def percentile(values: list[float], percent: float) -> float:
    """Of sorted values, by nearest rank."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)]


def cpu_between(before: dict[str, float], after: dict[str, float]) -> str:
    """What each process used in between, in seconds, as a phrase."""
    names = {"kube-apiserver": "API server", "kube-controller-manager": "controllers", "kube-scheduler": "scheduler"}
    return ", ".join(f"{names.get(name, name)} {after[name] - before[name]:.1f}" for name in after if name in before)


def tell(item: Figure) -> None:
    """As it comes."""
    print(f"{item.figure}: {shown(item.value)} {item.unit}" + (f" ({item.detail})" if item.detail else ""), file=sys.stderr, flush=True)


def shown(value: float) -> str:
    """Three significant digits, or a whole number."""
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def table(figures: list[Figure]) -> str:
    """As BENCHMARKS.md has it."""
    rows = ["| figure | measured | must be | holds |", "|---|---|---|---|"]
    for item in figures:
        bar = "" if item.bar is None else f"<= {shown(item.bar)} {item.unit}"
        holds = {True: "yes", False: "**no**", None: ""}[item.holds]
        rows.append(f"| {item.figure} | {shown(item.value)} {item.unit} | {bar} | {holds} |")
    return "\n".join(rows)


def save(figures: list[Figure], sizes: Sizes) -> None:
    """The figures with the commit that they are of. Those of parts that were not run now stay as they are."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=True
    ).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    known = {item["figure"]: item for item in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    known |= {item.figure: asdict(item) | {"commit": commit, "machine": machine, "jobs": sizes.jobs} for item in figures}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(list(known.values()), indent=1) + "\n")


async def measure(parts: list[str], sizes: Sizes) -> tuple[list[Figure], bool]:
    """The figures of these parts, and whether every part came to its end."""
    figures, whole = [], True
    for part in parts:
        print(f"--- {part} (load of the machine before it: {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            async for item in PARTS[part](sizes):
                tell(item)
                figures.append(item)
        except* (TooSlowError, AssertionError) as group:
            print(f"{part} was given up: {'; '.join(map(str, group.exceptions))}", file=sys.stderr, flush=True)
            whole = False
        print(f"({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    return figures, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=FLOOD, help="most FineTuneJobs of any part; fewer is a quick look (default: 10,000)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="which parts")
    parser.add_argument("--idle-minutes", type=float, default=1, help="how long the operator is watched doing nothing")
    parser.add_argument("--full", action="store_true", help="5 idle minutes, as BENCHMARKS.md has it")
    parser.add_argument(
        "--results", action="store_true", help=f"writes the figures to benchmarks/results/{RESULTS.name}, beside those of other parts"
    )
    parser.add_argument("--cluster-number", type=int, default=99, help="see tests/cluster/up.sh: one that no test uses")
    chosen = parser.parse_args()
    sizes = Sizes(chosen.jobs, 5 if chosen.full else chosen.idle_minutes, chosen.cluster_number)
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {PARALLEL} connections", file=sys.stderr)
    figures, whole = asyncio.run(measure(chosen.only, sizes))
    print(table(figures))
    if chosen.results:
        save(figures, sizes)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
