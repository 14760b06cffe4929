"""A whole handoff between both sides over every transport: checked chunk by chunk, and never believed unchecked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
from engine_rig import BLOCK, CARD, greedy, reference, work

from bascule.clock import VirtualClock
from bascule.config import HandoffConfig
from bascule.engine.core import Engine, EngineLimits, Work
from bascule.engine.mock import MockRunner
from bascule.engine.sequence import Key
from bascule.kv.arena import Arena
from bascule.kv.books import Books, Lease
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import Receiver, Sender
from bascule.kv.transfer.loopback import LoopbackNetwork, LoopbackReceiver, LoopbackSender
from bascule.kv.transfer.select import open_receivers, open_senders
from bascule.peer_wire import Accepted, Commit, HandoffRefused, PeerMessage, Reserved, Written
from bascule.types import CostModel, Epoch, RequestId, Slo, TicketId, WorkerId
from bascule.wire import PeerAddress, Submit
from bascule.worker.decode_side import DecodeSide
from bascule.worker.grants import Grants
from bascule.worker.prefill_side import PrefillSide

CHUNK = 16
PROMPT = tuple(range(1, 55))
SAMPLING = greedy(4)
OWN_SLO = Slo(1.0, 0.05, 0.15)
SOURCE = PeerAddress(WorkerId("p"), Epoch("p-1"), "tcp://127.0.0.1:1")
TARGET = PeerAddress(WorkerId("d"), Epoch("d-1"), "tcp://127.0.0.1:2")
KEY = Key(RequestId("r"), 1)

Tamper = Callable[["Pair", PeerMessage], PeerMessage | None]
"""Sees each message to the decode side before it is delivered, and may change or lose it."""


@dataclass
class Pair:
    """A prefill and a decode side that talk directly, each with an engine and an arena of its own."""

    source: Engine
    target: Engine
    target_arena: Arena
    prefill: PrefillSide
    decode: DecodeSide
    tamper: Tamper
    loop: asyncio.AbstractEventLoop
    to_decode: list[PeerMessage] = field(default_factory=list)
    to_prefill: list[PeerMessage] = field(default_factory=list)
    address: PeerAddress = SOURCE

    def send(self, peer: PeerAddress, message: PeerMessage) -> None:
        self.to_decode.append(message)
        if (changed := self.tamper(self, message)) is not None:
            asyncio.get_running_loop().call_soon(self.decode.apply, SOURCE.epoch, changed)

    def answer(self, epoch: Epoch, message: PeerMessage) -> None:
        self.to_prefill.append(message)
        asyncio.get_running_loop().call_soon(self.prefill.apply, message)

    def forget(self, peer: PeerAddress) -> None:
        raise AssertionError("nobody asked")

    def sent(self, kind: type) -> list[PeerMessage]:
        return [message for message in self.to_decode if isinstance(message, kind)]

    def first_block(self) -> int:
        """Of the latest reservation."""
        reserved = [message for message in self.to_prefill if isinstance(message, Reserved)]
        return reserved[-1].blocks[0]

    async def run(self) -> list[int]:
        """Hand one request over and decode it to its end; all its tokens, wherever they came from."""
        self.prefill.begin(
            Submit(
                request=KEY.request, attempt=KEY.attempt, prompt=PROMPT, generated=(), sampling=SAMPLING, slo=OWN_SLO
            ),
            TARGET,
        )
        self.source.submit(work("r", PROMPT, SAMPLING, handoff=True))
        tokens: list[int] = []
        for _ in range(500):
            for engine in (self.source, self.target):
                if not engine.has_work():
                    continue
                result = engine.step()
                for progress in result.progress:
                    self.prefill.progressed(progress)
                for output in result.outputs:
                    tokens.append(output.token)
                    if output.finish is None and engine is self.source:
                        self.prefill.first_token(KEY, output.token)
            if len(tokens) == SAMPLING.max_tokens:
                break
            await asyncio.sleep(0.005)
        await self.prefill.close()
        await asyncio.sleep(0.05)
        return tokens


def deliver(pair: Pair, message: PeerMessage) -> PeerMessage | None:
    """No tampering."""
    return message


@contextmanager
def pair(transport: str, tamper: Tamper = deliver, blocks: int = 32) -> Iterator[Pair]:
    """Both sides over `transport`; the books of both are clean and without leases at the end."""
    with ExitStack() as stack:
        arenas = [stack.enter_context(Arena.create(CARD.layout, blocks)) for _ in range(2)]
        books = [Books(blocks, BLOCK) for _ in range(2)]
        hasher = BlockHasher(CARD.fingerprint, BLOCK)
        limits = EngineLimits(max_sequences=8, chunk_tokens=CHUNK, step_tokens=CHUNK)
        engines = [
            Engine(MockRunner(CARD, CostModel(), lambda _: None), arena, book, hasher, limits)
            for arena, book in zip(arenas, books, strict=True)
        ]
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        config = HandoffConfig(handoff_timeout=10.0)
        both = Pair(*engines, arenas[1], None, None, tamper, loop)  # type: ignore[arg-type]

        def safe(ticket: TicketId) -> None:
            loop.call_soon_threadsafe(both.decode.safe, ticket)

        receivers: dict[str, Receiver]
        senders: dict[str, Sender]
        if transport == "loopback":
            network = LoopbackNetwork()
            receivers = {"loopback": LoopbackReceiver(arenas[1], safe, network)}
            senders = {"loopback": LoopbackSender(arenas[0], network)}
        else:
            receivers = open_receivers(arenas[1], transport, "127.0.0.1", safe)
            senders = open_senders(arenas[0], transport)
        lost: list[str] = []
        both.prefill = PrefillSide(
            engines[0],
            arenas[0],
            hasher,
            CARD,
            both,  # type: ignore[arg-type]
            senders,
            config,
            on_lost=lambda key, why: lost.append(why),
            wake=lambda: None,
        )
        grants = Grants()
        both.decode = DecodeSide(
            engines[1],
            arenas[1],
            hasher,
            CARD,
            TARGET.epoch,
            grants,
            config,
            VirtualClock(),
            both.answer,
            wake=lambda: None,
        )
        grants.receivers = receivers
        yield both
        grants.close()
        for sender in senders.values():
            sender.close()
        assert lost == []
        for engine, book in zip(engines, books, strict=True):
            assert engine.check_integrity() == []
            assert (book.counts.held, book.counts.quarantined) == (0, 0)


def verdicts(both: Pair) -> list[str]:
    """`accepted`, or the kind of refusal, in order."""
    answers = [message for message in both.to_prefill if isinstance(message, Accepted | HandoffRefused)]
    return [answer.kind if isinstance(answer, HandoffRefused) else "accepted" for answer in answers]


EVERY = pytest.mark.parametrize("transport", ["loopback", "shm", "tcp"])


def test_what_a_request_asks_for_itself_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Slo | None] = []
    with pair("loopback") as both:
        adopt = both.target.adopt

        def watch(work: Work, lease: Lease) -> None:
            asked.append(work.slo)
            adopt(work, lease)

        monkeypatch.setattr(both.target, "adopt", watch)
        both.loop.run_until_complete(both.run())
    assert asked == [OWN_SLO]


@EVERY
def test_each_chunk_is_announced_and_checked_before_the_commit(transport: str) -> None:
    checked: list[int] = []

    def watch(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Commit):
            checked.append(len(both.decode._tickets[message.ticket].found))
        return message

    with pair(transport, watch) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["accepted"]
        announced = [message.blocks for message in both.sent(Written) if isinstance(message, Written)]
        held = -(-len(PROMPT) // BLOCK)
        assert announced == sorted(announced) and announced[-1] == held
        assert len(announced) > 1, "a prompt of several chunks is announced in several parts"
        assert 0 < checked[0] < held, "the commit leaves the last chunk only"
        [link] = both.prefill.links.costs().values()
        assert 0 < link.latency_s < math.inf and 0 < link.bytes_per_s < math.inf


@EVERY
@pytest.mark.parametrize("moment", [Written, Commit])
def test_a_byte_that_changed_on_the_way_is_refused_and_the_blocks_are_sent_again(transport: str, moment: type) -> None:
    """Where a byte changes before its chunk is announced, or (announcements lost) before the commit."""
    spoiled: list[int] = []

    def spoil(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, moment) and not spoiled:
            spoiled.append(both.first_block())
            both.target_arena.bytes[-1, spoiled[0], -1] ^= 1
        return None if moment is Commit and isinstance(message, Written) else message

    with pair(transport, spoil) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert spoiled and verdicts(both) == ["checksum", "accepted"]
        assert both.decode.refused["checksum"] == 1


@EVERY
def test_lost_announcements_cost_nothing_but_time(transport: str) -> None:
    with pair(transport, lambda both, message: None if isinstance(message, Written) else message) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["accepted"]


@EVERY
def test_announcing_what_is_not_there_yet_is_refused_at_the_commit(transport: str) -> None:
    """Checked too early, the blocks are not those of the manifest, whatever lies there later."""
    lied: list[TicketId] = []

    def lie(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Written) and (not lied or lied[0] == message.ticket):
            lied.append(message.ticket)
            return Written(message.ticket, 10_000)
        return message

    with pair(transport, lie) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["checksum", "accepted"]


def test_announcements_of_unknown_and_ended_tickets_are_ignored() -> None:
    with pair("loopback") as both:
        both.decode.apply(SOURCE.epoch, Written(TicketId("nobody's"), 3))
        both.loop.run_until_complete(both.run())
        [commit] = both.sent(Commit)
        assert isinstance(commit, Commit)
        both.decode.apply(SOURCE.epoch, Written(commit.ticket, 3))
        assert verdicts(both) == ["accepted"]
