"""A silent worker is given up at once where nothing listens at its address, and only there."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import membership_rig as rig
import pytest
from membership_rig import FakeLink, offer
from msgspec.structs import replace

from bascule.clock import WallClock
from bascule.config import RoutingConfig
from bascule.reach import first_unreachable, refuses
from bascule.router import silence
from bascule.router.entrance import Entrance
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.types import Epoch, WorkerId, WorkerLoad
from bascule.wire import Heartbeat, Neighbours

PATIENCE_S = 20.0
W = WorkerId("w")
SILENT_S = 0.3


class Deaf(FakeLink):
    """A link by which nobody speaks."""

    async def serve(self, handler: object, is_member: object) -> None:
        await asyncio.Event().wait()


class Bench:
    """A router that watches its members by real time and real sockets; by missed heartbeats it loses nobody here."""

    def __init__(self, *, check_reach: bool = True) -> None:
        config, clock = RoutingConfig(suspect_after=30.0, dead_after=60.0, check_reach=check_reach), WallClock()
        self.view, self.link = ClusterView(1000), Deaf()
        service = Service(self.view, config, clock)
        entrance = Entrance(self.link, config, self.view)  # type: ignore[arg-type]
        self.membership = Membership(self.link, service, config, clock, entrance)  # type: ignore[arg-type]

    async def join(self, address: str, epoch: str = "w-1") -> None:
        """Register worker `w`, and wait until it is a member."""
        register = offer("w", epoch)
        self.membership.apply(Epoch(epoch), replace(register, peer=replace(register.peer, address=address)))
        await until(lambda: self.membership.is_current(W, Epoch(epoch)))

    def beat(self, epoch: str = "w-1") -> None:
        self.membership.apply(Epoch(epoch), Heartbeat(W, Epoch(epoch), WorkerLoad()))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def address_of(listener: socket.socket) -> str:
    return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def watched(bench: Bench, script: Callable[[], Awaitable[None]]) -> None:
    """Run the script beside the router's watch, with an end."""

    async def run() -> None:
        watch = asyncio.create_task(bench.membership.run())
        try:
            await asyncio.wait_for(script(), PATIENCE_S)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    asyncio.run(run())


@pytest.fixture(autouse=True)
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What each look at an address has found; they come sooner than heartbeats allow, for there are none."""
    found: list[bool] = []

    async def looked(address: str) -> bool:
        found.append(await refuses(address))
        return found[-1]

    monkeypatch.setattr(silence, "SILENT_S", SILENT_S)
    monkeypatch.setattr(silence, "refuses", looked)
    yield found


def test_a_silent_worker_whose_port_is_closed_is_lost_long_before_it_counts_as_dead(
    caplog: pytest.LogCaptureFixture, tried: list[bool]
) -> None:
    bench, listener = Bench(), listen()

    async def script() -> None:
        await bench.join(address := address_of(listener))
        listener.close()
        began = time.monotonic()
        await until(lambda: not bench.view.members)
        assert time.monotonic() - began >= SILENT_S, "it was lost while it still could speak"
        assert f"has ended: it is silent, and nothing listens at {address}" in caplog.text

    with caplog.at_level(logging.WARNING):
        watched(bench, script)
    assert tried == [True, True]
    assert bench.view.burned == {"w-1"}


def test_a_stopped_process_is_no_ended_one(tried: list[bool]) -> None:
    """The kernel goes on accepting for it; how often it is tried becomes less, so that few wait when it wakes."""
    bench, listener = Bench(), listen()

    async def script() -> None:
        await bench.join(address_of(listener))
        await until(lambda: len(tried) >= 4)
        assert bench.membership.is_current(W, Epoch("w-1"))

    began = time.monotonic()
    with listener:
        watched(bench, script)
    assert not any(tried)
    assert time.monotonic() - began >= SILENT_S * 1.5**3


def test_one_that_speaks_between_the_refusals_stays(monkeypatch: pytest.MonkeyPatch, tried: list[bool]) -> None:
    bench, listener = Bench(), listen()
    look = silence.refuses

    async def looked(address: str) -> bool:
        refused = await look(address)
        if len(tried) == 1:
            monkeypatch.setattr(silence, "SILENT_S", 10 * PATIENCE_S)
            bench.beat()
        return refused

    monkeypatch.setattr(silence, "refuses", looked)

    async def script() -> None:
        await bench.join(address_of(listener))
        listener.close()
        await until(lambda: len(tried) == 2 and not bench.membership._silence._trying)
        assert bench.membership.is_current(W, Epoch("w-1"))

    watched(bench, script)
    assert tried == [True, True]


def test_one_refusal_is_not_enough(monkeypatch: pytest.MonkeyPatch, tried: list[bool]) -> None:
    """Another process has the port meanwhile: the worker's successor, or anybody."""
    bench, listener = Bench(), listen()
    address, heirs = address_of(listener), []
    look = silence.refuses

    async def looked(asked: str) -> bool:
        refused = await look(asked)
        if not heirs:
            heirs.append(listen(int(address.rpartition(":")[2])))
        return refused

    monkeypatch.setattr(silence, "refuses", looked)

    async def script() -> None:
        await bench.join(address)
        listener.close()
        await until(lambda: len(tried) >= 3)
        assert bench.membership.is_current(W, Epoch("w-1"))

    watched(bench, script)
    assert tried[:3] == [True, False, False]
    heirs[0].close()


def test_the_end_of_one_incarnation_is_not_that_of_the_next(tried: list[bool]) -> None:
    bench, first, second = Bench(), listen(), listen()

    async def script() -> None:
        await bench.join(address_of(first))
        first.close()
        await until(lambda: len(tried) == 1)
        await bench.join(address_of(second), "w-2")
        await until(lambda: len(tried) >= 4)
        assert bench.membership.is_current(W, Epoch("w-2"))
        assert not [one for _, one in bench.link.sent if isinstance(one, Neighbours) and one.gone]

    with second:
        watched(bench, script)


def test_a_refusal_means_nothing_where_the_router_never_came_through_or_need_not(tried: list[bool]) -> None:
    bench, listener = Bench(check_reach=False), listen()

    async def script() -> None:
        await bench.join(address_of(listener))
        listener.close()
        await asyncio.sleep(3 * SILENT_S)
        assert bench.membership.is_current(W, Epoch("w-1"))

    watched(bench, script)
    assert tried == []


@pytest.mark.parametrize("address", ["ipc:///nowhere", "inproc://here", "tcp://127.0.0.1:99999", "", "tcp://[::1"])
def test_what_is_no_address_refuses_nothing(address: str) -> None:
    assert not asyncio.run(refuses(address))


def test_an_address_that_does_not_answer_refuses_nothing() -> None:
    """Its backlog is full, so that the kernel leaves connections unanswered."""
    with socket.socket() as listener, socket.socket() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting.connect(listener.getsockname())
        asked = address_of(listener)
        assert asyncio.run(first_unreachable([asked], 0.2)) == f"{asked} (no answer within 0.2 s)"
        assert not asyncio.run(refuses(asked, 0.2))


def test_who_is_suspect_is_told_of_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    bench = rig.Bench("a", "b")
    for _ in range(3):
        bench.clock.advance(1.5)
        bench.hear(Heartbeat(WorkerId("b"), Epoch("b-1"), WorkerLoad()))
        bench.membership._judge_silent()
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [
        "worker a has sent no heartbeat for 3 s: it gets no requests until it does"
    ]
    bench.hear(Heartbeat(WorkerId("a"), Epoch("a-1"), WorkerLoad()))
    assert caplog.records[-1].getMessage() == "worker a is back"
