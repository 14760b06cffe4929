"""One fault at a time, done to one request in a certain phase of its life, and how long it waits for its next token.

`python -m chaos.recovery --rounds 5` prints tables (about a quarter of an hour); exit code 1 if a token was wrong or
came far too late, if a median is beyond what was promised, or if other streams waited for more than computing again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil

from bascule.config import EngineConfig
from bascule.types import SamplingParams
from chaos.cases import BRIEFLY, CASES, DEAD, KILLED, NOTES, PHASES, UNTOLD, Case
from chaos.clients import PATIENCE_S, VOCAB, Asked, Clients, Ended, Mark
from chaos.orders import EXPIRES_S, HEARD, Order, Report, give, reports_address
from chaos.schedule import DEAD_S, LEASE_S, STEP_S, SUSPECT_S, TOKEN_S
from support.cluster import Cluster, serve

PROMPT, OUTPUT, OTHERS_OUTPUT = 400, 40, 100
"""Tokens of the request that the fault is done to (and output of the streams beside it)."""
OTHERS = 4
_BACK_S = 60.0
SPLIT = ("--policy", "disaggregated", "--prefill", "2", "--decode", "2", "--devices", "cpu:0,cpu:1,cpu:0,cpu:1")
WHOLE = ("--policy", "replicated", "--mixed", "2", "--devices", "cpu:0,cpu:1")


@dataclass
class Outcome:
    """What a fault has done."""

    one: Ended
    others: list[Ended]
    struck: Report | None = None
    wait_s: float = 0.0
    """The longest that the request waited for a token since the fault."""
    others_s: list[float] = field(default_factory=list)
    """The same of each stream that ran beside it on other workers."""

    @property
    def wrong(self) -> list[dict[str, Any]]:
        return [each.explain() for each in (self.one, *self.others) if each.verdict != "exact"]


class Bench:
    """A served cluster, and clients for it; runs in one asyncio loop."""

    def __init__(self, cluster: Cluster, folder: Path, workers: int) -> None:
        self.cluster = cluster
        self._folder = folder
        self._workers = workers
        host, port = cluster.url.removeprefix("http://").split(":")
        self._clients = Clients(0, host, int(port), cluster.model)
        self._draw = Random(time.time_ns())
        self._numbers = 0
        self._post = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._post.setblocking(False)
        self._post.bind(reports_address(folder))
        self._reported: asyncio.Future[Report] = asyncio.Future()
        self._unheard: set[str] = set()
        """Workers that have not said yet that the order has come."""
        asyncio.get_running_loop().add_reader(self._post, self._read)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._post)
        self._post.close()
        os.unlink(reports_address(self._folder))

    def _read(self) -> None:
        report = msgspec.msgpack.decode(self._post.recv(1 << 16), type=Report)
        if report.number != self._numbers:
            return
        if report.detail == HEARD:
            self._unheard.discard(report.worker)
        elif not self._reported.done():
            self._reported.set_result(report)

    def _asked(self, name: str, output: int) -> Asked:
        draw = self._draw
        return Asked(
            id=name,
            prompt=[draw.randrange(VOCAB) for _ in range(PROMPT)],
            sampling=SamplingParams(max_tokens=output, temperature=draw.choice((0.0, 1.0)), seed=draw.getrandbits(63)),
            stream=True,
            manner="plain",
            limit_s=PATIENCE_S,
            leaves_after_s=0.0,
            half=0.0,
        )

    async def befall(self, case: Case) -> Outcome:
        """Start some streams, then the request, do the fault to it, and wait for the end of them all."""
        await self.settled()
        self._numbers += 1
        self._reported = asyncio.Future()
        name = f"{case.id}-{self._numbers}"
        others = [
            asyncio.create_task(self._clients.ask(self._asked(f"{name}-{i}", OTHERS_OUTPUT))) for i in range(OTHERS)
        ]
        await asyncio.sleep(0.4)
        await self._order(case, name)
        asking = asyncio.create_task(self._clients.ask(self._asked(name, OUTPUT)))
        outcome = Outcome(None, [])  # type: ignore[arg-type]
        watching = asyncio.create_task(self._strike(case, name, outcome))
        outcome.one = await asking
        outcome.others = list(await asyncio.gather(*others))
        if not self._reported.done():
            watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return outcome

    async def _strike(self, case: Case, name: str, outcome: Outcome) -> None:
        """Once the fault is done: note what waits for it, and wake who sleeps."""
        report = outcome.struck = await self._reported
        now = time.monotonic()
        for ended in self._clients.under_way:
            if ended.asked.id == name:
                ended.marks.append(Mark(now, lambda wait: setattr(outcome, "wait_s", wait)))
            elif ended.tokens and report.worker not in ended.route.split(";", 1)[1]:
                ended.marks.append(Mark(now, outcome.others_s.append))
        if case.order == "sleep":
            await asyncio.sleep(case.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(report.pid, signal.SIGCONT)

    async def _order(self, case: Case, name: str) -> None:
        """Returns once all workers have heard it: it must not come behind the request that it is about."""
        until, what = time.monotonic() + EXPIRES_S, f"{case.at} {name}"
        order = Order(self._numbers, case.order, self._numbers, until, case.seconds, what, answer=True)
        workers: list[str] = [worker["id"] for worker in self.cluster.state()["workers"]]
        self._unheard = {worker for worker in workers if give(order, self._folder, worker, self._post)}
        async with asyncio.timeout(PATIENCE_S):
            while self._unheard:
                await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Every worker is there, and nothing runs, waits or is leased anywhere."""

        def there(state: dict[str, Any]) -> bool:
            alive = [worker for worker in state["workers"] if psutil.pid_exists(worker["pid"])]  # and not yet missed
            return [worker["state"] for worker in alive] == ["ready"] * self._workers

        await asyncio.to_thread(self.cluster.wait, there, "every worker is ready", _BACK_S)
        await asyncio.to_thread(self.cluster.wait_idle, _BACK_S)

    def attempts(self, ended: Ended) -> list[int]:
        """Of each time that a request was placed, the tokens whose KV lay where it was to be prefilled."""
        answer = self.cluster.http.get(f"{self.cluster.ready['admin_url']}/admin/decisions/{ended.asked.id}")
        chosen = [(attempt["chosen"], attempt["candidates"]) for attempt in answer.json()["attempts"]]
        return [one["cached_tokens"] for route, every in chosen for one in every if one["placement"] == route]


@contextlib.contextmanager
def served(layout: tuple[str, ...] = SPLIT, parent: str = "tells") -> Iterator[tuple[Cluster, Path]]:
    """`bascule serve` with faulty workers, and the folder of their sockets; `parent` as `chaos.faulty_serve` says."""
    with tempfile.TemporaryDirectory(prefix="bascule-recovery-") as name:
        folder = Path(name)
        (folder / "cost.json").write_text(json.dumps({"step_s": STEP_S, "token_s": TOKEN_S}))
        flags = ["--engine", "mock", "--cost-model", str(folder / "cost.json"), "--kv-memory", "4MiB"]
        flags += ["--chunk-tokens", "128", "--transfer", "tcp", "--log-level", "warning"]
        flags += [f"--suspect-after={SUSPECT_S}", f"--dead-after={DEAD_S}"]
        flags += [f"--handoff-timeout={LEASE_S}", "--reserve-timeout=2"]
        program = ("chaos.faulty_serve", name, parent)
        with serve("smollm2", *layout, *flags, program=program) as cluster:
            yield cluster, folder


@contextlib.asynccontextmanager
async def bench(cluster: Cluster, folder: Path) -> AsyncIterator[Bench]:
    made = Bench(cluster, folder, len(cluster.ready["workers"]))
    try:
        yield made
    finally:
        made.close()


# ---------------------------------------------------------------- tables


class Figures:
    """Waits by case, over several rounds."""

    def __init__(self) -> None:
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.others: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []

    async def measure(self, bench: Bench, case: Case) -> None:
        outcome = await bench.befall(case)
        if outcome.struck is None:
            self.faults.append(f"{case.id}: the occasion has not come")
            return
        self.waits[case.id].append(outcome.wait_s)
        self.others[case.id].append(max(outcome.others_s, default=0.0))
        self.faults += [f"{case.id}: {wrong}" for wrong in outcome.wrong]
        if outcome.wait_s > case.bound_s:
            self.faults.append(f"{case.id}: {outcome.wait_s:.1f} s without a token")
        others = f"others {1000 * self.others[case.id][-1]:.0f} ms"
        print(f"  {case.id}: {outcome.wait_s:.2f} s, {others}", file=sys.stderr, flush=True)

    def recoveries(self, case: Case) -> list[float]:
        """Seconds beyond what is usual there."""
        usual = self.waits[NOTES[case.at].id] if case.at in NOTES else []
        return [max(0.0, wait - (statistics.median(usual) if usual else 0.0)) for wait in self.waits[case.id]]

    def recovery(self, case: Case) -> str:
        """Their median and the most."""
        waits = self.recoveries(case)
        return f"{statistics.median(waits):.2f} ({max(waits):.2f})" if waits else "-"

    def broken_promises(self) -> Iterator[str]:
        """Medians that are beyond what was promised, without a test's patience for busy machines."""
        for case in CASES:
            waits = self.recoveries(case)
            if waits and (took := statistics.median(waits)) > case.promised_s:
                yield f"{case.id}: {took:.2f} s at the median, and {case.promised_s:g} s were promised"


async def _rounds(layout: tuple[str, ...], parent: str, cases: tuple[Case, ...], rounds: int) -> Figures:
    figures = Figures()
    with served(layout, parent) as (cluster, folder):
        async with bench(cluster, folder) as made:
            for number in range(rounds):
                print(f"round {number + 1}", file=sys.stderr, flush=True)
                for case in cases:
                    await figures.measure(made, case)
    return figures


def by_phase(figures: Mapping[str, Figures]) -> Iterator[str]:
    """Phases and workers down, faults across."""
    faults = (KILLED, UNTOLD, BRIEFLY, DEAD)
    yield f"| phase | worker | {' | '.join(faults)} |"
    yield "|---|---|---|---|---|---|"
    of = {(case.at, case.fault): case for case in CASES}
    for phase in PHASES:
        cells = [figures[case.parent].recovery(case) for case in (of[phase.at, fault] for fault in faults)]
        yield f"| {phase.name} | {phase.side} | {' | '.join(cells)} |"


def of_links(figures: Figures) -> Iterator[str]:
    yield "| phase | fault | recovery |"
    yield "|---|---|---|"
    for case in CASES:
        if case.order not in ("die", "sleep"):
            yield f"| {case.phase} | {case.fault} | {figures.recovery(case)} |"


_WHOLE_KILLED = next(case for case in CASES if case.fault == KILLED and case.phase == "decoding")
PARTS = ("tells", "deaf", "others")


class Others:
    """What streams on the worker that is left notice of the other's death, whose requests it computes again."""

    share_ms = 1000 * EngineConfig().step_tokens * TOKEN_S
    """By so much a step takes longer that computes as many lost tokens as one may."""

    def __init__(self, whole: Figures, later: Figures) -> None:
        """Without a fault and with one; and with one after which no other process starts meanwhile."""
        self.faults = whole.faults + later.faults
        self._gaps = {
            "none": _milliseconds(whole.others[NOTES["decoding"].id]),
            KILLED: _milliseconds(whole.others[_WHOLE_KILLED.id]),
            f"{KILLED}, its successor started later": _milliseconds(later.others[_WHOLE_KILLED.id]),
        }

    def table(self) -> Iterator[str]:
        """Milliseconds."""
        yield f"A step takes {1000 * STEP_S:.0f} ms alone; computing again adds {self.share_ms:.0f} ms at most."
        yield ""
        yield "| | longest gap of the other streams, median | most |"
        yield "|---|---|---|"
        for name, gaps in self._gaps.items():
            yield f"| {name} | {statistics.median(gaps):.0f} ms | {max(gaps):.0f} ms |"

    def broken_promises(self) -> Iterator[str]:
        """Medians that grow by more than computing again takes."""
        medians = {name: statistics.median(gaps) for name, gaps in self._gaps.items()}
        for name, gap in medians.items():
            if (more := gap - medians["none"]) > self.share_ms:
                yield (
                    f"{name}: the other streams' longest gap is {gap:.0f} ms at the median, {more:.0f} ms more than "
                    f"without; computing again takes {self.share_ms:.0f} ms"
                )


def _milliseconds(gaps: list[float]) -> list[float]:
    return [1000 * gap for gap in gaps]


def measure(rounds: int, parts: Collection[str]) -> tuple[dict[str, Figures], Others | None]:
    """Figures by what the workers' parent does when one ends, and of the streams beside a fault."""
    figures = {"tells": Figures(), "deaf": Figures()}
    for parent in [each for each in figures if each in parts]:
        cases = tuple(case for case in CASES if case.parent == parent)
        figures[parent] = asyncio.run(_rounds(SPLIT, parent, (*NOTES.values(), *cases), rounds))
    if "others" not in parts:
        return figures, None
    whole = asyncio.run(_rounds(WHOLE, "tells", (NOTES["decoding"], _WHOLE_KILLED), 2 * rounds))
    later = asyncio.run(_rounds(WHOLE, "later", (_WHOLE_KILLED,), 2 * rounds))
    return figures, Others(whole, later)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.recovery", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="the streams beside a fault are looked at twice as often")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure: all, if not given")
    chosen = parser.parse_args()
    figures, others = measure(chosen.rounds, chosen.parts)
    tables = ["", f"seconds of recovery, median of {chosen.rounds} (most):", ""]
    tables += [*by_phase(figures), ""] if {"tells", "deaf"} & {*chosen.parts} else []
    tables += [*of_links(figures["tells"]), ""] if "tells" in chosen.parts else []
    print("\n".join([*tables, *(others.table() if others else ())]))
    verdicts = [verdict for each in figures.values() for verdict in (*each.faults, *each.broken_promises())]
    verdicts += [*others.faults, *others.broken_promises()] if others else []
    print("\n".join(["", *verdicts]))
    return 1 if verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
