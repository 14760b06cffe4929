"""Prompts that wait for memory: what a tier has of them is loaded when their turn comes, and only the rest computed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from random import Random

import pytest
from engine_rig import BLOCK
from store_side_rig import (
    HASHER,
    KNOWN,
    LENGTH,
    OUTPUT,
    PROMPT,
    WAIT,
    Gated,
    Node,
    endless,
    finish,
    gated,
    patient,
    prompt_of,
    run,
    until,
)
from test_engine_late_hits import watched

from bascule.engine.core import StepResult
from bascule.engine.sequence import Key
from bascule.kv.books import Lease
from bascule.types import Tier
from bascule.worker import steploop
from bascule.worker.steploop import StepLoop

DEVICE = LENGTH + 8
"""Blocks: memory for one prompt."""
LAST = [LENGTH * BLOCK + offset for offset in range(2 + OUTPUT - 1)]
"""Positions that no tier has."""
ASKED = [*PROMPT[: LENGTH * BLOCK], *range(7000, 7000 + 3 * BLOCK + 1)]
"""The prompt that the tier has, and behind it what it has not."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def store() -> Gated:
    return Gated()


async def waiting(
    store: Gated, stack: ExitStack, blocks: int = DEVICE, prompt: list[int] = PROMPT
) -> tuple[Node, Lease, Key]:
    """A prompt that lies in the store, in the line of an engine whose memory others hold."""
    await Node([store], stack).complete(PROMPT)
    store.asked.clear()
    patient(store, stack)
    node = Node([store], stack, blocks=blocks)
    node.rig.engine.cost = KNOWN
    lease = node.rig.books.acquire([], [], blocks)
    assert lease is not None
    key, ready = node.submit(prompt)
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


@pytest.mark.parametrize("spare", [2, 8, 40])
@pytest.mark.parametrize("prompt", [PROMPT, ASKED], ids=["all is known", "a new question"])
def test_a_prompt_that_came_while_the_device_was_full_is_loaded_once_it_has_memory(
    prompt: list[int], spare: int, store: Gated, stack: ExitStack
) -> None:
    async def scenario() -> None:
        blocks = -(-len(prompt) // BLOCK) + spare
        node, lease, key = await waiting(store, stack, blocks, prompt)
        endless(stack)
        computed = watched(node.rig)
        lease.release()
        await serve(node)
        brought = node.check(key, prompt)
        assert brought is not None and brought.tokens == {Tier.HOST: LENGTH * BLOCK}
        assert computed == list(range(LENGTH * BLOCK, len(prompt) + OUTPUT - 1))
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
        endless(stack)
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
        endless(stack)
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
        endless(stack)
        store.asked.clear()
        key, ready = node.submit(PROMPT)
        await ready
        await until(lambda: not node.side.loading)
        assert node.step().admitted == []
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


async def late(store: Gated, stack: ExitStack) -> tuple[Node, Key]:
    """A prompt whose load holds, in a call that is not answered, memory without which it cannot be admitted."""
    node = await gated(store, stack, blocks=DEVICE)
    real, node.side._engine.is_starved = node.side._engine.is_starved, lambda *_: False  # type: ignore[method-assign]
    key, ready = node.submit(PROMPT)
    await ready
    node.side._engine.is_starved = real  # type: ignore[method-assign]
    assert node.rig.step().is_empty
    assert not node.rig.engine.has_work()
    return node, key


def test_a_late_load_wakes_the_engine_when_it_gives_back_what_its_prompt_waits_for(
    store: Gated, stack: ExitStack
) -> None:
    async def scenario() -> None:
        node, key = await late(store, stack)
        runnable: list[bool] = []
        node.wake = lambda: runnable.append(node.rig.engine.has_work())
        store.gate.release()
        await until(lambda: bool(runnable))
        assert runnable[0], "it can be admitted now"
        await until(lambda: not node.side.loading)
        assert len(store.asked) == 1, "no memory is taken from it for the rest of the load"
        endless(stack)
        store.let_all()
        await serve(node)
        brought = node.check(key, PROMPT)
        assert brought is not None and brought.tokens == {Tier.HOST: LENGTH * BLOCK}
        await finish(node, store)

    run(scenario)


def test_a_late_load_gives_its_memory_back_to_a_prompt_that_has_none(store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        node = await gated(store, stack, blocks=DEVICE)
        runnable: list[bool] = []
        node.wake = lambda: runnable.append(node.rig.engine.has_work())
        key, ready = node.submit(PROMPT)
        await ready
        assert node.rig.books.counts.held == 0 and runnable == [True]
        assert len(node.step().outputs) == 0
        while node.rig.engine.has_work():
            node.step()
        assert len(store.asked) == 1, "it still hangs in its first call"
        before = node.rig.arena.bytes.copy()
        store.let_all()
        await node.rest()
        assert (node.rig.arena.bytes == before).all(), "what comes too late is written nowhere"
        assert node.check(key, PROMPT) is None
        node.rig.assert_idle()

    run(scenario)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_waits_for_the_step_loop_to_look_by_itself(
    seed: int, store: Gated, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is loaded when, for more prompts than the device has memory for: the loop is woken when one can run."""
    monkeypatch.setattr(steploop, "_IDLE_CHECK_S", 10 * WAIT)
    random = Random(seed)
    prompts = [prompt_of(number % 3, random.randrange(20, LENGTH * BLOCK)) for number in range(6)]

    async def scenario() -> None:
        first = Node([store], stack)
        for prompt in prompts[:4]:
            await first.complete(prompt)
        node = Node([store], stack, blocks=random.choice((DEVICE, 2 * DEVICE)), sequences=random.choice((1, 4)))
        node.rig.engine.cost = KNOWN
        loop = asyncio.get_running_loop()

        def stepped(result: StepResult) -> None:
            node.rig.note(result)
            node.side.computed(node.rig.books.changes().stored)
            node.side.stepped(result)

        steps = StepLoop(node.rig.engine, partial(loop.call_soon_threadsafe, stepped), lambda _: None)
        node.wake = steps.wake
        steps.start()
        store.open = random.random() < 0.5
        asked: dict[Key, list[int]] = {}
        for _ in range(10):
            prompt = random.choice(prompts)
            key, ready = node.submit(prompt)
            ready.add_done_callback(lambda _: steps.wake())
            asked[key] = prompt
            await asyncio.sleep(random.choice((0, 0.001, 0.01)))
            store.gate.release(random.choice((1, 2)))
        store.let_all()
        try:
            await until(lambda: all(len(node.rig.outputs.get(key, ())) == OUTPUT for key in asked))
        finally:
            await asyncio.to_thread(steps.stop, WAIT)
        for key, prompt in asked.items():
            node.check(key, prompt)
        await node.rest()
        node.rig.assert_idle()

    run(scenario)
