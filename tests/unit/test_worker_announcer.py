"""What is said of a request whose KV is to be in a tier: that it is there, and how much of it was written for that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from engine_rig import BLOCK, greedy, work
from msgspec.structs import replace
from store_side_rig import HASHER, Gated, Node, prompt_of

from bascule.engine.sequence import Key
from bascule.kv.store.base import Blob
from bascule.kv.store.memory import MemoryStore
from bascule.types import BlockHash, RequestId, Tier
from bascule.wire import Submit
from bascule.worker.announcer import Announcer

SIZES = {name: 100 + number for number, name in enumerate(HASHER.chain(prompt_of(1)))}


def submission(name: str, tokens: int, save_to: Tier | None = Tier.DISK) -> tuple[Key, Submit]:
    asked = Submit(
        request=RequestId(name),
        attempt=0,
        prompt=tuple(prompt_of(1)[:tokens]),
        generated=(),
        sampling=greedy(1),
        save_to=save_to,
    )
    return Key(asked.request, asked.attempt), asked


class Told(dict[str, Mapping[Tier, int]]):
    """By request, what was announced."""

    def hear(self, key: Key, sizes: Mapping[Tier, int], missing: int) -> None:
        self[key.request] = sizes


def test_what_is_written_counts_for_one_request_that_wants_it_in_that_tier() -> None:
    names, told = list(SIZES), Told()

    async def run() -> None:
        announcer = Announcer({}, HASHER, told.hear)
        for name, tokens, tier in (("a", 4 * BLOCK, Tier.DISK), ("b", 8 * BLOCK, Tier.DISK), ("c", BLOCK, None)):
            announcer.begin(*submission(name, tokens, tier))
        announcer.written(Tier.HOST, SIZES)
        announcer.written(Tier.DISK, {name: SIZES[name] for name in names[:2]})
        announcer.written(Tier.DISK, {name: SIZES[name] for name in names[1:7]})
        for name in "abc":
            announcer.ended(Key(RequestId(name), 0))
        while len(told) < 2:
            await asyncio.sleep(0)
        announcer.written(Tier.DISK, {name: SIZES[name] for name in names[7:]})

    asyncio.run(run())
    assert told == {"a": {Tier.DISK: 100 + 101 + 102 + 103}, "b": {Tier.DISK: 101 + 104 + 105 + 106}}


def test_a_request_that_is_forgotten_is_not_announced() -> None:
    told = Told()

    async def run() -> None:
        announcer = Announcer({}, HASHER, told.hear)
        key, asked = submission("a", 4 * BLOCK)
        announcer.begin(key, asked)
        announcer.forget(key)
        announcer.ended(key)
        announcer.written(Tier.DISK, SIZES)
        await asyncio.sleep(0)
        assert not announcer._wanted and not announcer._tasks

    asyncio.run(run())
    assert told == {}


async def first_leg(node: Node, turn: int, prompt: Sequence[int], told: Sequence[object]) -> None:
    """Serve a request to its only token, and wait for what is announced of it, which is the number `turn`."""
    engine, asked = node.rig.engine, work(str(turn), prompt, greedy(1))
    _, leg = submission(str(turn), len(prompt), Tier.HOST)
    await node.side.start(replace(leg, attempt=asked.attempt, prompt=tuple(prompt)), lambda _: None)
    engine.submit(asked)
    while len(told) == turn:
        if engine.has_work():
            node.step()
        await asyncio.sleep(0)
    await node.rest()


def test_the_bytes_of_a_handoff_are_those_that_went_to_its_tier_and_none_the_second_time() -> None:
    store, told = MemoryStore(1 << 20), list[Mapping[Tier, int]]()

    async def run() -> None:
        with ExitStack() as stack:
            for turn in range(2):
                node = Node([Gated(tier=Tier.DISK), store], stack)
                node.side._announcer._announce = lambda _, sizes, __: told.append(sizes)  # type: ignore[method-assign]
                await first_leg(node, turn, prompt_of(1), told)
                saved = node.side.loads()[Tier.HOST].saved_bytes
                assert told[turn] == {Tier.HOST: saved}
                assert (saved > 10 * node.rig.runner.card.layout.block_bytes) == (turn == 0)

    asyncio.run(run())


class Refusing(MemoryStore):
    """Takes nothing while it is shut."""

    shut = True

    def put(self, items: Mapping[BlockHash, Blob]) -> int:
        return 0 if self.shut else super().put(items)


def test_what_a_tier_has_not_taken_is_announced_as_missing() -> None:
    store, told = Refusing(1 << 20), list[tuple[int, int]]()

    async def run() -> None:
        with ExitStack() as stack:
            node = Node([store], stack)
            node.side._announcer._announce = lambda _, sizes, missing: told.append((sizes[Tier.HOST], missing))
            for turn in range(2):
                store.shut = turn == 0
                await first_leg(node, turn, prompt_of(1 + turn), told)

    asyncio.run(run())
    full = len(prompt_of(1)) // BLOCK
    assert told[0] == (0, full)
    assert told[1][0] > 0 and told[1][1] == 0
