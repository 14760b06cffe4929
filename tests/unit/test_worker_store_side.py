"""Blocks go down to the tiers and come up again: whatever happens to them there, the tokens are the right ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from random import Random
from threading import Event

import pytest
from engine_rig import BLOCK, greedy, work
from store_side_rig import HASHER, OUTPUT, Node, prompt_of

from bascule.clock import VirtualClock
from bascule.kv.store import record
from bascule.kv.store.base import Blob
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.tiers import _Slowness
from bascule.types import BlockHash, CostModel, Tier

SLOW = 1000.0
"""Times slower than such a tier is assumed to be."""


class Spoilable(MemoryStore):
    """Blocks that lie there may be changed behind everybody's back."""

    def names(self) -> list[BlockHash]:
        return list(self._blocks)

    def spoil(self, name: BlockHash, random: Random) -> None:
        """One of the things that happen to bytes: a flipped bit, a lost end, another block's record, nothing at all."""
        data = bytearray(self._blocks[name] or b"?")
        what = random.randrange(4)
        if what == 0:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        elif what == 1:
            del data[random.randrange(len(data)) :]
        elif what == 2:
            data = bytearray(self._blocks[random.choice(self.names())])
        else:
            data.clear()
        self._bytes += len(data) - len(self._blocks[name])
        self._blocks[name] = bytes(data)


@pytest.fixture
def stack() -> ExitStack:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("own_memory", [False, True])
def test_what_one_worker_computed_another_one_loads(stack: ExitStack, own_memory: bool) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        first, second = (Node([host], stack, own_memory=own_memory) for _ in range(2))
        assert await first.complete(prompt_of(1)) is None
        assert [tier for tier, stored, _ in first.told for _ in stored] == [Tier.HOST] * 11
        brought = await second.complete([*prompt_of(1), 7, 8])
        assert brought is not None
        assert brought.tokens == {Tier.HOST: 10 * BLOCK}
        assert brought.bytes == {Tier.HOST: second.side.loads()[Tier.HOST].loaded_bytes}
        assert sum(brought.bytes.values()) > 10 * second.rig.runner.card.layout.block_bytes, "records have headers"
        assert second.rig.hit_tokens == 10 * BLOCK
        assert second.side.loads()[Tier.HOST].hit_tokens == 10 * BLOCK
        assert await second.complete(prompt_of(1)) is None, "it is on the device already"

    asyncio.run(run())


def test_what_is_evicted_from_the_device_comes_back_from_a_tier(stack: ExitStack) -> None:
    async def run() -> None:
        node = Node([MemoryStore(1 << 20)], stack, blocks=24)
        for _ in range(3):
            for family in range(4):
                await node.complete(prompt_of(family))
        assert node.rig.books.evictions > 20
        assert node.side.loads()[Tier.HOST].hit_tokens >= 7 * 9 * BLOCK

    asyncio.run(run())


def test_a_block_that_one_tier_spoils_comes_from_the_next(stack: ExitStack) -> None:
    random = Random(1)
    host, disk = Spoilable(1 << 20), Spoilable(1 << 20, Tier.DISK)

    async def run() -> None:
        await Node([host, disk], stack).complete(prompt_of(1))
        for name in host.names()[2:5]:
            host._blocks[name] = host._blocks[name][:-1] + b"?"
        node = Node([host, disk], stack)
        brought = await node.complete(prompt_of(1))
        assert brought is not None
        assert brought.tokens == {Tier.HOST: 6 * BLOCK, Tier.DISK: 3 * BLOCK}
        assert node.side.loads()[Tier.HOST].invalid == {"checksum": 3}
        assert len(host.names()) == 11, "what was spoilt was dropped, and saved again"
        for name in [*host.names(), *disk.names()]:
            (host if name in host._blocks else disk).spoil(name, random)
            disk._blocks.pop(name, None)
        assert await Node([host, disk], stack).complete(prompt_of(1)) is None

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(12))
def test_random_work_with_evictions_restarts_and_damage_never_gives_a_wrong_token(seed: int, stack: ExitStack) -> None:
    random = Random(seed)
    # Room for a few prompts on the device, for some more on the host, and for most on the disk.
    stores = [Spoilable(12_000), Spoilable(60_000, Tier.DISK)]
    kind = {"blocks": random.choice((16, 24, 48)), "own_memory": bool(seed % 2), "chunk": random.choice((3, 8, 64))}

    async def run() -> int:
        node, loaded = Node(stores, stack, **kind), 0
        for _ in range(40):
            family, length = random.randrange(5), random.randrange(2, 45)
            brought = await node.complete(prompt_of(family, length), random.choice((0, 40)))
            loaded += sum(brought.tokens.values()) if brought is not None else 0
            for store in stores:
                for name in store.names():
                    if random.random() < 0.02:
                        store.spoil(name, random)
                    elif random.random() < 0.02:
                        store.drop([name])
            if random.random() < 0.1:
                node = Node(stores, stack, **kind)
            assert node.rig.engine.check_integrity() == []
            held = node.rig.books.counts
            assert held.held == 0, "a load has kept blocks"
        return loaded

    assert asyncio.run(run()) > 0


def test_two_that_want_the_same_load_it_once(stack: ExitStack) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        await Node([host], stack).complete(prompt_of(1))
        node = Node([host], stack)
        brought = await asyncio.gather(*(node.bring(prompt_of(1)) for _ in range(4)))
        assert brought == [9] * 4
        assert node.tiers.figures[Tier.HOST].loaded_blocks == 9

    asyncio.run(run())


def test_what_is_not_worth_loading_is_computed(stack: ExitStack) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        await Node([host], stack).complete(prompt_of(1))
        node = Node([host], stack)
        node.rig.engine.cost = CostModel(token_s=1e-6)
        node.tiers._slowness[Tier.HOST] = _Slowness(SLOW, node.tiers._now())
        assert await node.complete(prompt_of(1)) is None
        node = Node([host], stack)
        node.rig.engine.cost = CostModel(token_s=1.0)
        node.tiers._slowness[Tier.HOST] = _Slowness(SLOW, node.tiers._now())
        assert await node.bring(prompt_of(1)) == 9

    asyncio.run(run())


def test_a_full_device_loads_nothing(stack: ExitStack) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        await Node([host], stack).complete(prompt_of(1))
        node = Node([host], stack, blocks=16)
        with node.rig.books.acquire([], [], 16) or pytest.fail("no blocks"):
            assert await node.bring(prompt_of(1)) == 0
        assert node.rig.engine.check_integrity() == []

    asyncio.run(run())


def test_the_router_is_told_what_it_wrongly_takes_to_be_there(stack: ExitStack) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        await Node([host], stack).complete(prompt_of(1))
        names = HASHER.chain(prompt_of(1))
        host.drop(names[4:6])
        node = Node([host], stack)
        await node.bring(prompt_of(1), believed=8 * BLOCK)
        await asyncio.sleep(0)
        assert node.told == [(Tier.HOST, [], names[4:6])], "what lies behind a hole is still there"
        await node.complete(prompt_of(1))
        assert [name for _, came, _ in node.told for name in came if name in names] == names[4:6]
        assert all(host.holds(names)), "the hole is filled"

    asyncio.run(run())


def test_a_request_that_is_given_up_leaves_no_blocks_behind(stack: ExitStack) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        await Node([host], stack).complete(prompt_of(1))
        node = Node([host], stack)
        key, ready = node.submit(prompt_of(1))
        await asyncio.sleep(0)
        node.side.cancel(key)
        with pytest.raises(asyncio.CancelledError):
            await ready
        await node.rest()
        assert node.rig.books.counts.held == 0
        assert (node.side.waiting, node.side.waiting_tokens) == (0, 0)
        assert node.rig.engine.check_integrity() == []

    asyncio.run(run())


def test_other_weights_under_the_same_hashes_are_not_loaded(stack: ExitStack) -> None:
    """Names are keyed with the fingerprint, so this takes a forger; the record's own digest finds it all the same."""
    host = MemoryStore(1 << 20)

    async def run() -> None:
        await Node([host], stack).complete(prompt_of(1))
        node = Node([host], stack)
        node.tiers._fingerprint = "other weights"
        assert await node.bring(prompt_of(1)) == 0
        assert node.side.loads()[Tier.HOST].invalid == {"fingerprint": 9}

    asyncio.run(run())


def test_a_block_that_is_evicted_while_it_is_copied_is_not_saved(stack: ExitStack) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        node = Node([host], stack, blocks=16)
        rig = node.rig
        rig.engine.submit(work("r", prompt_of(1), greedy(OUTPUT)))
        rig.run()

        class Meddling:
            """Blocks are evicted and written anew just when they are to be copied."""

            layout = rig.arena.layout

            @property
            def bytes(self) -> object:
                with rig.books.acquire([], [], 16) or pytest.fail("no blocks"):
                    rig.arena.bytes[:] = 66
                return rig.arena.bytes

        node.tiers._arena = Meddling()  # type: ignore[assignment]
        assert node.tiers.save(Tier.HOST, HASHER.chain(prompt_of(1))).taken == {}
        assert host.stats().blocks == 0

    asyncio.run(run())


class Slow(MemoryStore):
    """A tier whose calls take a while by a clock of our own, or until they are let go."""

    clock = VirtualClock()
    takes_s = 0.0

    def __init__(self, capacity: int, tier: Tier) -> None:
        super().__init__(capacity, tier)
        self.go = Event()
        self.go.set()

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        self.clock.advance(self.takes_s)
        return super().get(names)

    def put(self, items: Mapping[BlockHash, Blob]) -> int:
        assert self.go.wait(20)
        return super().put(items)


def test_a_tier_that_is_slow_to_take_blocks_holds_up_no_other(stack: ExitStack) -> None:
    host, remote = MemoryStore(1 << 20), Slow(1 << 20, Tier.REMOTE)

    async def run() -> None:
        node = Node([host, remote], stack)
        remote.go.clear()
        node.rig.engine.submit(work("r", prompt_of(1), greedy(OUTPUT)))
        node.rig.run()
        node.side.computed(node.rig.books.changes().stored)
        while host.stats().blocks < 11:
            await asyncio.sleep(0.001)
        assert remote.stats().blocks == 0
        remote.go.set()
        while node.side.saving:
            await asyncio.sleep(0.001)
        assert remote.stats().blocks == 11

    asyncio.run(run())


def test_what_turns_out_to_be_slow_is_not_tried_again_for_a_while(stack: ExitStack) -> None:
    remote = Slow(1 << 20, Tier.REMOTE)

    async def run() -> None:
        prompt = prompt_of(1, 49 * BLOCK)
        await Node([remote], stack).complete(prompt)
        node = Node([remote], stack)
        node.tiers._now = remote.clock.now
        node.rig.engine.cost = CostModel(token_s=0.01)
        remote.takes_s = 30.0
        assert await node.bring(prompt) > 0
        for _ in range(2):
            node.rig.books.acquire([], [], 64).release()  # type: ignore[union-attr]
            brought = await node.bring(prompt)
        assert brought == 0
        remote.clock.advance(600)
        remote.takes_s = 0.0
        assert await node.bring(prompt) > 0

    asyncio.run(run())


def test_releases_with_other_records_share_a_place_and_leave_each_others_blocks_alone(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = MemoryStore(1 << 20)

    async def run() -> None:
        ours = Node([host], stack)
        await ours.complete(prompt_of(1))
        with monkeypatch.context() as theirs:
            theirs.setattr(record, "_VERSION", 3)
            next_release = Node([host], stack)
            assert await next_release.complete(prompt_of(1)) is None
            assert host.stats().blocks == 22
            brought = await Node([host], stack).complete(prompt_of(1))
            assert brought is not None and brought.tokens == {Tier.HOST: 9 * BLOCK}
            told = [name for page in next_release.tiers.names(Tier.HOST) for name in page]
            assert set(told) >= set(HASHER.chain(prompt_of(1)))
        brought = await Node([host], stack).complete(prompt_of(1))
        assert brought is not None and brought.tokens == {Tier.HOST: 9 * BLOCK}
        assert host.stats().blocks == 22 and host.stats().misses == 0

    asyncio.run(run())


def test_a_load_of_one_block_tells_what_a_tier_costs(stack: ExitStack) -> None:
    remote = Slow(1 << 20, Tier.REMOTE)

    async def run() -> None:
        prompt = prompt_of(1, BLOCK + 1)
        await Node([remote], stack).complete(prompt)
        node = Node([remote], stack)
        node.tiers._now = remote.clock.now
        before = node.tiers.costs()[Tier.REMOTE]
        remote.takes_s = 30.0
        assert await node.bring(prompt) == 1
        assert node.tiers.costs()[Tier.REMOTE].latency_s > 10 * before.latency_s

    asyncio.run(run())
