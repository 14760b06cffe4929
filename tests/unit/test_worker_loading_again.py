"""Prompts that wait for memory: what a tier has of them is loaded when their turn comes, and only the rest computed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from engine_rig import BLOCK
from store_side_rig import HASHER, KNOWN, LENGTH, OUTPUT, PROMPT, Gated, Node, finish, patient, prompt_of, run, until
from test_engine_late_hits import watched

from bascule.engine.sequence import Key
from bascule.kv.books import Lease
from bascule.types import Tier

DEVICE = LENGTH + 8
"""Blocks: memory for one prompt."""
LAST = [LENGTH * BLOCK + offset for offset in range(2 + OUTPUT - 1)]
"""Positions that no tier has."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def store() -> Gated:
    return Gated()


async def waiting(store: Gated, stack: ExitStack) -> tuple[Node, Lease, Key]:
    """A prompt that lies in the store, in the line of an engine whose memory others hold."""
    await Node([store], stack).complete(PROMPT)
    store.asked.clear()
    patient(store, stack)
    node = Node([store], stack, blocks=DEVICE)
    node.rig.engine.cost = KNOWN
    lease = node.rig.books.acquire([], [], DEVICE)
    assert lease is not None
    key, ready = node.submit(PROMPT)
    await ready
    await until(lambda: not node.side.loading)
    assert node.rig.step().is_empty and store.asked == []
    return node, lease, key


async def serve(node: Node) -> None:
    """As a worker does: what loads goes on beside the steps."""
    while node.rig.engine.load().waiting + node.rig.engine.load().running:
        if node.rig.engine.has_work():
            node.step()
        await asyncio.sleep(0.0002)


def test_a_prompt_that_came_while_the_device_was_full_is_loaded_once_it_has_memory(
    store: Gated, stack: ExitStack
) -> None:
    async def scenario() -> None:
        node, lease, key = await waiting(store, stack)
        computed = watched(node.rig)
        lease.release()
        await serve(node)
        brought = node.check(key, PROMPT)
        assert brought is not None and brought.tokens == {Tier.HOST: LENGTH * BLOCK}
        assert computed == LAST
        assert node.rig.outputs[key][0].cached_tokens == LENGTH * BLOCK
        await finish(node, store)

    run(scenario)


def test_prompts_that_wait_for_the_memory_of_one_are_each_loaded(store: Gated, stack: ExitStack) -> None:
    prompts = [prompt_of(family, LENGTH * BLOCK + 2) for family in range(3)]

    async def scenario() -> None:
        first = Node([store], stack)
        for prompt in prompts:
            await first.complete(prompt)
        node = Node([store], stack, blocks=DEVICE)
        node.rig.engine.cost = KNOWN
        patient(store, stack)
        computed = watched(node.rig)
        asked = {node.submit(prompt)[0]: prompt for prompt in prompts}
        while node.side._starting:
            await asyncio.sleep(0.0002)
        await serve(node)
        for key, prompt in asked.items():
            node.check(key, prompt)
            assert node.rig.outputs[key][0].cached_tokens == LENGTH * BLOCK
        assert sorted(computed) == sorted(LAST * 3)
        assert node.side.loads()[Tier.HOST].hit_tokens == 3 * LENGTH * BLOCK
        await finish(node, store)

    run(scenario)


def test_what_was_on_the_device_and_is_evicted_before_its_turn_comes_back_from_the_tier(
    store: Gated, stack: ExitStack
) -> None:
    async def scenario() -> None:
        node = Node([store], stack, blocks=DEVICE)
        await node.complete(PROMPT)
        node.rig.engine.cost = KNOWN
        key, ready = node.submit(PROMPT)
        await ready
        assert store.asked == []
        with node.rig.books.acquire([], [], DEVICE) or pytest.fail("no blocks"):
            assert node.rig.step().is_empty
        patient(store, stack)
        computed = watched(node.rig)
        await serve(node)
        assert node.check(key, PROMPT) is not None and computed == LAST
        await finish(node, store)

    run(scenario)


def test_a_tier_that_hangs_then_costs_the_patience_and_nothing_else(store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        node, lease, key = await waiting(store, stack)
        store.open = False
        lease.release()
        await serve(node)
        assert node.check(key, PROMPT) is None
        assert [names[-1] for names in store.asked] == [HASHER.chain(PROMPT)[-1]], "it still hangs in its only call"
        await finish(node, store)

    run(scenario)


def test_what_no_tier_gives_is_not_asked_for_again(store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        await Node([store], stack).complete(PROMPT)
        for name in list(store._blocks):
            store._blocks[name] = b"?"
        node = Node([store], stack, sequences=1)
        node.rig.engine.cost = KNOWN
        store.asked.clear()
        key, ready = node.submit(PROMPT)
        await ready
        await until(lambda: not node.side.loading)
        assert [each.held for each in node.step().admitted] == [False]
        await serve(node)
        assert node.check(key, PROMPT) is None
        assert len(store.asked) <= 2
        await finish(node, store)

    run(scenario)


@pytest.mark.parametrize("when", ["waiting", "held", "loading"])
def test_a_request_that_is_cancelled_leaves_nothing_behind(when: str, store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        node, lease, key = await waiting(store, stack)
        store.open = False
        if when != "waiting":
            lease.release()
            assert [each.held for each in node.step().admitted] == [True]
        if when == "loading":
            await until(lambda: bool(store.asked))
        node.side.cancel(key)
        node.rig.engine.cancel(*key)
        lease.release()
        await finish(node, store)
        assert len(store.asked) <= (when != "waiting")

    run(scenario)
