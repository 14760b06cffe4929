"""A router's membership and a whole worker in one event loop, over real sockets, with an engine that is a mock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from engine_rig import BLOCK, CARD

from bascule.clock import WallClock
from bascule.config import HandoffConfig, RoutingConfig
from bascule.engine.core import Engine, EngineLimits
from bascule.engine.mock import MockRunner
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.base import Store
from bascule.kv.store.forms import Forms
from bascule.kv.store.tiers import Tiers
from bascule.router.link import RouterLink
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.types import CostModel, Epoch, Request, RequestId, Role, SamplingParams, WorkerId
from bascule.wire import KvEvents, WorkerMessage
from bascule.worker.link import RouterSocket
from bascule.worker.parts import Identity, Parts
from bascule.worker.worker import Worker

NAME, EPOCH = WorkerId("a"), Epoch("a-1")


class LossyLink(RouterSocket):
    """Loses KV events while `losing`."""

    losing = False
    lost = 0

    def send(self, message: WorkerMessage) -> None:
        if self.losing and isinstance(message, KvEvents):
            self.lost += 1
        else:
            super().send(message)


class Cluster:
    """A router and one worker with 24 blocks, in one loop, over real sockets."""

    def __init__(self, arena: Arena, step_s: float, stores: Sequence[Store] = ()) -> None:
        clock = WallClock()
        self.view = ClusterView(1000)
        config = RoutingConfig(policy="replicated")
        self.service = Service(self.view, config, clock)
        self.router = RouterLink("tcp://127.0.0.1:*")
        self.membership = Membership(self.router, self.service, config, clock)
        self.books = Books(24, BLOCK)
        self.link = LossyLink(self.router.address, EPOCH)
        hasher = BlockHasher(CARD.fingerprint, BLOCK)
        runner = MockRunner(CARD, CostModel(step_s=step_s), time.sleep)
        limits = EngineLimits(max_sequences=4, chunk_tokens=64, step_tokens=64)
        self.engine = Engine(runner, arena, self.books, hasher, limits)
        parts = Parts(
            runner=runner,
            arena=arena,
            books=self.books,
            hasher=hasher,
            engine=self.engine,
            max_sequences=4,
            cost=CostModel(),
            tiers=Tiers(stores, arena, self.books, CARD.fingerprint, Forms("none", CARD.layout)) if stores else None,
        )
        identity = Identity(worker=NAME, epoch=EPOCH, role=Role.MIXED, device="cpu")
        self.worker = Worker(identity, parts, self.link, "127.0.0.1", HandoffConfig(transfer="tcp"), clock)
        self._requests = 0

    async def complete(self, prompt: list[int]) -> None:
        self._requests += 1
        name = RequestId(str(self._requests))
        sampling = SamplingParams(max_tokens=4, temperature=0.0)
        flight = await self.service.start(Request(id=name, prompt=tuple(prompt), sampling=sampling, timeout=20.0))
        _deltas = [delta async for delta in flight]

    async def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not come to pass in 5 s")

    def in_step(self) -> bool:
        """The books stand still, and the index says the same."""
        names = list(self.books._by_hash)
        row = self.view.members[NAME].row
        here = [name for name in names if self.view.index.match([name]).device[row] == 1]
        return len(here) == len(names) == self.view.index.blocks


def over_sockets(
    scenario: Callable[[Cluster], Awaitable[None]], step_s: float = 0.0, stores: Sequence[Store] = ()
) -> None:
    """Run a scenario; the engine takes so long for a step, and the worker has these stores, which it closes."""

    async def run() -> None:
        with Arena.create(CARD.layout, 24) as arena:
            cluster = Cluster(arena, step_s, stores)
            tasks = [asyncio.create_task(cluster.membership.run()), asyncio.create_task(cluster.worker.run())]
            await cluster.wait(lambda: bool(cluster.view.members))
            await scenario(cluster)
            cluster.worker.stop()
            await tasks[1]
            tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            cluster.link.close()
            cluster.router.close()

    asyncio.run(asyncio.wait_for(run(), 30))
