"""Engine, books and reporter at one end, the router's index at the other: they agree after real work and real loss."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest
from engine_rig import BLOCK, CARD, Rig, greedy, work
from membership_rig import Bench

from bascule.clock import WallClock
from bascule.config import HandoffConfig, RoutingConfig
from bascule.engine.core import Engine, EngineLimits
from bascule.engine.mock import MockRunner
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.router.link import RouterLink
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.types import BlockHash, CostModel, Epoch, Request, RequestId, Role, SamplingParams, WorkerId
from bascule.wire import KvEvents, Resync, WorkerMessage
from bascule.worker import kv_events
from bascule.worker.kv_events import KvReporter
from bascule.worker.link import RouterSocket
from bascule.worker.parts import Identity, Parts
from bascule.worker.worker import Worker

NAME, EPOCH = WorkerId("a"), Epoch("a-1")


def assert_index_is(view: ClusterView, names: list[BlockHash]) -> None:
    """The index has these blocks and no others, all at the worker."""
    row = view.members[NAME].row
    assert [name for name in names if view.index.match([name]).device[row] != 1] == []
    assert view.index.blocks == len(names)
    assert view.index.check_integrity() == []


@pytest.mark.parametrize("lost", [0.0, 0.3])
@pytest.mark.parametrize("part", [3, 4096])
def test_after_work_with_evictions_the_index_is_what_the_books_find(
    lost: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "MOST_BLOCKS", part)
    random = Random(1)
    rig, bench = Rig(blocks=24), Bench("a")

    def send(message: KvEvents) -> None:
        if random.random() >= lost:
            bench.hear(message)

    reporter = KvReporter(NAME, EPOCH, rig.books, send)
    reporter.tell_all()
    for number in range(30):
        family = random.randrange(3)
        prompt = [family] * 12 + [100 + number] * random.randrange(20)
        rig.engine.submit(work(str(number), prompt, greedy(4)))
        while rig.engine.has_work():
            rig.step()
            reporter.tell_changes()
            if not lost:
                assert_index_is(bench.view, list(rig.books._by_hash))
    assert rig.books.evictions > 20
    assert bool(bench.view.kv_faults) == bool(lost)
    for _ in range(50):
        bench.clock.advance(1.0)
        bench.view.members[NAME].kv.told(reporter.sequence)
        if not bench.view.members[NAME].kv.should_ask(bench.clock.now()):
            break
        reporter.tell_all()
    assert_index_is(bench.view, list(rig.books._by_hash))
    rig.arena.close()


def test_a_reporter_says_nothing_unasked_and_nothing_without_news() -> None:
    sent: list[KvEvents] = []
    rig = Rig()
    reporter = KvReporter(NAME, EPOCH, rig.books, sent.append)
    rig.engine.submit(work("r", range(1, 3 * BLOCK + 1), greedy(1)))
    rig.run()
    reporter.tell_changes()
    assert sent == []
    reporter.tell_all()
    reporter.tell_changes()
    assert [(one.sequence, one.anew, len(one.changes[0].stored)) for one in sent] == [(1, True, 3 * 16)]
    reporter.pause()
    rig.engine.submit(work("s", range(50, 50 + 3 * BLOCK), greedy(1)))
    rig.run()
    reporter.tell_changes()
    assert len(sent) == 1
    rig.arena.close()


def test_whoever_saves_blocks_hears_of_each_once_however_often_the_router_asks() -> None:
    heard: list[BlockHash] = []
    rig = Rig()
    reporter = KvReporter(NAME, EPOCH, rig.books, lambda _: None, heard.extend)
    rig.engine.submit(work("r", range(1, 3 * BLOCK + 1), greedy(1)))
    rig.run()
    reporter.tell_all()
    reporter.tell_all()
    rig.engine.submit(work("s", range(50, 50 + 2 * BLOCK), greedy(1)))
    rig.run()
    reporter.tell_all()
    reporter.tell_changes()
    assert len(heard) == len(set(heard)) == 5
    rig.arena.close()


def test_an_empty_cache_is_told_too() -> None:
    sent: list[KvEvents] = []
    KvReporter(NAME, EPOCH, Books(4, BLOCK), sent.append).tell_all()
    assert [(one.anew, one.sequence) for one in sent] == [(True, 1)]


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

    def __init__(self, arena: Arena) -> None:
        clock = WallClock()
        self.view = ClusterView(1000)
        config = RoutingConfig(policy="replicated")
        self.service = Service(self.view, config, clock)
        self.router = RouterLink("tcp://127.0.0.1:*")
        self.membership = Membership(self.router, self.service, config, clock)
        self.books = Books(24, BLOCK)
        self.link = LossyLink(self.router.address, EPOCH)
        hasher = BlockHasher(CARD.fingerprint, BLOCK)
        runner = MockRunner(CARD, CostModel(), lambda _: None)
        limits = EngineLimits(max_sequences=4, chunk_tokens=64, step_tokens=64)
        engine = Engine(runner, arena, self.books, hasher, limits)
        parts = Parts(
            runner=runner,
            arena=arena,
            books=self.books,
            hasher=hasher,
            engine=engine,
            max_sequences=4,
            cost=CostModel(),
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


def over_sockets(scenario: Callable[[Cluster], Awaitable[None]]) -> None:
    async def run() -> None:
        with Arena.create(CARD.layout, 24) as arena:
            cluster = Cluster(arena)
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


def test_the_index_has_a_requests_blocks_by_the_time_that_its_output_ends() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        names = BlockHasher(CARD.fingerprint, BLOCK).chain([5] * 40)
        assert cluster.view.index.match(names).device[0] == 10
        await cluster.complete([6] * 80)
        await cluster.wait(cluster.in_step)
        assert cluster.books.evictions > 0

    over_sockets(scenario)


def test_blocks_that_go_without_a_request_ending_are_told_too() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        await cluster.wait(cluster.in_step)
        lease = cluster.books.acquire([], [], 20)
        assert lease is not None and not cluster.in_step()
        await cluster.wait(cluster.in_step)
        lease.release()

    over_sockets(scenario)


def test_a_worker_tells_anew_when_the_router_missed_its_last_words() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        cluster.link.losing = True
        await cluster.complete([6] * 80)
        assert cluster.link.lost > 0 and not cluster.in_step()
        cluster.link.losing = False
        await cluster.wait(cluster.in_step)
        assert cluster.view.kv_faults["gap"] == 1

    over_sockets(scenario)


def test_a_worker_that_is_asked_tells_all() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        await cluster.wait(cluster.in_step)
        cluster.view.index.clear(0)
        assert not cluster.in_step()
        cluster.router.send(EPOCH, Resync())
        await cluster.wait(cluster.in_step)

    over_sockets(scenario)
