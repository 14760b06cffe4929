"""What one worker has computed another one fetches: the tokens are the right ones, whatever becomes of the transfer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from random import Random
from typing import Any

import numpy as np
import pytest
from engine_rig import BLOCK, CARD, Rig, greedy, reference, work
from msgspec import structs

from bascule.engine.sequence import Key
from bascule.kv.codecs import codec_named
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import Receiver, Sender
from bascule.kv.transfer.coding import Coding
from bascule.kv.transfer.loopback import LoopbackNetwork, LoopbackReceiver, LoopbackSender
from bascule.kv.transfer.select import open_receivers, open_senders
from bascule.peer_wire import Fetch, Fetched, PeerMessage, Revoked
from bascule.types import PEER, CostModel, Epoch, KVLayout, ModelCard, RequestId, TicketId, WorkerId
from bascule.wire import FetchFrom, PeerAddress
from bascule.worker.fetch import Fetches
from bascule.worker.grants import Grants
from bascule.worker.learning import Links
from bascule.worker.lend import Lender
from bascule.worker.parts import Brought

ASKER = PeerAddress(WorkerId("a"), Epoch("a-1"), "tcp://127.0.0.1:1")
PEER_ADDRESS = PeerAddress(WorkerId("b"), Epoch("b-1"), "tcp://127.0.0.1:2")
HASHER = BlockHasher("mock", BLOCK)
OUTPUT = 5
IMPATIENT = CostModel(token_s=0.0002)
"""A prompt of forty tokens is computed in 8 ms, and a fetch is not waited for any longer."""

Tamper = Callable[["Two", PeerMessage], PeerMessage | None]
"""Sees each message before it is delivered, and may change or lose it."""


class Two:
    """Two workers' engines, of which the first fetches what the second has. Messages go directly."""

    address = ASKER

    def __init__(
        self, stack: ExitStack, transport: str, tamper: Tamper, coding: Coding = Coding(), card: ModelCard = CARD
    ) -> None:
        self.rigs = [Rig(own_memory=True, card=card) for _ in range(2)]
        for rig in self.rigs:
            stack.callback(rig.arena.close)
            rig.engine.publishes = True
        self.tamper = tamper
        self.said: list[PeerMessage] = []
        self.loop = asyncio.get_running_loop()
        self.grants = Grants()
        arenas = [rig.arena for rig in self.rigs]

        def safe(ticket: TicketId) -> None:
            self.loop.call_soon_threadsafe(self.grants.safe, ticket)

        receivers: dict[str, Receiver]
        senders: dict[str, Sender]
        if transport == "loopback":
            network = LoopbackNetwork()
            receivers = {transport: LoopbackReceiver(arenas[0], safe, network, coding.codecs)}
            senders = {transport: LoopbackSender(arenas[1], network)}
        else:
            receivers = open_receivers(arenas[0], transport, "127.0.0.1", safe, coding.codecs)
            senders = open_senders(arenas[1], transport)
        self.grants.receivers = receivers
        for sender in senders.values():
            stack.callback(sender.close)
        stack.callback(self.grants.close)
        self.links = Links()
        rig = self.rigs[0]
        self.fetches = Fetches(rig.engine, rig.arena, rig.books, HASHER, card, self, self.grants)  # type: ignore[arg-type]
        self.lender = Lender(
            self.rigs[1].engine,
            arenas[1],
            self.rigs[1].books,
            HASHER,
            card,
            senders,
            self.links,
            answer=self.answer,
            coding=coding,
            bring=None,
        )
        self.number = 0

    def send(self, peer: PeerAddress, message: PeerMessage) -> None:
        self.said.append(message)
        changed = self.tamper(self, message)
        if isinstance(changed, Fetch):
            self.loop.call_soon(self.lender.lend, ASKER.epoch, changed)
        elif isinstance(changed, Revoked) and not self.lender.revoke(ASKER.epoch, changed.ticket):
            self.grants.closed(changed.ticket)

    def answer(self, epoch: Epoch, message: PeerMessage) -> None:
        assert epoch == ASKER.epoch
        self.said.append(message)
        changed = self.tamper(self, message)
        if isinstance(changed, Fetched) and not self.fetches.apply(changed):
            self.grants.closed(changed.ticket)

    def compute(self, at: int, prompt: Sequence[int]) -> int:
        """Serve a request on one of the two and check its tokens; returns the prompt tokens that were cached."""
        self.number += 1
        rig, name = self.rigs[at], str(self.number)
        rig.engine.submit(work(name, prompt, greedy(OUTPUT)))
        rig.run()
        outputs = next(o for key, o in rig.outputs.items() if key.request == name)
        assert [each.token for each in outputs] == reference(prompt, greedy(OUTPUT))
        return outputs[0].cached_tokens

    async def fetch(self, prompt: Sequence[int], tokens: int, *, wait: bool = True) -> Brought | None:
        """What came of it, for a request of its own; with `wait` after the end of a fetch that nobody waits for."""
        self.number += 1
        key, came = Key(RequestId(f"fetch {self.number}"), 1), list[Brought]()
        async with asyncio.timeout(20):
            await self.fetches.bring(key, prompt, FetchFrom(PEER_ADDRESS, tokens), came.append)
            while wait and key in self.fetches._tasks:
                await asyncio.sleep(0.001)
        return came[0] if came else None

    async def check(self) -> None:
        """Nothing is held, nor in quarantine for longer than the other side takes to say that it is done."""
        for _ in range(200):
            if all((rig.books.counts.held, rig.books.counts.quarantined) == (0, 0) for rig in self.rigs):
                break
            await asyncio.sleep(0.01)
        for rig in self.rigs:
            assert rig.engine.check_integrity() == []
            assert (rig.books.counts.held, rig.books.counts.quarantined) == (0, 0)
        assert (self.fetches.waiting, self.fetches.waiting_tokens) == (0, 0)
        await self.lender.close()

    def asked(self) -> list[Fetch]:
        return [message for message in self.said if isinstance(message, Fetch)]


def prompt_of(family: int, blocks: int = 10) -> list[int]:
    return [1000 * family + position for position in range(1, blocks * BLOCK + 1)]


def play(
    scenario: Callable[[Two], Coroutine[Any, Any, None]],
    transport: str = "loopback",
    tamper: Tamper | None = None,
    **kind: Any,
) -> None:
    async def run() -> None:
        with ExitStack() as stack:
            two = Two(stack, transport, tamper or (lambda _, message: message), **kind)
            await scenario(two)
            await two.check()

    asyncio.run(run())


EVERY = pytest.mark.parametrize("transport", ["loopback", "shm", "tcp"])


@EVERY
def test_what_a_peer_computed_is_fetched_and_not_computed_again(transport: str) -> None:
    async def scenario(two: Two) -> None:
        prompt = prompt_of(1)
        two.compute(1, prompt)
        brought = await two.fetch([*prompt, 7, 8], 10 * BLOCK)
        assert brought is not None and brought.tokens == {PEER: 10 * BLOCK}
        assert two.compute(0, [*prompt, 7, 8]) == 10 * BLOCK
        figures = two.fetches.figures()
        assert (figures.hit_tokens, figures.bytes) == (10 * BLOCK, 10 * CARD.layout.block_bytes)
        assert two.lender.bytes_sent == {transport: 10 * CARD.layout.block_bytes}
        assert await two.fetch(prompt, 10 * BLOCK) is None, "it is here already"
        assert len(two.asked()) == 1
        assert two.links.costs()[ASKER.worker].latency_s > 0

    play(scenario, transport)


@EVERY
def test_only_what_is_missing_is_fetched_and_what_the_peer_lacks_is_computed(transport: str) -> None:
    async def scenario(two: Two) -> None:
        prompt = prompt_of(1, 12)
        two.compute(0, prompt[: 4 * BLOCK])
        two.compute(1, prompt[: 9 * BLOCK])
        brought = await two.fetch([*prompt, 7], 12 * BLOCK)
        here = two.rigs[0].books.count_cached(HASHER.chain(prompt))
        assert brought is not None and brought.tokens == {PEER: 5 * BLOCK}
        assert here == 9
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
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) is None
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
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) is None
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
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) is None
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
        brought = await two.fetch([*prompt, 7], len(prompt))
        assert (brought is None) == spoilt
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


def test_siblings_that_want_the_same_prefix_ask_once() -> None:
    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        brought = await asyncio.gather(*(two.fetch([*prompt_of(1), 7 + each], 10 * BLOCK) for each in range(4)))
        assert [each.tokens for each in brought if each is not None] == [{PEER: 10 * BLOCK}]
        assert len(two.asked()) == 1

    play(scenario)


def test_a_fetch_takes_no_memory_that_running_sequences_need() -> None:
    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        lease = two.rigs[0].books.acquire([], [], 60)
        assert lease is not None
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) is None
        assert two.fetches.figures().failed == {"memory": 1}
        lease.release()

    play(scenario)


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
