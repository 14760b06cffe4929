"""What one worker has computed another one fetches: the tokens are the right ones, whatever becomes of the transfer."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from random import Random
from typing import Any

import numpy as np
import pytest
from engine_rig import BLOCK, CARD, greedy, reference, work
from fetch_rig import ASKER, HASHER, IMPATIENT, OUTPUT, PEER_ADDRESS, Two, play, prompt_of, submission
from msgspec import structs
from store_side_rig import Node
from test_engine_late_hits import watched

from bascule.engine.sequence import Key
from bascule.kv.codecs import codec_named
from bascule.kv.store.forms import Forms
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.tiers import Tiers
from bascule.kv.transfer.coding import Coding
from bascule.peer_wire import Fetch, Fetched, PeerMessage
from bascule.policies.load import LEAST_SHARE
from bascule.types import PEER, Brought, CostModel, KVLayout, RequestId, Tier
from bascule.wire import FetchFrom
from bascule.worker.store_side import StoreSide

EVERY = pytest.mark.parametrize("transport", ["loopback", "shm", "tcp"])


@EVERY
def test_what_a_peer_computed_is_fetched_and_not_computed_again(transport: str) -> None:
    async def scenario(two: Two) -> None:
        prompt = prompt_of(1)
        two.compute(1, prompt)
        assert await two.fetch([*prompt, 7, 8], 10 * BLOCK) == 10
        assert two.compute(0, [*prompt, 7, 8]) == 10 * BLOCK
        figures = two.fetches.figures()
        assert (figures.bytes, figures.failed) == (10 * CARD.layout.block_bytes, {})
        assert two.lender.bytes_sent == {transport: 10 * CARD.layout.block_bytes}
        assert await two.fetch(prompt, 10 * BLOCK) == 0, "it is here already"
        assert len(two.asked()) == 1
        assert two.links.costs()[ASKER.worker].latency_s > 0

    play(scenario, transport)


@EVERY
def test_only_what_is_missing_is_fetched_and_what_the_peer_lacks_is_computed(transport: str) -> None:
    async def scenario(two: Two) -> None:
        prompt = prompt_of(1, 12)
        two.compute(0, prompt[: 4 * BLOCK])
        two.compute(1, prompt[: 9 * BLOCK])
        assert await two.fetch([*prompt, 7], 12 * BLOCK) == 5
        assert two.compute(0, [*prompt, 7]) == 9 * BLOCK

    play(scenario, transport)


@EVERY
def test_altered_blocks_are_noticed_and_computed(transport: str) -> None:
    def alter(two: Two, message: PeerMessage) -> PeerMessage:
        if isinstance(message, Fetched):
            block = two.asked()[-1].blocks[3]
            two.rigs[0].arena.bytes[0, block, 5] ^= 1
        return message

    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 0
        assert two.fetches.figures().failed == {"checksum": 1}
        assert two.compute(0, [*prompt_of(1), 7]) == 0

    play(scenario, transport, alter)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"fingerprint": "other"}, "model"),
        ({"layout": structs.replace(CARD.layout, block_size=8)}, "layout"),
        ({"secret": b"short"}, "secret"),
        ({"tokens": (1, 2, 3)}, "go together"),
        ({"have_blocks": -1}, "go together"),
        ({"blocks": (0,)}, "go together"),
        ({"endpoints": ()}, "transport"),
    ],
)
def test_a_fetch_that_cannot_be_served_is_refused_with_its_reason(changes: dict[str, Any], word: str) -> None:
    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 0
        answers = [message for message in two.said if isinstance(message, Fetched)]
        assert len(answers) == 1 and word in answers[0].reason and answers[0].checksums == ()
        assert two.fetches.figures().failed == {"refused": 1}

    def change(_: Two, message: PeerMessage) -> PeerMessage:
        return structs.replace(message, **changes) if isinstance(message, Fetch) else message

    play(scenario, tamper=change)


@EVERY
@pytest.mark.parametrize("lost", [Fetch, Fetched])
def test_a_peer_that_never_answers_costs_no_more_than_computing(transport: str, lost: type) -> None:
    def lose(_: Two, message: PeerMessage) -> PeerMessage | None:
        return None if isinstance(message, lost) else message

    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        two.rigs[0].engine.cost = IMPATIENT
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 0
        assert two.fetches.figures().failed == {"timeout": 1}
        assert two.compute(0, [*prompt_of(1), 7]) == 0

    play(scenario, transport, lose)


@EVERY
def test_a_fetch_that_nobody_wants_any_more_sets_its_blocks_free(transport: str) -> None:
    held: list[PeerMessage] = []

    def hold(_: Two, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Fetch):
            held.append(message)
            return None
        return message

    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        task = asyncio.create_task(two.fetch([*prompt_of(1), 7], 10 * BLOCK))
        while not held:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        late = held[0]
        assert isinstance(late, Fetch)
        before = two.rigs[0].arena.bytes.copy()
        two.lender.lend(ASKER.epoch, late)
        while two.lender._loans:
            await asyncio.sleep(0.001)
        assert (two.rigs[0].arena.bytes == before).all(), "a late write"

    play(scenario, transport, hold)


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize(("transport", "coded"), [("loopback", True), ("tcp", True), ("shm", False)])
def test_over_a_link_blocks_may_be_coded_and_are_checked_as_they_arrive(
    transport: str, coded: bool, spoilt: bool
) -> None:
    layout = KVLayout("float32", layers=2, kv_heads=1, head_dim=8, block_size=BLOCK, planes=4, token_bytes=32)
    codec = codec_named("int8", layout)
    prompt, hashes = prompt_of(1), HASHER.chain(prompt_of(1))

    def spoil(two: Two, message: PeerMessage) -> PeerMessage:
        if spoilt and isinstance(message, Fetched):
            two.rigs[0].arena.bytes[0, two.asked()[-1].blocks[2], 3] ^= 1
        return message

    async def scenario(two: Two) -> None:
        asker, lender = two.rigs
        lease = lender.engine.borrow(hashes, prompt, len(hashes))
        assert lease is not None
        numbers = np.random.default_rng(1).standard_normal((4, len(hashes), layout.plane_block_bytes // 4), np.float32)
        lender.arena.bytes[:, lease.blocks] = numbers.view(np.uint8)
        lease.seal(0, hashes, prompt)
        lease.release()
        assert await two.fetch([*prompt, 7], len(prompt)) == (0 if spoilt else len(hashes))
        assert two.fetches.figures().failed == ({"checksum": 1} if spoilt else {})
        expected = numbers.view(np.uint8).copy()
        if coded:
            codec.decode(codec.encode(expected), expected)
        here = asker.books.peek(hashes)
        if not spoilt:
            assert (asker.arena.bytes[:, [each.block for each in here]] == expected).all()
        size = codec.record_bytes if coded else layout.block_bytes
        assert two.lender.bytes_sent == {transport: len(hashes) * size}

    play(scenario, transport, spoil, coding=Coding.of("int8", layout), card=structs.replace(CARD, layout=layout))


@EVERY
def test_a_slow_peer_is_not_waited_for_and_what_it_gives_late_is_used_all_the_same(transport: str) -> None:
    held: list[Fetch] = []

    def hold(two: Two, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Fetch):
            held.append(message)
            return None
        return message

    async def scenario(two: Two) -> None:
        prompt = [*prompt_of(1), 7, 8]
        two.compute(1, prompt)
        rig, name = two.rigs[0], "late"
        rig.engine.cost = CostModel(token_s=0.2)  # what comes within 8 s is used
        computed, came = watched(rig), list[Brought]()
        key = Key(RequestId(name), 1)
        await two.fetches.bring(submission(key, prompt), FetchFrom(PEER_ADDRESS, 10 * BLOCK), came.append)
        assert not came and (two.fetches.waiting, two.fetches.waiting_tokens) == (0, 0)
        rig.engine.submit(work(name, prompt, greedy(OUTPUT)))
        rig.step()
        two.lender.lend(ASKER.epoch, held[0])
        while key in two.fetches._tasks:
            await asyncio.sleep(0.001)
        while rig.engine.has_work():
            for found in rig.step().found:
                two.fetches.found(found)
        assert [each.token for each in rig.outputs[key]] == reference(prompt, greedy(OUTPUT))
        figures = two.fetches.figures()
        patience_s = LEAST_SHARE * 0.2 * len(prompt)
        assert came[-1] == Brought({PEER: 8 * BLOCK}, came[-1].seconds, {PEER: figures.bytes}, figures.spared_s)
        assert 0 < came[-1].seconds <= patience_s, "what comes beside computing was not waited for"
        assert figures.bytes > 0 and figures.spared_s == pytest.approx(8 * BLOCK * 0.2)
        assert two.fetches.figures().hit_tokens == 8 * BLOCK
        two.fetches.give_up(key)
        assert computed[: 2 * BLOCK + 1] == [*range(2 * BLOCK), 10 * BLOCK]

    play(scenario, transport, hold, chunk=2 * BLOCK)


def test_a_fetch_ends_when_its_prompt_is_computed() -> None:
    def lose(_: Two, message: PeerMessage) -> PeerMessage | None:
        return None if isinstance(message, Fetch) else message

    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        two.rigs[0].engine.cost = CostModel(token_s=10.0)
        key = Key(RequestId("r"), 1)
        task = asyncio.create_task(
            two.fetches.bring(submission(key, [*prompt_of(1), 7]), FetchFrom(PEER_ADDRESS, 10 * BLOCK), lambda _: None)
        )
        while not two.asked():
            await asyncio.sleep(0)
        two.fetches.give_up(key, late=True)
        await task
        assert not two.fetches._tasks
        assert two.fetches.figures().failed == {"late": 1}

    play(scenario, tamper=lose)


def test_siblings_that_want_the_same_prefix_ask_once() -> None:
    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        came = await asyncio.gather(*(two.fetch([*prompt_of(1), 7 + each], 10 * BLOCK) for each in range(4)))
        assert came == [10] * 4
        assert len(two.asked()) == 1

    play(scenario)


def test_a_fetch_takes_no_memory_that_running_sequences_need() -> None:
    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        lease = two.rigs[0].books.acquire([], [], 60)
        assert lease is not None
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 0
        assert two.fetches.figures().failed == {"memory": 1}
        lease.release()

    play(scenario)


def test_a_request_that_waits_for_the_memory_of_a_fetch_is_woken_when_it_is_given_back() -> None:
    def lose(_: Two, message: PeerMessage) -> PeerMessage | None:
        return None if isinstance(message, Fetch) else message

    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        rig, runnable = two.rigs[0], list[bool]()
        two.wake = lambda: runnable.append(rig.engine.has_work())
        fetching = asyncio.create_task(two.fetch([*prompt_of(1), 7], 10 * BLOCK))
        while not two.asked():
            await asyncio.sleep(0)
        rig.engine.submit(work("long", prompt_of(2, 60), greedy(OUTPUT)))
        assert rig.step().is_empty and not rig.engine.has_work()
        fetching.cancel()
        for key in list(two.fetches._tasks):
            two.fetches.give_up(key)
        while not runnable:
            await asyncio.sleep(0)
        assert runnable == [True]
        rig.run()
        assert rig.tokens("long") == reference(prompt_of(2, 60), greedy(OUTPUT))

    play(scenario, tamper=lose)


@EVERY
def test_a_peer_lends_what_lies_in_its_hosts_memory(transport: str) -> None:
    """It was computed by a worker that is gone; the beginning is on the peer's device, too."""
    store, prompt = MemoryStore(1 << 20), prompt_of(1)

    async def scenario(two: Two) -> None:
        with ExitStack() as stack:
            await Node([store], stack).complete(prompt)
        two.compute(1, prompt[: 3 * BLOCK])
        side = lend_from(two, store)
        assert await two.fetch([*prompt, 7], 10 * BLOCK) == 10
        assert two.compute(0, [*prompt, 7]) == 10 * BLOCK
        assert two.fetches.figures().failed == {}
        assert two.lender.bytes_sent == {transport: 10 * CARD.layout.block_bytes}
        assert side._tiers.figures[Tier.HOST].loaded_blocks == 7
        await side.close()

    play(scenario, transport)


@EVERY
def test_a_damaged_block_in_a_peers_host_memory_ends_what_it_lends(transport: str) -> None:
    store, prompt = MemoryStore(1 << 20), prompt_of(1)

    async def scenario(two: Two) -> None:
        with ExitStack() as stack:
            await Node([store], stack).complete(prompt)
        damaged = HASHER.chain(prompt)[6]
        store._blocks[damaged] = store._blocks[damaged][:-1] + b"?"
        side = lend_from(two, store)
        assert await two.fetch([*prompt, 7], 10 * BLOCK) == 6
        assert two.compute(0, [*prompt, 7]) == 6 * BLOCK
        assert side._tiers.figures[Tier.HOST].invalid == {"checksum": 1}
        await side.close()

    play(scenario, transport)


def lend_from(two: Two, store: MemoryStore) -> StoreSide:
    """Give the peer a host tier."""
    rig = two.rigs[1]
    tiers = Tiers([store], rig.arena, rig.books, CARD.fingerprint, Forms("none", CARD.layout))
    side = StoreSide(tiers, rig.engine, rig.books, HASHER, CARD.layout, lambda *_: None)
    two.lender._bring = side.bring
    return side


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_on_the_way_the_tokens_are_the_right_ones(seed: int) -> None:
    """Losses, alterations, evictions and cancellations at random; `compute` checks the tokens of every request."""
    random = Random(seed)

    def meddle(two: Two, message: PeerMessage) -> PeerMessage | None:
        fate = random.randrange(8)
        if fate == 0:
            return None
        if isinstance(message, Fetched) and fate == 1 and message.checksums:
            block = random.choice(two.asked()[-1].blocks)
            two.rigs[0].arena.bytes[0, block, random.randrange(BLOCK)] ^= 1
        if isinstance(message, Fetched) and fate == 2:
            return structs.replace(message, checksums=message.checksums[: random.randrange(10)])
        return message

    async def scenario(two: Two) -> None:
        two.rigs[0].engine.cost = IMPATIENT
        fetched = 0
        for _ in range(60):
            prompt = [*prompt_of(random.randrange(9), random.randrange(3, 14)), random.randrange(1, 900)]
            if random.random() < 0.6:
                two.compute(1, prompt)
            tasks = [asyncio.create_task(two.fetch(prompt, len(prompt))) for _ in range(random.randrange(1, 3))]
            if random.random() < 0.2:
                await asyncio.sleep(0)
                tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            fetched += two.compute(0, prompt) > 0
        assert fetched
        assert two.rigs[0].books.evictions

    play(scenario, tamper=meddle)
