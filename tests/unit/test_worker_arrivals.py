"""How requests come to a worker's engine: with what a peer and a store gave, and not while the worker leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from engine_rig import BLOCK, Rig, greedy, reference
from fetch_rig import HASHER, IMPATIENT, PEER_ADDRESS, Two, play, prompt_of
from msgspec import structs
from store_side_rig import Gated, Node

from bascule.engine.sequence import Key
from bascule.kv.store.forms import Forms
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.tiers import Tiers
from bascule.peer_wire import Fetch, Fetched, PeerMessage
from bascule.types import PEER, Brought, CostModel, RequestId, Tier
from bascule.wire import FetchFrom, Submit
from bascule.worker.arrivals import Arrivals
from bascule.worker.store_side import StoreSide

PROMPT = prompt_of(1)
PLAIN = Submit(
    request=RequestId("r"), attempt=0, prompt=tuple(PROMPT), generated=(), sampling=greedy(4), decode=PEER_ADDRESS
)
FETCHING = structs.replace(PLAIN, request=RequestId("f"), fetch=FetchFrom(PEER_ADDRESS, len(PROMPT)))


class Handoffs:
    """Stands for the prefill side: counts what it would begin."""

    def __init__(self) -> None:
        self.begun: list[RequestId] = []

    def begin(self, submission: Submit, decode: Any) -> None:
        self.begun.append(submission.request)

    def cancel(self, key: Any) -> None:
        raise AssertionError("nothing was refused")


def arrivals(two: Two, handoffs: Handoffs) -> Arrivals:
    return Arrivals(
        two.rigs[0].engine,
        handoffs,  # type: ignore[arg-type]
        two.fetches,
        None,
        brought=lambda key, brought: None,
        failed=lambda key, why, again: pytest.fail(why),
        task_ended=lambda task: None,
        wake=lambda: None,
    )


def waiting(rig: Rig) -> int:
    return rig.engine.load().waiting


def test_requests_go_to_the_engine_and_to_handoffs_until_the_worker_leaves() -> None:
    async def scenario(two: Two) -> None:
        handoffs = Handoffs()
        ours = arrivals(two, handoffs)
        ours.submit(structs.replace(PLAIN, priority=-3))
        assert (handoffs.begun, waiting(two.rigs[0])) == (["r"], 1)
        assert [one.work.priority for one in two.rigs[0].engine._scheduler.waiting] == [-3]
        ours.close()
        ours.submit(structs.replace(PLAIN, request=RequestId("late")))
        assert (handoffs.begun, waiting(two.rigs[0]), ours.received) == (["r"], 1, 1)
        two.rigs[0].engine.cancel(RequestId("r"), 0)
        two.rigs[0].run()

    play(scenario)


def test_a_request_that_waits_for_a_peer_is_forgotten_when_the_worker_leaves() -> None:
    def silent(two: Two, message: PeerMessage) -> PeerMessage | None:
        return None if isinstance(message, Fetch | Fetched) else message

    async def scenario(two: Two) -> None:
        two.rigs[0].engine.cost = IMPATIENT
        handoffs = Handoffs()
        ours = arrivals(two, handoffs)
        ours.submit(FETCHING)
        await asyncio.sleep(0)
        assert ours.waiting == 1
        ours.close()
        await asyncio.sleep(0.5)
        assert (handoffs.begun, waiting(two.rigs[0]), ours.waiting) == ([], 0, 0)

    play(scenario, tamper=silent)


class Fed:
    """A worker's way to its engine: requests get what a peer and a store have, and the router is told."""

    def __init__(self, two: Two, store: MemoryStore) -> None:
        rig, card = two.rigs[0], two.rigs[0].runner.card
        self.rig = rig
        self.told: dict[Key, Brought] = {}
        tiers = Tiers([store], rig.arena, rig.books, card.fingerprint, Forms("none", card.layout))
        self.side = StoreSide(
            tiers,
            rig.engine,
            rig.books,
            HASHER,
            card.layout,
            lambda *_: None,
            on_loaded=lambda key, brought: self.arrivals.loaded(key, brought),
        )
        self.arrivals = Arrivals(
            rig.engine,
            Handoffs(),  # type: ignore[arg-type]
            two.fetches,
            self.side,
            brought=self.told.__setitem__,
            failed=lambda key, why, again: pytest.fail(why),
            task_ended=lambda task: None,
            wake=lambda: None,
        )

    async def serve(self, prompt: list[int], asked: Submit, until: Callable[[], bool]) -> Brought:
        """Serve a prompt, which the engine is to get when `until` is true; returns what the router is told of it."""
        key = Key(asked.request, asked.attempt)
        await wait_for(lambda: self.rig.engine.has(*key) and until())
        while self.rig.engine.has_work():
            self.arrivals.stepped(self.rig.step())
        outputs = self.rig.outputs[key]
        assert [each.token for each in outputs] == reference(prompt, greedy(4))
        assert sum(self.told[key].tokens.values()) <= outputs[0].cached_tokens, "each token counts once"
        assert self.arrivals.hit_tokens + self.arrivals.computed_tokens == len(prompt)
        assert self.arrivals.hit_tokens == outputs[0].cached_tokens
        await self.side.close()
        return self.told[key]


async def wait_for(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


async def stored(prompt: list[int], store: MemoryStore) -> None:
    """Have a prompt's KV in a store."""
    with ExitStack() as stack:
        await Node([store], stack).complete(prompt)


def test_what_a_peer_and_what_a_store_gave_of_one_prompt_are_both_told() -> None:
    store, prompt = MemoryStore(1 << 20), prompt_of(3)

    async def scenario(two: Two) -> None:
        await stored(prompt, store)
        two.compute(1, prompt[: 6 * BLOCK])
        fed = Fed(two, store)
        asked = structs.replace(
            PLAIN, prompt=tuple(prompt), decode=None, fetch=FetchFrom(PEER_ADDRESS, 6 * BLOCK), request=RequestId("x")
        )
        fed.arrivals.submit(asked)
        brought = await fed.serve(prompt, asked, lambda: not fed.side.loading)
        assert brought.tokens == {PEER: 6 * BLOCK, Tier.HOST: 3 * BLOCK}
        assert two.fetches.figures().hit_tokens == 6 * BLOCK
        assert fed.side.loads()[Tier.HOST].hit_tokens == 3 * BLOCK

    play(scenario)


def test_a_block_that_both_a_peer_and_a_store_brought_is_found_once() -> None:
    """The fetch goes on while the request waits for its load, and both come before the engine looks."""
    store, prompt, late = Gated(), prompt_of(3), list[Fetched]()

    def hold(two: Two, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Fetched) and not late:
            late.append(message)
            return None
        return message

    async def scenario(two: Two) -> None:
        await stored(prompt, store)
        store.asked.clear()
        store.open = False
        two.compute(1, prompt)
        two.rigs[0].engine.cost = CostModel(token_s=0.5)
        fed = Fed(two, store)
        asked = structs.replace(
            PLAIN, prompt=tuple(prompt), decode=None, fetch=FetchFrom(PEER_ADDRESS, 8 * BLOCK), request=RequestId("x")
        )
        fed.arrivals.submit(asked)
        await wait_for(lambda: bool(store.asked and late))
        two.fetches.apply(late[0])
        await wait_for(lambda: two.rigs[0].books.count_cached(HASHER.chain(prompt)) == 8)
        store.let_all()
        brought = await fed.serve(prompt, asked, lambda: not fed.side.loading)
        assert brought.tokens == {PEER: 8 * BLOCK, Tier.HOST: BLOCK}
        assert two.fetches.figures().hit_tokens == 8 * BLOCK
        assert fed.side.loads()[Tier.HOST].hit_tokens == BLOCK

    play(scenario, tamper=hold)
