"""A store that takes its time: the prompt is computed from the front and loaded from the back, and both meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from threading import Event
from time import sleep

import pytest
from engine_rig import BLOCK, CARD, greedy, reference
from store_side_rig import HASHER, KNOWN, LENGTH, OUTPUT, PROMPT, WAIT, Gated, finish, gated, prompt_of, run, until
from test_engine_late_hits import blocks, watched
from test_worker_kv_events import Cluster, over_sockets

from bascule.engine.protocol import Sampled, Slice
from bascule.kv.store.forms import Forms
from bascule.kv.store.tiers import Tiers
from bascule.types import CostModel, LinkCost, Request, RequestId, SamplingParams, Tier
from bascule.worker import store_side
from bascule.worker.store_side import StoreSide


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def store() -> Gated:
    return Gated()


@pytest.mark.parametrize("own_memory", [False, True])
def test_what_is_loaded_from_the_back_meanwhile_is_not_computed(
    store: Gated, stack: ExitStack, own_memory: bool
) -> None:
    async def scenario() -> None:
        node = await gated(store, stack, chunk=2 * BLOCK, own_memory=own_memory)
        computed = watched(node.rig)
        hashes = HASHER.chain(PROMPT)
        key, ready = node.submit(PROMPT)
        await ready
        assert store.asked == [hashes[:16]], "it began at the front, and nothing has come of it"
        node.step()
        assert computed == blocks(0, 1)
        store.gate.release()
        await until(lambda: bool(node.rig.books.peek(hashes[15:16])))
        await until(lambda: len(store.asked) == 2)
        store.gate.release()
        await until(lambda: len(store.asked) == 3)
        assert store.asked[1:] == [hashes[24:40], hashes[16:24]], "then it went on from the back"
        while node.rig.engine.has_work():
            node.step()
        assert computed[: 10 * BLOCK + 2] == [*blocks(0, 1, *range(16, 24)), LENGTH * BLOCK, LENGTH * BLOCK + 1]
        brought = node.check(key, PROMPT)
        assert brought is not None and brought.tokens == {Tier.HOST: 30 * BLOCK}
        assert node.rig.outputs[key][0].cached_tokens == node.rig.hit_tokens == 30 * BLOCK
        loads = node.side.loads()[Tier.HOST]
        assert loads.hit_tokens == 30 * BLOCK
        assert loads.spared_s == pytest.approx(30 * BLOCK * KNOWN.token_s)
        assert brought.spared_s == pytest.approx(loads.spared_s), "what comes late adds to it, as to tokens and bytes"
        assert brought.bytes == {Tier.HOST: loads.loaded_bytes}
        await finish(node, store)
        assert len(store.asked) == 3, "nobody needs more of it"

    run(scenario)


def test_a_store_that_gives_nothing_is_waited_for_no_longer_than_the_patience(store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        node = await gated(store, stack)
        key, ready = node.submit(PROMPT)
        await ready
        while node.rig.engine.has_work():
            node.step()
        assert node.check(key, PROMPT) is None
        assert len(store.asked) == 1, "it still hangs in its first call"
        assert node.rig.books.counts.held == 16, "which has only the blocks of that call"
        await finish(node, store)

    run(scenario)


@pytest.mark.parametrize(("times", "loaded"), [(1.5, 16), (3.0, 0)])
def test_what_loads_slower_than_it_is_computed_is_loaded_from_the_back_if_not_much_slower(
    store: Gated, stack: ExitStack, times: float, loaded: int
) -> None:
    async def scenario() -> None:
        node = await gated(store, stack, blocks=128)
        hashes = HASHER.chain(PROMPT)
        measured = {Tier.HOST: LinkCost(0.0, LENGTH * CARD.layout.block_bytes / 2.0)}
        node.tiers.costs = lambda: measured  # type: ignore[method-assign]
        node.rig.engine.cost = CostModel(token_s=2.0 / (LENGTH * BLOCK) / times)
        key, ready = node.submit(PROMPT)
        await ready
        if loaded:
            await until(lambda: store.asked == [hashes[-loaded:]])
            store.gate.release()
            await until(lambda: len(store.asked) == 2)
        while node.rig.engine.has_work():
            node.step()
        brought = node.check(key, PROMPT)
        assert (brought.tokens if brought is not None else {}) == ({Tier.HOST: loaded * BLOCK} if loaded else {})
        await finish(node, store)
        assert bool(store.asked) == bool(loaded)

    run(scenario)


def test_what_comes_before_the_engine_begins_counts_as_loaded(store: Gated, stack: ExitStack) -> None:
    """A request may wait in the engine's line while its load goes on."""

    async def scenario() -> None:
        node = await gated(store, stack)
        key, ready = node.submit(PROMPT)
        await ready
        store.let_all()
        await until(lambda: not node.side.loading)
        while node.rig.engine.has_work():
            node.step()
        brought = node.check(key, PROMPT)
        assert brought is not None and brought.tokens == {Tier.HOST: LENGTH * BLOCK}
        assert node.rig.hit_tokens == LENGTH * BLOCK
        await finish(node, store)

    run(scenario)


@pytest.mark.parametrize("question", [0, 3])
def test_where_memory_holds_one_prompt_its_end_takes_the_place_of_what_was_to_be_computed(
    question: int, store: Gated, stack: ExitStack
) -> None:
    """Blocks that no tier has may come behind that end."""
    prompt = [*PROMPT, *range(7000, 7000 + question * BLOCK)]

    async def scenario() -> None:
        node = await gated(store, stack, chunk=2 * BLOCK, blocks=LENGTH + 8 + question)
        computed = watched(node.rig)
        key, ready = node.submit(prompt)
        await ready
        node.step()
        store.let_all()
        await until(lambda: not node.side.loading)
        while node.rig.engine.has_work():
            node.step()
        brought = node.check(key, prompt)
        assert brought is not None and brought.tokens[Tier.HOST] >= 20 * BLOCK
        assert len(computed) < (LENGTH - 20 + question) * BLOCK + 2 + OUTPUT
        await finish(node, store)

    run(scenario)


def test_what_the_last_step_computes_is_not_loaded_any_more(store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        node = await gated(store, stack, chunk=256, step=256)
        execute, asked = node.rig.runner.execute, []

        def loading(batch: Sequence[Slice]) -> list[Sampled | None]:
            if not asked:
                store.let_all()
                while not all(load.ended.is_set() for load in node.side._loads.values()):
                    sleep(0.001)
                asked.extend(store.asked)
            return execute(batch)

        node.rig.runner.execute = loading  # type: ignore[method-assign]
        key, ready = node.submit(PROMPT)
        await ready
        await asyncio.to_thread(node.rig.run)
        assert node.check(key, PROMPT) is None
        assert asked == [HASHER.chain(PROMPT)[:16]], "the call that was under way was the last"
        node.side.cancel(key)
        await finish(node, store)

    run(scenario)


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_is_cancelled_stops_its_load(store: Gated, stack: ExitStack, begun: bool) -> None:
    async def scenario() -> None:
        node = await gated(store, stack)
        key, ready = node.submit(PROMPT)
        await until(lambda: bool(store.asked))
        if begun:
            await ready
        node.side.cancel(key)
        node.rig.engine.cancel(*key)
        await finish(node, store)
        assert len(store.asked) == 1

    run(scenario)


def test_a_prompt_goes_on_with_what_is_loaded_for_another(store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        node = await gated(store, stack, sequences=1, blocks=128)
        first, ready = node.submit(PROMPT)
        await ready
        second, ready = node.submit([*PROMPT[:-2], 7, 8, 9])
        await ready
        assert len(store.asked) == 1, "the second does not load what the first does"
        node.side.cancel(first)
        node.rig.engine.cancel(*first)
        store.let_all()
        await until(lambda: not node.side.loading)
        while node.rig.engine.has_work():
            node.step()
        node.check(second, [*PROMPT[:-2], 7, 8, 9])
        assert node.rig.hit_tokens == LENGTH * BLOCK
        await finish(node, store)

    run(scenario)


def test_a_hole_in_what_is_loaded_is_computed(store: Gated, stack: ExitStack) -> None:
    async def scenario() -> None:
        node = await gated(store, stack, chunk=2 * BLOCK)
        computed = watched(node.rig)
        hashes = HASHER.chain(PROMPT)
        key, ready = node.submit(PROMPT)
        await ready
        store._blocks[hashes[28]] = store._blocks[hashes[27]]
        store.let_all()
        await until(lambda: not node.side.loading)
        while node.rig.engine.has_work():
            node.step()
        brought = node.check(key, PROMPT)
        # Of the call that the block was in, what comes behind it is not looked at.
        missing = range(28, LENGTH)
        assert computed[: -OUTPUT + 1] == [*blocks(*missing), LENGTH * BLOCK, LENGTH * BLOCK + 1]
        assert brought is not None and brought.tokens == {Tier.HOST: 28 * BLOCK}
        await finish(node, store)

    run(scenario)


def test_a_worker_that_ends_while_it_loads_logs_no_error(
    store: Gated, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_side, "FLUSH_S", 0.05)

    async def scenario() -> None:
        node = await gated(store, stack)
        _, ready = node.submit(PROMPT)
        await ready
        await node.side.close()
        node.rig.arena.close()
        store.let_all()
        await node.rest()

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert caplog.records == []


def test_what_is_loaded_late_is_told_before_the_tokens(store: Gated) -> None:
    """A request comes while the step of another is computed, and is loaded before that ends."""
    prompt = prompt_of(2, 8 * BLOCK + 2)

    async def scenario(cluster: Cluster) -> None:
        parts, worker = cluster.worker._parts, cluster.worker
        tiers = Tiers([store], parts.arena, parts.books, CARD.fingerprint, Forms("none", CARD.layout))
        reporter, parts.engine.publishes = worker._reporter, True
        side = worker._store = worker._arrivals._store = StoreSide(
            tiers,
            parts.engine,
            parts.books,
            parts.hasher,
            CARD.layout,
            reporter.tell,
            worker._saved,
            worker._arrivals.loaded,
        )
        await cluster.complete(prompt)
        await cluster.wait(lambda: store.stats().blocks >= 8 and not side.saving)
        parts.books.acquire([], [], 24).release()  # type: ignore[union-attr]
        parts.engine.cost = KNOWN
        store.open = False
        begun, go, execute = Event(), Event(), parts.runner.execute

        def slow(batch: Sequence[Slice]) -> list[Sampled | None]:
            begun.set()
            assert go.wait(WAIT)
            return execute(batch)

        parts.runner.execute = slow  # type: ignore[method-assign]
        other = asyncio.create_task(cluster.complete([5, 6, 7]))
        await cluster.wait(begun.is_set)
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        asked = Request(id=RequestId("late"), prompt=tuple(prompt), sampling=sampling, timeout=WAIT)
        starting = asyncio.create_task(cluster.service.start(asked))
        await cluster.wait(lambda: parts.engine.load().waiting == 1)
        assert side.waiting == 0 and side.loading
        store.let_all()
        await cluster.wait(lambda: not side.loading)
        go.set()
        deltas = [delta async for delta in await starting]
        await other
        assert [each.brought.tokens for each in deltas] == [{Tier.HOST: 8 * BLOCK}] * len(deltas)
        assert deltas[0].cached_tokens == 8 * BLOCK
        assert [token for each in deltas for token in each.tokens] == reference(prompt, greedy(2))
        parts.runner.execute = execute  # type: ignore[method-assign]

    over_sockets(scenario)
