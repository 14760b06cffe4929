"""What a live router has heard, replayed: the same router and the simulator's decide as it did, to the last bit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.clock import VirtualClock
from bascule.config import RoutingConfig
from bascule.observe.decisions import Attempt
from bascule.router.link import RouterLink
from bascule.router.membership import SWEPT_BLOCKS, TICK_S, Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.sim.agenda import Agenda
from bascule.sim.router import SimRouter
from bascule.traffic.workloads import talks
from bascule.types import CostModel, Epoch, Request, RequestId, Role, SamplingParams, Slo
from bascule.wire import RouterMessage, WorkerMessage

SLO = Slo(0.5, 0.02, 0.1)
COST = CostModel(step_s=0.002, token_s=0.00008, context_s=1e-6, stream_s=(0.003, 0.004, 0.005))
READY_S = 90.0
DONE_S = 60.0
Heard = tuple[float, Epoch | None, WorkerMessage | Request | None]
"""When; a worker's message, a request, or the clock's tick."""
Decided = dict[RequestId, list[Attempt]]


class Silent(RouterLink):
    """Workers that are not there need not be told anything."""

    def __init__(self) -> None:
        self.address = ""

    def send(self, epoch: Epoch, message: RouterMessage, on_failure: Callable[[], None] | None = None) -> None: ...


class Parts:
    """A router without its sockets: what `router/membership.py` and the api do to it, from outside."""

    def __init__(self, config: RoutingConfig, link: RouterLink) -> None:
        self.clock = VirtualClock()
        self.service = Service(ClusterView(), config, self.clock, SLO)
        self.membership = Membership(link, self.service, config, self.clock)

    def hear(self, heard: Heard) -> None:
        """One event at its own time, which stands still meanwhile."""
        at, sender, what = heard
        self.clock.advance(at - self.clock.now())
        if isinstance(what, Request):
            self.service.admit(what)
        elif what is not None and sender is not None:
            self.membership.apply(sender, what)
        else:
            self.service.tick()
            self.service.view.index.expire(self.clock.now())
            self.service.view.index.sweep(SWEPT_BLOCKS)


def decisions(service: Service) -> Decided:
    return {record.id: record.attempts for record in service.journal.records.latest(1000)}


@contextmanager
def workers(join: str, roles: list[Role], folder: Path) -> Iterator[None]:
    cost = folder / "cost.json"
    cost.write_bytes(msgspec.json.encode(COST))
    started = []
    try:
        for number, role in enumerate(roles):
            command = [sys.executable, "-m", "bascule", "worker", "smollm2", "--join", join, "--id", f"w{number}"]
            command += ["--role", role, "--engine", "mock", "--cost-model", str(cost), "--kv-memory", "2MiB"]
            with (folder / f"w{number}.log").open("wb") as log:
                started.append(subprocess.Popen([*command, "--slo-gap", "0.1"], stdout=log, stderr=subprocess.STDOUT))
        yield
    finally:
        for process in started:
            process.kill()
            process.wait(10)


async def live(config: RoutingConfig, roles: list[Role], folder: Path) -> tuple[list[Heard], Decided]:
    """Two dozen requests over real workers; returns all that the router heard, in its order, and what it decided."""
    link = RouterLink("tcp://127.0.0.1:*")
    parts = Parts(config, link)
    log: list[Heard] = []

    def hear(sender: Epoch | None, what: WorkerMessage | Request | None) -> None:
        log.append((time.monotonic(), sender, what))
        parts.hear(log[-1])

    async def tick() -> None:
        while True:
            await asyncio.sleep(TICK_S)
            hear(None, None)

    tasks = [asyncio.create_task(link.serve(hear)), asyncio.create_task(tick())]
    try:
        with workers(link.address, roles, folder):
            async with asyncio.timeout(READY_S):
                while len(parts.service.view.members) < len(roles):
                    await asyncio.sleep(0.05)
            for number, talk in enumerate(talks("shared-prefix", 12, 1, 12.0) + talks("mixed", 12, 1, 12.0)):
                ask = talk.asks[0]
                sampling = SamplingParams(max_tokens=ask.output, temperature=0.0, ignore_eos=True)
                hear(None, Request(id=RequestId(f"r{number}"), prompt=ask.prompt, sampling=sampling, timeout=60.0))
                await asyncio.sleep(0.05)
            async with asyncio.timeout(DONE_S):
                while parts.service.active:
                    await asyncio.sleep(0.05)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        link.close()
    return log, decisions(parts.service)


def replayed(log: list[Heard], config: RoutingConfig) -> Decided:
    """By the live router's parts."""
    parts = Parts(config, Silent())
    for heard in log:
        parts.hear(heard)
    return decisions(parts.service)


def simulated(log: list[Heard], config: RoutingConfig) -> Decided:
    """By the simulator's router."""
    agenda = Agenda()
    router = SimRouter(agenda, config, SLO, Silent(), lambda flight, error: None)

    def hear(sender: Epoch | None, what: Any) -> None:
        if isinstance(what, Request):
            router.admit(what)
        elif sender is not None:
            router.tell(sender, what)
        else:
            router.tick()

    for at, sender, what in log:
        agenda.at(at, lambda sender=sender, what=what: hear(sender, what))  # type: ignore[misc]
    agenda.run(lambda: False)
    return decisions(router.service)


@pytest.mark.parametrize(
    ("policy", "roles"),
    [
        pytest.param("adaptive", [Role.MIXED, Role.MIXED], id="adaptive"),
        pytest.param("disaggregated", [Role.PREFILL, Role.DECODE], id="disaggregated", marks=pytest.mark.full),
    ],
)
def test_a_recorded_log_gives_the_same_decisions_live_and_simulated(
    policy: str, roles: list[Role], tmp_path: Path
) -> None:
    config = RoutingConfig(policy=policy)
    log, decided = asyncio.run(live(config, roles, tmp_path))
    assert len(decided) == 24 and all(attempts for attempts in decided.values())
    assert replayed(log, config) == decided
    assert simulated(log, config) == decided
