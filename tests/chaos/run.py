"""One run: a cluster, clients, a schedule of faults, and at the end the question whether anything was lost or wrong."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import msgspec
import psutil

from bascule.bench.footprints import Footprints, Trend
from chaos.clients import PATIENCE_S, Asked, Clients, Ended, Mark, asked
from chaos.cluster import Cluster
from chaos.orders import EXPIRES_S, Report, reports_address
from chaos.schedule import ROLES, VETERANS, Fault, layout_of, paced, schedule

_CLIENTS = 16
_CROWD, _MEASURED_S = 64, 20.0
"""Clients by whom it is measured what a cluster can do, and for how long."""
_WARM_UP = 24
_AFTER = 24
"""Requests once all faults are over: each has to be exact."""
_READY_S = 20.0
"""How long a fault waits for its victim, and for two other workers, to be there."""
_IDLE_S = 40.0
_HEARD_S = 1.5
"""After this the state is of heartbeats that came meanwhile."""
_MORE_FILES = 16
"""Open files that a process may have in the end beyond those it had at first: connections to peers come and go."""
_FAILING_SHARE = 0.001
"""Of the requests of clients that behave: one that loses its worker five times fails, as documented."""
_NEVER = ("wrong", "cut", "hung")


@dataclass
class Befallen:
    """What a kind of fault has done."""

    count: int = 0
    recoveries: list[float] = field(default_factory=list)
    """The longest wait for tokens, in seconds, of each stream that it touched."""


@dataclass
class Verdict:
    """What a run came to."""

    seed: int
    layout: str
    seconds: float
    ended: list[Ended]
    faults: dict[str, Befallen]
    never_met: int
    """Orders for which nothing came along."""
    client_faults: int
    unasked: Counter[str]
    """Ends of workers that nobody asked for, by exit code: 1 for one that learned that it counts as dead."""
    asked_fairly: int
    """Requests of clients that behave."""
    failed: list[Ended]
    """Those of them that ended with an error, though some worker was there all the time."""
    violations: list[str]

    @property
    def befallen(self) -> int:
        return sum(one.count for one in self.faults.values())


class Chaos:
    """Runs in one asyncio loop; `say` gets a line for each fault as it happens."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        mean_gap_s: float,
        say: Callable[[str], None],
        *,
        steady: bool = False,
    ) -> None:
        """`steady` for a soak: the workers and not the cores are what limits, and faults leave some of them alive."""
        self.trends: list[Trend] = []
        """Of a soak, of the processes that lived long enough."""
        self._seed = seed
        self._folder = folder
        self._say = say
        self._cluster = Cluster(folder, paced(layout_of(seed)) if steady else layout_of(seed))
        self._schedule = schedule(seed, mean_gap_s, VETERANS if steady else ())
        self._faults: dict[str, Befallen] = defaultdict(Befallen)
        self._ordered: dict[int, Fault] = {}
        self._never_met = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[str] = []
        self._begun = time.monotonic()
        self._strangers = set(psutil.Process().children(recursive=True))
        self._reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._reports.setblocking(False)
        self._reports.bind(reports_address(folder))

    async def run(self, requests: int, faults: int, limit_s: float) -> Verdict:
        """Until there were so many of both, or for so long."""

        async def course() -> list[str]:
            return await self._under_load(
                self._clients.run(_CLIENTS), lambda: self._enough(requests, faults), self._begun + limit_s
            )

        return await self._ended_with_all(course)

    async def soak(self, seconds: float, share: float) -> Verdict:
        """Under `share` of the load that the cluster can take, measured before; memory and open files are watched."""
        footprints = Footprints(self._cluster.footprints)

        async def course() -> list[str]:
            capacity = await self._clients.capacity(_CROWD, _MEASURED_S)
            self._say(f"{capacity:.1f} requests/s can be answered; {share * capacity:.1f} come")
            self._begun = time.monotonic()
            end = self._begun + seconds
            watching = asyncio.create_task(footprints.watch())
            load = self._clients.arrive(share * capacity)
            try:
                found = await self._under_load(load, lambda: time.monotonic() > end, math.inf)
            finally:
                watching.cancel()
            self.trends = footprints.trends(seconds / 6, seconds / 3)
            return found + unsteady(self.trends)

        return await self._ended_with_all(course)

    async def _ended_with_all(self, course: Callable[[], Awaitable[list[str]]]) -> Verdict:
        try:
            return await self._run(course)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._cluster.kill()
            asyncio.get_running_loop().remove_reader(self._reports)
            self._reports.close()

    async def _run(self, course: Callable[[], Awaitable[list[str]]]) -> Verdict:
        cluster = self._cluster
        await cluster.start()
        asyncio.get_running_loop().add_reader(self._reports, self._reported)
        host, port = cluster.ready["url"].removeprefix("http://").split(":")
        self._clients = clients = Clients(self._seed, host, int(port), cluster.ready["model"])
        await asyncio.gather(*(clients.ask(self._plain(-number)) for number in range(1, _WARM_UP)))
        await self._idle()
        files = {name: held.files for name, held in cluster.footprints().items()}
        self._begun = time.monotonic()
        violations = await course()
        await self._settle()
        seconds = time.monotonic() - self._begun
        violations += await self._aftermath(files)
        violations += await cluster.stop()
        violations += self._left_behind()
        violations += [f"{one.verdict}: {one.explain()}" for one in clients.ended if one.verdict in _NEVER]
        fair = [one for one in clients.ended if one.asked.manner in ("plain", "reads slowly")]
        return Verdict(
            seed=self._seed,
            layout=cluster.layout.name,
            seconds=seconds,
            ended=clients.ended,
            faults=dict(self._faults),
            never_met=self._never_met,
            client_faults=sum(one.asked.manner != "plain" for one in clients.ended),
            unasked=Counter(
                f"{worker.split('-')[0]} {code}" for worker, code, how in cluster.ended if how == "unasked"
            ),
            asked_fairly=len(fair),
            failed=[one for one in fair if one.verdict == "error" and not self._had_no_worker(one)],
            violations=violations + self._failures,
        )

    async def _under_load(
        self, load: Coroutine[None, None, None], enough: Callable[[], bool], deadline: float
    ) -> list[str]:
        """Faults while clients come; what went wrong with that."""
        clients = asyncio.create_task(load)
        try:
            late = await self._faults_until(enough, deadline)
        finally:
            self._clients.stopping = True
        await clients
        return late

    # ------------------------------------------------------------ faults

    def _enough(self, requests: int, faults: int) -> bool:
        return len(self._clients.ended) >= requests and sum(one.count for one in self._faults.values()) >= faults

    async def _faults_until(self, enough: Callable[[], bool], deadline: float) -> list[str]:
        while not enough():
            fault = next(self._schedule)
            await asyncio.sleep(fault.gap_s)
            if time.monotonic() > deadline:
                return ["the time was over before there were enough faults and requests"]
            await self._wait_for(fault)
            self._commit(fault)
        return []

    async def _wait_for(self, fault: Fault) -> None:
        """Until its victim is there, and two other workers."""
        cluster, deadline = self._cluster, time.monotonic() + _READY_S
        victims = {worker for worker, role in ROLES.items() if fault.victim in (worker, role)}
        while time.monotonic() < deadline:
            ready = set(cluster.ready_workers)
            if victims <= ready and len(ready - victims) >= 2:
                return
            await asyncio.sleep(0.05)

    def _commit(self, fault: Fault) -> None:
        """Do it, or have it done; what takes time goes on beside the next ones."""
        if fault.order:
            self._ordered[fault.number] = fault
            if not self._cluster.order(fault, self._reports):
                self._ordered.pop(fault.number)
                self._never_met += 1
            return
        task = asyncio.create_task(self._do(fault))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(f"the harness failed: {error!r}")

    async def _do(self, fault: Fault) -> None:
        cluster = self._cluster
        if fault.victim in cluster.slots and not cluster.is_ready(fault.victim):
            self._never_met += 1
            return
        self._happened(fault, "")
        if fault.name.startswith("kill -9 of"):
            for worker in [worker for worker, role in ROLES.items() if role == fault.victim]:
                cluster.kill_worker(worker, fault.seconds)
        elif fault.name.startswith("kill"):
            cluster.kill_worker(fault.victim, fault.seconds)
        elif fault.name.startswith("restart"):
            cluster.kill_worker(fault.victim, fault.seconds, signal.SIGTERM)
        elif "replaced" in fault.name:
            await cluster.replace(fault.victim, fault.seconds)
        elif fault.name.startswith("paused"):
            await cluster.pause(fault.victim, fault.seconds)
        elif fault.victim == "redis":
            await cluster.lose_redis(fault.seconds, kill="killed" in fault.name)
        else:
            self._say(f"          {await asyncio.to_thread(cluster.damage_disk, Random(fault.seed))} blocks damaged")

    def _reported(self) -> None:
        """Workers have done as they were told."""
        while True:
            try:
                report = msgspec.msgpack.decode(self._reports.recv(1 << 16), type=Report)
            except BlockingIOError:
                return
            if (fault := self._ordered.pop(report.number, None)) is None:
                continue
            slot = self._cluster.slots[report.worker]
            if fault.order == "stop" and slot.process is not None and slot.process.pid == report.pid:
                task = asyncio.create_task(self._cluster.wake_later(slot, slot.process, fault.seconds))
                self._tasks.add(task)
                task.add_done_callback(self._done)
            self._happened(fault, report.detail, report.request)

    def _happened(self, fault: Fault, detail: str, request: str = "") -> None:
        befallen, now = self._faults[fault.name], time.monotonic()
        befallen.count += 1
        detail = " ".join(filter(None, [fault.what if fault.what != detail else "", detail, request.split("~")[0]]))
        lasts = f" for {fault.seconds:.1f} s" if fault.seconds else ""
        self._say(f"{now - self._begun:8.1f}  #{fault.number} {fault.name}: {fault.victim}{lasts} {detail}")
        for ended in self._clients.under_way:
            if ended.asked.stream and (ended.tokens or request) and self._touches(fault, ended, request.split("~")[0]):
                ended.marks.append(Mark(now, befallen.recoveries.append))

    def _touches(self, fault: Fault, ended: Ended, request: str) -> bool:
        if request:
            return ended.asked.id == request
        if fault.victim in ("redis", "disk"):
            return True
        decodes = ended.route.partition("decode=")[2]
        return any(decodes == worker for worker, role in ROLES.items() if fault.victim in (worker, role))

    # ------------------------------------------------------------ the end

    async def _settle(self) -> None:
        """All that was begun comes to its end, and every worker is there again."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(EXPIRES_S)  # orders that are still open
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._never_met += len(self._ordered)
        self._ordered.clear()
        deadline = time.monotonic() + 60.0
        while missing := [worker for worker in ROLES if not self._cluster.is_ready(worker)]:
            if time.monotonic() > deadline:
                self._failures.append(f"not there again after a minute: {', '.join(missing)}")
                return
            await asyncio.sleep(0.1)

    def _plain(self, number: int) -> Asked:
        """A request by a client that only wants its answer."""
        return replace(asked(self._seed, number), manner="plain", limit_s=PATIENCE_S)

    async def _aftermath(self, files: dict[str, int]) -> list[str]:
        """What is wrong with a cluster that has its peace again."""
        found = []
        after = await asyncio.gather(*(self._clients.ask(self._plain(-_WARM_UP - one)) for one in range(_AFTER)))
        found += [f"after all faults: {one.explain()}" for one in after if one.verdict != "exact"]
        found += await self._idle()
        found += self._cluster.hanging_ghosts()
        at_first = max(count for name, count in files.items() if not name.startswith("router"))
        for name, held in self._cluster.footprints().items():
            count, before = held.files, files.get(name, at_first)
            if count > before + _MORE_FILES:
                found.append(f"{name} has {count} open files, {before} at first")
        return found

    async def _idle(self) -> list[str]:
        """Wait until nothing runs, waits or is leased; what of it does not come to pass."""
        keys = ("running", "waiting", "kv_blocks_leased", "kv_blocks_quarantined", "promised", "integrity_violations")
        await asyncio.sleep(_HEARD_S)
        deadline = time.monotonic() + _IDLE_S
        while True:
            state = await asyncio.to_thread(self._cluster.ask_state)
            busy = [f"{key} is {state[key]}" for key in ("active", "queued", "integrity_violations") if state[key]]
            busy += [f"{one['id']}: {key} is {one[key]}" for one in state["workers"] for key in keys if one[key]]
            if not busy or time.monotonic() > deadline:
                return busy
            await asyncio.sleep(0.2)

    def _left_behind(self) -> list[str]:
        """Processes that nobody ended or reaped, and errors in the logs that nobody has caught."""
        left = set(psutil.Process().children(recursive=True)) - self._strangers
        found = [f"process {child.pid} is left: {child.status()}" for child in left]
        for log in sorted(self._folder.glob("*.log")):
            text = log.read_text(errors="replace")
            for match in re.finditer(r"Traceback \(most recent call last\)", text):
                found.append(
                    f"{log.name} has a traceback: ...{text[max(0, match.start() - 300) : match.start() + 1500]}"
                )
        return found

    def _had_no_worker(self, ended: Ended) -> bool:
        return any(ended.started <= at <= ended.started + ended.seconds for at in self._cluster.without_worker)


def unsteady(trends: list[Trend]) -> list[str]:
    """What grows, and which of the router and the workers' roles has no process that lived long enough to be judged."""
    judged = {re.split("[- ]", trend.process)[0] for trend in trends}
    missing = sorted({"router", *ROLES.values()} - judged)
    found = [f"no {role} process lived long enough to be judged" for role in missing]
    return found + [fault for trend in trends for fault in trend.faults]


def too_many_failed(verdicts: list[Verdict]) -> bool:
    """Whether more than one in a thousand ended with an error (of few requests, more than one)."""
    failed = sum(len(verdict.failed) for verdict in verdicts)
    return failed > max(1.0, _FAILING_SHARE * sum(verdict.asked_fairly for verdict in verdicts))


def table(verdicts: list[Verdict]) -> str:
    """Markdown: what befell, how often, and how long the streams that it touched waited for tokens."""
    faults: dict[str, Befallen] = defaultdict(Befallen)
    for verdict in verdicts:
        for name, one in verdict.faults.items():
            faults[name].count += one.count
            faults[name].recoveries += one.recoveries
    lines = ["| fault | count | streams touched | longest wait for a token, median | most |", "|---|---|---|---|---|"]
    for name in sorted(faults):
        one = faults[name]
        waits = [statistics.median(one.recoveries), max(one.recoveries)] if one.recoveries else []
        cells = [name, str(one.count), str(len(one.recoveries)), *(f"{wait:.2f} s" for wait in waits)]
        lines.append(f"| {' | '.join(cells)} |{' |' * (2 - len(waits))}")
    return "\n".join(lines)
