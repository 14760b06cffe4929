"""The measurement: level by level and seed by seed, all systems in turns with the very same requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from msgspec import Struct

from bascule.bench.compare.plan import MOST_SEEDS, SEEDS, Pace, Plan, hopeless, plan, seconds
from bascule.bench.compare.systems import Stage, System
from bascule.bench.load import Offer, Run, Watch
from bascule.errors import BasculeError
from bascule.traffic.prompts import trace_talks
from bascule.traffic.traces import TraceRequest, repeated
from bascule.traffic.workloads import VOCABULARY, WORKLOADS, Ask, Talk, talks
from bascule.types import Slo

_END_S = 8.0
"""Kept for stopping everything and for the report."""
_CROWD, _MANY, _LONG_MINUTES = 4, 8, 15.0
"""Clients of the first measurement, and its requests where there are minutes enough (else one for each client)."""
_SURE = 1.15
"""A level is begun only if the time is enough for so many times what it took before."""
_KNOCK_S, _KNOCK_TOKENS = 30.0, 8
_OTHER = 1_000_000
"""Seeds of requests that count nowhere begin here."""


class NothingMeasured(BasculeError):
    """Not one level was measured with all systems."""


class Cell(Struct, frozen=True):
    """One level with one seed."""

    level: int
    seed: int


class Traffic(Struct, frozen=True):
    """What is offered. Every cell has prompts of its own, so that no cache knows them from another one."""

    workload: str
    trace: tuple[TraceRequest, ...] = ()
    seed: int = 1
    vocabulary: range = VOCABULARY

    @property
    def turns(self) -> int:
        """Requests of the longest conversation; a client holds one at a time."""
        return 1 if self.trace else max(kind.turns for kind in WORKLOADS[self.workload])

    def talks(self, cell: Cell, requests: int) -> list[Talk]:
        """The requests of a cell, the same for all systems."""
        own = (self.seed * 1000 + cell.seed) * 10_000 + cell.level
        if not self.trace:
            return talks(self.workload, requests, own, vocabulary=self.vocabulary)
        first = Random(own).randrange(len(self.trace))
        turned = (*self.trace[first:], *self.trace[:first])
        wanted = repeated(turned, -(-requests // len(turned)))[:requests]
        return list(trace_talks(wanted, own, self.vocabulary))


@dataclass
class Found:
    """What was measured."""

    runs: dict[tuple[str, Cell], Run] = field(default_factory=dict)
    plan: Plan = field(default_factory=lambda: Plan((), (), {}, 0))
    paces: dict[str, Pace] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stopped: str = ""
    """Why it ended before its time, in words."""
    failure: BasculeError | None = None
    """What went wrong with a system, where that is why."""
    took_s: float = 0.0

    def cells(self, level: int) -> list[Cell]:
        """Of one level, by seed."""
        return sorted({cell for _, cell in self.runs if cell.level == level}, key=lambda cell: cell.seed)

    @property
    def levels(self) -> list[int]:
        return sorted({cell.level for _, cell in self.runs})


class Hearer(Watch):
    """Hears how far the measurement is; this one does nothing with it."""

    def says(self, words: str) -> None:
        """Something that should be known."""

    def turn(self, words: str, requests: int) -> None:
        """A system begins with so many requests."""


@dataclass
class Comparison:
    """One measurement from start to end, within its time."""

    stage: Stage
    traffic: Traffic
    levels: Sequence[int]
    seeds: int | None
    minutes: float
    slo: Slo
    stop: asyncio.Event
    hearer: Hearer
    requests: int | None = None
    """Of a run; None: as many as there is time for."""
    timeout_s: float = 300.0
    found: Found = field(default_factory=Found)
    took: dict[int, float] = field(default_factory=dict)
    """Seconds that a level took with all systems, the last time."""

    async def run(self) -> Found:
        """Until there is time for nothing more, or someone says stop; raises NothingMeasured, SystemFailed."""
        self._begin = time.monotonic()
        late = asyncio.get_running_loop().call_later(60 * self.minutes, self.stop.set)
        try:
            await self._pilot()
            if not self.stop.is_set():
                self._decide()
                await self._measure()
        except BasculeError as error:
            # What was measured before is not lost.
            if not self.found.runs:
                raise
            self.found.stopped, self.found.failure = str(error), error
        finally:
            late.cancel()
            self.stage.clear()
        self.found.took_s = time.monotonic() - self._begin
        if self.stop.is_set() and not self.found.stopped:
            self.found.stopped = "it was stopped" if self.left_s > 0 else "the time was over"
        if not self.found.runs:
            raise NothingMeasured(
                f"no level was measured with all systems: {self.found.stopped or 'the time is too short'}; give more "
                "--minutes, or fewer --levels or --architectures"
            )
        return self.found

    @property
    def left_s(self) -> float:
        """Seconds of the budget."""
        return self._begin + 60 * self.minutes - time.monotonic()

    async def _pilot(self) -> None:
        """Start each system, warm it up, and see how fast it is; one after the other."""
        crowd = _MANY if self.minutes >= _LONG_MINUTES else _CROWD
        for system in self.stage.systems:
            self.hearer.turn(f"starting {system.name}", 0)
            if not await self._began(system):
                return
            self.hearer.turn(f"warming {system.name} up", 0)
            warm = await self._offer(system, Cell(_CROWD, _OTHER), crowd)
            alone = await self._offer(system, Cell(1, _OTHER), 3 if crowd == _MANY else 2)
            if self.stop.is_set():
                return
            good = alone.good()
            if not good:
                first = next((record.error for record in alone.records), "nothing came")
                raise NothingMeasured(f"{system.name} completes no request; the first said: {first}")
            self.found.paces[system.name] = Pace(
                sum(record.e2e for record in good) / len(good), max(len(warm.good()), 1) / warm.wall_s
            )
        self.stage.clear()

    def _decide(self) -> None:
        starts = sum(self.stage.start_s.values()) if self.stage.side_by_side is False else 0.0
        budget = self.left_s - _END_S - (self.seeds or SEEDS) * starts
        made = plan(self.levels, self.seeds, budget, self.found.paces, self.traffic.turns, self.requests)
        self.found.plan = made
        self._last = made.levels[-1]
        told = ", ".join(f"{count} at {level}" for level, count in made.requests.items())
        self.hearer.says(f"requests of a run: {told} clients; {made.seeds} seeds if all goes as planned")

    async def _measure(self) -> None:
        for seed in range(1, (self.seeds or MOST_SEEDS) + 1):
            begun = len(self.found.runs)
            if self.stage.side_by_side is False:
                await self._round_in_turns(seed)
            else:
                await self._round(seed)
                await self._widen(seed)
            if self.stop.is_set() or len(self.found.runs) == begun:
                break
        if self.found.plan.left_out and self._last == self.found.plan.levels[-1]:
            left = ", ".join(map(str, self.found.plan.left_out))
            self.found.notes.append(f"levels left out for want of time: {left}; more --minutes would measure them")

    async def _round(self, seed: int) -> None:
        """All levels with one seed, the first time from the lowest to the highest."""
        levels = self._to_measure
        if seed > 1:
            Random(f"{self.traffic.seed} {seed} levels").shuffle(levels)
        for level in levels:
            if self.stop.is_set():
                return
            if self._time_for(self._expected(level)):
                counts = await self._group(Cell(level, seed))
                if counts and seed == 1 and self._hopeless(level, "would be worse and were not measured"):
                    break

    async def _widen(self, done: int) -> None:
        """Measure levels that were left out, with all seeds so far, where the time turns out to suffice."""
        for level in self.found.plan.left_out:
            planned = self.found.plan.seeds
            others = max(0, planned - done) * sum(self.took.values())
            hopeful = self._last == self.found.plan.levels[-1]
            if hopeful and self._time_for(others + max(planned, done) * self._expected(level)):
                self.found.plan = self.found.plan.widened(level)
                self._last = self.found.plan.levels[-1]
                for seed in range(1, done + 1):
                    await self._group(Cell(level, seed))

    async def _group(self, cell: Cell) -> bool:
        """All systems with the same requests, in a random order; counts, and is True, only if none is stopped."""
        begin, runs = time.monotonic(), {}
        for system in self._order(cell.seed, cell.level):
            if self.stop.is_set() or (run := await self._turn(system, cell)) is None:
                return False
            runs[system.name, cell] = run
        self.took[cell.level] = time.monotonic() - begin
        self.found.runs.update(runs)
        return True

    def _expected(self, level: int) -> float:
        """Seconds that a level takes: as long as the last time, else as estimated, by how far estimates were off."""
        if level in self.took:
            return self.took[level]
        plan, paces = self.found.plan, self.found.paces
        estimated = sum(seconds(one, plan.of(one), paces) for one in self.took)
        off = sum(self.took.values()) / estimated if estimated else 1.0
        return off * seconds(level, plan.of(level), paces)

    async def _round_in_turns(self, seed: int) -> None:
        """Each system starts, runs all levels and ends; in a random order."""
        if not self._time_for(self.took.get(0, 0.0)):
            return
        begin, runs = time.monotonic(), {}
        for system in self._order(seed, 0):
            for level in self._to_measure:
                cell = Cell(level, seed)
                if (run := await self._turn(system, cell)) is None:
                    return
                runs[system.name, cell] = run
        self.took[0] = time.monotonic() - begin
        self.found.runs.update(runs)
        if seed == 1:
            any(self._hopeless(level, "have one run each, and no more") for level in self._to_measure)

    _last: int = 0
    """The highest level that is still worth measuring."""

    @property
    def _to_measure(self) -> list[int]:
        return [level for level in self.found.plan.levels if level <= self._last]

    def _hopeless(self, level: int, higher_ones: str) -> bool:
        """Whether the sweep ends with this level, after the first seed; says so, and what of the higher ones."""
        so_far = [each for each in self.found.levels if each <= level]
        at = [[(name, run) for (name, cell), run in self.found.runs.items() if cell.level == each] for each in so_far]
        met = [{name: sum(record.meets(self.slo) for record in run.records) for name, run in runs} for runs in at]
        output = [{name: run.output_tokens_per_s for name, run in runs} for runs in at]
        higher = [each for each in self.found.plan.levels if each > level]
        if not higher or not hopeless(met, output):
            return False
        self._last = level
        words = (
            f"the sweep ends at {level} clients: no request met the SLO there, with any architecture; "
            f"{', '.join(map(str, higher))} {higher_ones}"
        )
        self.found.notes.append(words)
        self.hearer.says(words)
        return True

    def _order(self, seed: int, level: int) -> list[System]:
        systems = list(self.stage.systems)
        Random(f"{self.traffic.seed} {seed} {level}").shuffle(systems)
        return systems

    def _time_for(self, took: float) -> bool:
        return self.left_s - _END_S > _SURE * took

    async def _began(self, system: System) -> bool:
        """It is its turn, and it is awake; False if someone said stop before it was."""
        begun = asyncio.create_task(self.stage.turn(system))
        stopped = asyncio.create_task(self.stop.wait())
        await asyncio.wait((begun, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not begun.done():
            begun.cancel()
            return False
        await begun
        return True

    async def _turn(self, system: System, cell: Cell) -> Run | None:
        """None if someone said stop."""
        if not await self._began(system):
            return None
        await self._knock(system)
        requests = self.found.plan.requests[cell.level]
        clients = f"{cell.level} client{'s' if cell.level > 1 else ''}"
        self.hearer.turn(f"seed {cell.seed}, {clients}: {system.name}", requests)
        run = await self._offer(system, cell, requests, self.hearer)
        system.check()
        return None if self.stop.is_set() else run

    async def _knock(self, system: System) -> None:
        """A few tokens, so that a system that was held back is awake when its time counts."""
        self._knocks += 1
        ids = tuple(Random(self._knocks).choices(self.traffic.vocabulary, k=_KNOCK_TOKENS))
        offer = Offer(system.endpoint, concurrency=1, timeout_s=_KNOCK_S, stop=self.stop)
        await offer.run([Talk((Ask(ids, _KNOCK_TOKENS),))])

    _knocks: int = 0

    async def _offer(self, system: System, cell: Cell, requests: int, watch: Watch | None = None) -> Run:
        offer = Offer(system.endpoint, concurrency=cell.level, timeout_s=self.timeout_s, stop=self.stop)
        offer.watch = watch or offer.watch
        return await offer.run(self.traffic.talks(cell, requests))
