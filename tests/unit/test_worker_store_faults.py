"""What a worker must survive of its store: other models' blocks, a router that asks twice, calls that never end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from threading import Event, current_thread

import pytest
from engine_rig import BLOCK, CARD
from store_side_rig import HASHER, Node, prompt_of
from test_worker_kv_events import Cluster, over_sockets

from bascule.control.actuators import process
from bascule.engine.sequence import Key
from bascule.kv.store.forms import Forms
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.tiers import Tiers, _Slowness
from bascule.types import BlockHash, CostModel, Tier
from bascule.wire import Submit
from bascule.worker import announcer
from bascule.worker.store_side import StoreSide


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def numbered(count: int) -> list[BlockHash]:
    return [BlockHash(number.to_bytes(16, "big")) for number in range(count)]


async def all_told(node: Node) -> list[BlockHash]:
    while node.side._counting is None or not node.side._counting.done():
        await asyncio.sleep(0.001)
    return [name for _, stored, _ in node.told for name in stored]


def test_a_worker_tells_no_more_blocks_than_the_router_has_room_for(stack: ExitStack) -> None:
    """Those of a model with small blocks, in a place shared with it, are more: told, they would be told for ever."""
    host = MemoryStore(4 * CARD.layout.block_bytes)
    host.put(dict.fromkeys(numbered(60), b"small"))

    async def run() -> None:
        node = Node([host], stack)
        assert node.side.places()[Tier.HOST].blocks == 4
        node.side.tell_all()
        assert len(await all_told(node)) == 4

    asyncio.run(run())


class Paged(MemoryStore):
    """Names in pages of one, of which the second waits to be let go."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.go = Event()

    def names(self) -> Iterator[list[BlockHash]]:
        for number, name in enumerate(numbered(3)):
            assert not number or self.go.wait(20)
            yield [name]


def test_a_router_that_asks_again_while_it_is_told_is_told_all(stack: ExitStack) -> None:
    host = Paged(1 << 20)

    async def run() -> None:
        node = Node([host], stack)
        node.side.tell_all()
        while not node.told:
            await asyncio.sleep(0.001)
        node.told.clear()  # as the router forgets when it is told anew
        node.side.tell_all()
        host.go.set()
        assert set(await all_told(node)) == set(numbered(3))

    asyncio.run(run())


class Stuck(MemoryStore):
    """Finds nothing before it is let go."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.go = Event()
        self.asked = 0
        """How often for loads; whoever saves asks, too."""

    def holds(self, names: Sequence[BlockHash]) -> list[bool]:
        self.asked += not current_thread().name.startswith("kv-save")
        assert self.go.wait(20)
        return super().holds(names)


def test_a_prompt_waits_for_no_store_that_hangs(stack: ExitStack) -> None:
    """Nor for other prompts' turns in it, and those that nobody needs any more are not looked for."""
    host = Stuck(1 << 20)

    async def run() -> None:
        node = Node([host], stack)
        node.rig.engine.cost = CostModel(token_s=1e-6)
        prompts = [prompt_of(family % 4) for family in range(8)]
        submitted = [node.submit(prompt) for prompt in prompts]
        await asyncio.wait_for(asyncio.gather(*(ready for _, ready in submitted)), 15)
        assert not host.go.is_set() and host.asked <= 2
        while node.rig.engine.has_work():
            node.side.stepped(node.rig.step())
        for (key, _), prompt in zip(submitted, prompts, strict=True):
            assert node.check(key, prompt) is None
        assert (node.side.waiting, node.side.waiting_tokens) == (0, 0)
        host.go.set()
        while node.side.loading:
            await asyncio.sleep(0.001)
        assert host.asked <= 2
        assert node.rig.books.counts.held == 0

    asyncio.run(run())


def test_the_router_hears_again_of_what_was_out_of_reach_for_a_while(stack: ExitStack) -> None:
    """Else nobody would ever tell it: blocks that lie in a tier are not saved there again."""
    host = MemoryStore(1 << 20)

    async def run() -> None:
        await Node([host], stack).complete(prompt_of(1))
        names = HASHER.chain(prompt_of(1))
        node = Node([host], stack)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "holds", lambda asked: [False] * len(asked))
            assert await node.bring(prompt_of(1), 9 * BLOCK) == 0
        assert await node.bring(prompt_of(1), 2 * BLOCK) == 9
        await asyncio.sleep(0)
        assert node.told == [(Tier.HOST, [], names[:9]), (Tier.HOST, names[2:9], [])]

    asyncio.run(run())


class Broken(StoreSide):
    """Has an error that nobody has thought of."""

    async def _start(self, key: Key, submission: Submit, ready: Callable[[Submit], None]) -> None:
        raise RuntimeError("unforeseen")


def test_a_request_whose_loading_fails_unforeseen_is_not_lost() -> None:
    """The worker ends, as with any error that nobody has foreseen, and the router places the request elsewhere."""

    async def scenario(cluster: Cluster) -> None:
        parts = cluster.worker._parts
        tiers = Tiers([], parts.arena, parts.books, CARD.fingerprint, Forms("none", CARD.layout))
        broken = Broken(tiers, parts.engine, parts.books, parts.hasher, CARD.layout, lambda *_: None)
        cluster.worker._store = cluster.worker._arrivals._store = broken
        errors: list[BaseException] = []
        cluster.worker._end_with = errors.append  # type: ignore[method-assign]
        waiting = asyncio.create_task(cluster.complete([5] * 40))
        await cluster.wait(lambda: bool(errors))
        waiting.cancel()
        assert str(errors[0]) == "unforeseen"

    over_sockets(scenario)


def test_a_worker_gives_up_saving_long_before_it_is_killed() -> None:
    """A killed one closes no store: the memory of the host tier would stay taken."""
    assert announcer.FLUSH_S <= process._GRACE_S / 2


class Asked(MemoryStore):
    """Counts how often it is asked for anything."""

    times = 0

    def holds(self, names: Sequence[BlockHash]) -> list[bool]:
        self.times += 1
        return super().holds(names)


def test_a_tier_that_takes_longer_than_computing_is_not_even_asked(stack: ExitStack) -> None:
    host, remote = Asked(1 << 20), Asked(1 << 20, Tier.REMOTE)

    async def run() -> None:
        node = Node([host, remote], stack)
        node.rig.engine.cost = CostModel(token_s=1e-4)
        node.tiers._slowness[Tier.REMOTE] = _Slowness(1000.0, node.tiers._now())
        await node.bring(list(range(1, 41)), believed=40)
        await asyncio.sleep(0)
        assert (host.times, remote.times) == (1, 0)
        assert {tier for tier, _, _ in node.told} == {Tier.HOST}, "of the other nothing was learnt"

    asyncio.run(run())
