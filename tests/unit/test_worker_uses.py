"""What requests find on the device is used in the tiers below, too, a prefix's beginning longer than its end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from engine_rig import BLOCK, HASHER
from store_side_rig import Node, prompt_of

from bascule.clock import VirtualClock
from bascule.engine.sequence import Key
from bascule.kv.store.base import Use
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.memory import MemoryStore
from bascule.types import BlockHash, RequestId
from bascule.worker import uses as module
from bascule.worker.uses import EVERY_S, Uses
from support.redis_server import PATIENT

PROMPT = prompt_of(1, 4 * BLOCK + 2)
NAMES = HASHER.chain(PROMPT)


class Told:
    """What is told, by a clock of our own, and what a tier knows by it."""

    def __init__(self, most: int = 100) -> None:
        self.clock = VirtualClock(1000.0)
        self.calls: list[list[Use]] = []
        self.known: dict[BlockHash, Use] = {}
        self.uses = Uses(HASHER, self.tell, most)
        self.uses._now = self.clock.now
        self.number = 0

    def tell(self, uses: list[Use]) -> None:
        self.calls.append(uses)
        self.known |= {use.name: use for use in uses}

    def ask(self, prompt: list[int], found: int = 0, output: tuple[int, ...] = (1,), *, leaves: bool = False) -> None:
        self.number += 1
        key = Key(RequestId(str(self.number)), 1)
        self.uses.begin(key, prompt, HASHER.chain(prompt[:-1]), b"", leaves=leaves)
        self.uses.found(key, found)
        for place, token in enumerate(output, 1):
            self.uses.drew(key, token, last=place == len(output) and not leaves)

    def in_order(self, tokens: list[int]) -> bool:
        at = [self.known[name].at for name in HASHER.chain(tokens)]
        return at == sorted(at, reverse=True) and len(set(at)) == len(at)


def test_a_block_is_told_once_a_minute_and_once_more_when_it_is_used_again() -> None:
    told = Told()
    told.ask(PROMPT)
    first = told.calls.pop()
    assert [(use.name, use.again) for use in first] == [(name, False) for name in NAMES]
    assert [use.depth for use in first] == list(range(len(NAMES)))
    told.ask(PROMPT)
    assert told.calls == []
    told.ask(PROMPT, found=3)
    assert [(use.name, use.again) for use in told.calls.pop()] == [(name, True) for name in NAMES[:3]]
    told.ask(PROMPT, found=3)
    assert told.calls == []
    told.clock.advance(EVERY_S)
    told.ask(PROMPT, found=3)
    assert [use.name for use in told.calls.pop()] == NAMES


def test_what_is_in_front_is_told_to_be_used_later_whatever_was_told_before() -> None:
    told = Told()
    told.ask(PROMPT)
    told.clock.advance(EVERY_S / 2)
    longer = [*PROMPT, *range(1, 5 * BLOCK)]
    told.ask(longer, found=4)
    assert told.in_order(longer[:-1])
    told.clock.advance(EVERY_S / 3)
    told.ask([*longer, 7, 8, 9, 10], found=9)
    assert told.in_order([*longer, 7, 8, 9])


def test_an_output_counts_when_it_has_ended() -> None:
    told, output = Told(), tuple(range(1, 3 * BLOCK))
    told.ask(PROMPT, output=output)
    whole = HASHER.chain([*PROMPT, *output[:-1]])
    assert list(told.known) == whole and len(whole) == 7
    assert told.in_order([*PROMPT, *output[:-1]])
    assert told.uses._texts == {}


def test_nothing_is_kept_of_requests_that_leave_or_end_and_little_of_blocks() -> None:
    told = Told(most=10)
    told.ask(prompt_of(2, 4 * BLOCK), leaves=True)
    assert list(told.known) == HASHER.chain(prompt_of(2, 4 * BLOCK))
    key = Key(RequestId("given up"), 1)
    told.uses.begin(key, PROMPT, NAMES, b"", leaves=False)
    told.uses.forget(key)
    told.uses.drew(key, 1, last=True)
    assert told.uses._texts == {} and NAMES[0] not in told.known
    told.ask(prompt_of(3, 30 * BLOCK))
    assert len(told.uses._latest) == 10
    told.clock.advance(EVERY_S)
    told.ask(PROMPT)
    assert len(told.uses._latest) == len(NAMES)


# ---------------------------------------------------------------- through a worker's store side


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_prefix_that_is_hot_on_the_device_outlives_what_passes_below_and_is_loaded_after_a_restart(
    stack: ExitStack, tmp_path: Path
) -> None:
    system, size = prompt_of(1, 6 * BLOCK), 0

    async def scenario() -> None:
        nonlocal size
        with closing(MemoryStore(1 << 20)) as measure:
            await Node([measure], stack).complete(system)
            size = measure.stats().bytes // measure.stats().blocks
        below = stack.enter_context(closing(DirectoryStore(tmp_path, 60 * size, timeout_s=PATIENT)))
        node = Node([below], stack, blocks=256)
        await node.complete(system)
        for family in range(2, 14):
            await node.complete([*system, *prompt_of(family, 8 * BLOCK)])  # a session: the system prompt is a hit
            await node.complete(prompt_of(100 + family, 16 * BLOCK))  # and a scan, which nobody asks for again
        assert below.stats().evictions > 100
        again = stack.enter_context(closing(DirectoryStore(tmp_path, 60 * size, timeout_s=PATIENT)))
        brought = await Node([again], stack).complete([*system, 7, 8])
        assert brought is not None and sum(brought.tokens.values()) == 6 * BLOCK

    asyncio.run(scenario())


def test_what_a_tier_has_evicted_is_given_to_it_again_when_it_is_used_on_the_device(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)

    async def scenario() -> None:
        store = MemoryStore(1 << 20)
        node, names = Node([store], stack), HASHER.chain(prompt_of(1))
        await node.complete(prompt_of(1))
        store.drop(names[:4])
        node.told.clear()
        assert await node.complete(prompt_of(1)) is None, "it is on the device"
        assert store.holds(names) == [True] * len(names)
        assert [stored for _, stored, _ in node.told] == [names[:4]]

    asyncio.run(scenario())
