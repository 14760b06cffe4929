"""How a worker takes its leave of the router, and when it does without."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from bascule.clock import VirtualClock
from bascule.engine.sequence import Key
from bascule.types import Epoch, RequestId, Role, WorkerId, WorkerLoad
from bascule.wire import Draining, Heartbeat, Leaving, Register, Registered, WorkerMessage
from bascule.worker import standing
from bascule.worker.parts import Identity
from bascule.worker.standing import UNHEARD_S, Standing

ME = Identity(worker=WorkerId("a"), epoch=Epoch("a-1"), role=Role.MIXED, device="cpu:0")


class Rig:
    """A standing whose messages are kept."""

    def __init__(self) -> None:
        self.sent: list[WorkerMessage] = []
        self.here = [Key(RequestId("r"), 1)]
        self.stopped = asyncio.Event()
        self.clock = VirtualClock()
        self.standing = Standing(
            ME, self.sent.append, WorkerLoad, lambda: (0, b""), lambda: self.here, self.stopped.set, self.clock
        )

    @property
    def asked(self) -> int:
        return sum(isinstance(message, Leaving) for message in self.sent)


@contextlib.asynccontextmanager
async def running(*, registered: bool = True) -> AsyncIterator[Rig]:
    rig = Rig()
    if registered:
        rig.standing.taken(Registered(ME.epoch, 0.01))
    task = asyncio.create_task(rig.standing.ask_for_leave())
    try:
        async with asyncio.timeout(20):
            yield rig
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "_AGAIN_S", 0.02)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def until_asked(rig: Rig, times: int) -> None:
    await until(lambda: rig.asked >= times)


def test_it_asks_until_it_is_told_to_stop() -> None:
    async def test() -> None:
        async with running() as rig:
            rig.standing.leave()
            for count in range(1, 10):
                await until_asked(rig, count)
                rig.clock.advance(0.9 * UNHEARD_S)
                rig.standing.heard(Draining(1))
            assert not rig.stopped.is_set()

    asyncio.run(test())


def test_without_an_answer_it_ends_by_itself() -> None:
    async def test() -> None:
        async with running() as rig:
            rig.standing.leave()
            await until_asked(rig, 2)
            rig.standing.heard(Draining(1))
            rig.clock.advance(0.9 * UNHEARD_S)
            await until_asked(rig, 4)
            assert not rig.stopped.is_set()
            rig.clock.advance(0.2 * UNHEARD_S)
            await rig.stopped.wait()

    asyncio.run(test())


def test_a_second_signal_stops_it_at_once() -> None:
    async def test() -> None:
        async with running() as rig:
            rig.standing.leave()
            assert not rig.stopped.is_set()
            rig.standing.leave()
            assert rig.stopped.is_set()

    asyncio.run(test())


@pytest.mark.parametrize("forgotten", [True, False])
def test_one_that_the_router_does_not_know_has_nothing_to_wait_for(forgotten: bool) -> None:
    async def test() -> None:
        async with running(registered=forgotten) as rig:
            if forgotten:
                rig.standing.forgotten()
            rig.standing.leave()
            assert rig.stopped.is_set() and not rig.asked

    asyncio.run(test())


def test_one_that_leaves_does_not_offer_itself_to_a_new_router() -> None:
    async def test() -> None:
        async with running() as rig:
            rig.standing.leave()
            rig.standing.forgotten()
            offering = asyncio.create_task(rig.standing.offer(Register))  # type: ignore[arg-type]
            await until_asked(rig, 3)
            offering.cancel()
            assert all(isinstance(message, Leaving) for message in rig.sent)

    asyncio.run(test())


def test_each_heartbeat_names_what_is_here_then() -> None:
    async def test() -> None:
        rig = Rig()
        rig.standing.taken(Registered(ME.epoch, 0.01))
        async with asyncio.timeout(20):
            beating = asyncio.create_task(rig.standing.beat())
            await until(lambda: len(rig.sent) == 1)
            rig.here.clear()
            await until(lambda: len(rig.sent) == 2)
        beating.cancel()
        assert [beat.runs for beat in rig.sent if isinstance(beat, Heartbeat)] == [(("r", 1),), ()]

    asyncio.run(test())
