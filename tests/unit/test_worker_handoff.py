"""Both sides of a handoff, alone: what they do with messages and cancels that come at the wrong moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import pytest
from msgspec import structs

from bascule.clock import VirtualClock
from bascule.config import HandoffConfig
from bascule.engine.core import Engine, EngineLimits
from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.sequence import Key
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.codecs.base import Codec
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import Endpoint, Move, Pushed
from bascule.kv.transfer.loopback import LoopbackNetwork, LoopbackReceiver
from bascule.peer_wire import Abort, Commit, HandoffRefused, Manifest, PeerMessage, Prepare, Reserved, TransferEndpoint
from bascule.types import CostModel, Epoch, RequestId, SamplingParams, TicketId, WorkerId
from bascule.wire import PeerAddress, Submit
from bascule.worker import decode_side as decode_side_module
from bascule.worker.decode_side import DecodeSide
from bascule.worker.grants import Grants
from bascule.worker.prefill_side import PrefillSide

SLOTS = 8
CARD = mock_card(vocab=1000)
SOURCE = PeerAddress(WorkerId("p"), Epoch("p-1"), "tcp://127.0.0.1:1")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@dataclass
class FakePeers:
    """Records what would be sent."""

    address: PeerAddress = SOURCE
    sent: list[PeerMessage] = field(default_factory=list)

    def send(self, peer: PeerAddress, message: PeerMessage) -> None:
        self.sent.append(message)

    def forget(self, peer: PeerAddress) -> None:
        raise AssertionError("nobody asked")


class FakeSession:
    """A session that moves nothing."""

    transport = "fake"

    def push(self, moves: Sequence[Move], codec: Codec | None = None) -> Pushed:
        return Pushed(0)

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


class FakeSender:
    transport = "fake"

    def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> FakeSession:
        return FakeSession()

    def close(self) -> None:
        return None


@dataclass
class Rig:
    engine: Engine
    arena: Arena
    books: Books
    hasher: BlockHasher


@contextmanager
def rig() -> Iterator[Rig]:
    """An engine of 32 blocks; its books must be clean and without leases at the end."""
    with Arena.create(CARD.layout, 32) as arena:
        books, hasher = Books(32, CARD.layout.block_size), BlockHasher(CARD.fingerprint, CARD.layout.block_size)
        limits = EngineLimits(max_sequences=SLOTS, chunk_tokens=64, step_tokens=64)
        engine = Engine(MockRunner(CARD, CostModel(), lambda _: None), arena, books, hasher, limits)
        yield Rig(engine, arena, books, hasher)
        assert engine.check_integrity() == []
        assert (books.counts.held, books.counts.quarantined) == (0, 0)


def prepare(**changes: Any) -> Prepare:
    values: dict[str, Any] = {
        "ticket": TicketId("t"),
        "secret": bytes(16),
        "source": SOURCE,
        "request": RequestId("r"),
        "attempt": 0,
        "prompt": tuple(range(1, 41)),
        "generated": (),
        "sampling": SamplingParams(max_tokens=8),
        "fingerprint": CARD.fingerprint,
        "layout": CARD.layout,
    }
    return Prepare(**(values | changes))


@dataclass
class DecodeRig:
    side: DecodeSide
    answers: list[PeerMessage]
    clock: VirtualClock
    books: Books

    def forget_all(self) -> None:
        """Nobody renews a ticket until all of them have expired."""
        for _ in range(40):
            self.clock.advance(1.0)
            self.side.expire()


@contextmanager
def decode_side() -> Iterator[DecodeRig]:
    with rig() as parts:
        answers: list[PeerMessage] = []
        clock, grants = VirtualClock(), Grants()
        side = DecodeSide(
            parts.engine,
            parts.arena,
            parts.hasher,
            CARD,
            Epoch("d-1"),
            grants,
            HandoffConfig(),
            clock,
            answer=lambda epoch, message: answers.append(message),
            wake=lambda: None,
        )
        grants.receivers = {"loopback": LoopbackReceiver(parts.arena, side.safe, LoopbackNetwork())}
        yield DecodeRig(side, answers, clock, parts.books)
        grants.close()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"secret": b"short"}, "malformed"),
        ({"prompt": ()}, "malformed"),
        ({"prompt": (1, -1)}, "malformed"),
        ({"prompt": (1, 2**40)}, "malformed"),
        ({"fingerprint": "other"}, "fingerprint"),
        ({"layout": structs.replace(CARD.layout, block_size=8)}, "layout"),
    ],
)
def test_a_prepare_that_cannot_be_meant_is_refused_and_the_next_one_granted(changes: dict[str, Any], kind: str) -> None:
    with decode_side() as rigged:
        rigged.side.apply(SOURCE.epoch, prepare(**changes))
        refusal = rigged.answers.pop()
        assert isinstance(refusal, HandoffRefused) and refusal.kind == kind and refusal.reason
        rigged.side.apply(SOURCE.epoch, prepare(ticket=TicketId("u")))
        assert isinstance(rigged.answers.pop(), Reserved)
        rigged.side.apply(SOURCE.epoch, Abort(TicketId("u")))
        rigged.side.expire()


def test_tickets_wait_for_memory_in_order_and_expire_without_renewal() -> None:
    with decode_side() as rigged:
        for name in ("a", "b"):
            rigged.side.apply(SOURCE.epoch, prepare(ticket=TicketId(name), prompt=tuple(range(1, 401))))
        assert rigged.side.promised == 1
        rigged.side.apply(SOURCE.epoch, Abort(TicketId("a")))
        rigged.side.expire()
        granted = [answer.ticket for answer in rigged.answers if isinstance(answer, Reserved)]
        assert granted == ["a", "b"]
        rigged.forget_all()
        assert rigged.side.refused["expired"] == 1


def test_prefill_waits_where_every_slot_is_reserved_though_there_is_memory() -> None:
    with decode_side() as rigged:
        for number in range(SLOTS + 2):
            rigged.side.apply(SOURCE.epoch, prepare(ticket=TicketId(f"t{number}"), prompt=(1, 2, 3)))
        granted = [answer.ticket for answer in rigged.answers if isinstance(answer, Reserved)]
        assert granted == [f"t{number}" for number in range(SLOTS)]
        assert rigged.side.promised == 2 and rigged.books.counts.free > 0
        rigged.side.apply(SOURCE.epoch, Abort(TicketId("t3")))
        rigged.side.expire()
        assert rigged.side.promised == 1
        assert [answer for answer in rigged.answers if isinstance(answer, Reserved)][-1].ticket == f"t{SLOTS}"
        rigged.forget_all()


def test_more_tickets_than_may_wait_are_refused_at_once_and_leave_the_others_in_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_side_module, "MOST_PROMISED", 2)
    with decode_side() as rigged:
        for name in "abcd":
            rigged.side.apply(SOURCE.epoch, prepare(ticket=TicketId(name), prompt=tuple(range(1, 401))))
        refused = [answer for answer in rigged.answers if isinstance(answer, HandoffRefused)]
        assert [(answer.ticket, answer.kind) for answer in refused] == [("d", "full")]
        assert rigged.side.promised == 2
        rigged.forget_all()


def test_a_decode_worker_that_was_paused_does_not_expire_tickets_at_once() -> None:
    with decode_side() as rigged:
        rigged.side.apply(SOURCE.epoch, prepare())
        rigged.clock.advance(300.0)
        rigged.side.expire()
        assert rigged.side.refused["expired"] == 0
        rigged.side.cancel(Key(RequestId("r"), 0))


@pytest.mark.parametrize("kind", ["checksum", "epoch", "attempt", "hashes", "length"])
def test_a_commit_whose_manifest_lies_is_refused_and_its_blocks_given_back(kind: str) -> None:
    async def scenario(rigged: DecodeRig, hasher: BlockHasher) -> None:
        asked = prepare()
        rigged.side.apply(SOURCE.epoch, asked)
        reserved = rigged.answers.pop()
        assert isinstance(reserved, Reserved)
        true = Manifest(
            fingerprint=CARD.fingerprint,
            layout=CARD.layout,
            source_epoch=SOURCE.epoch,
            target_epoch=reserved.epoch,
            attempt=0,
            tokens=40,
            have_blocks=0,
            hashes=tuple(hasher.chain(asked.prompt)),
            checksums=(b"no", b"not", b"never"),
        )
        lies: dict[str, dict[str, Any]] = {
            "checksum": {},
            "epoch": {"target_epoch": Epoch("d-0")},
            "attempt": {"attempt": 1},
            "hashes": {"hashes": true.hashes[::-1]},
            "length": {"tokens": 39},
        }
        commit = Commit(asked.ticket, 5, structs.replace(true, **lies[kind]))
        rigged.side.apply(SOURCE.epoch, commit)
        await until(lambda: rigged.answers)
        refusal = rigged.answers.pop()
        assert isinstance(refusal, HandoffRefused) and refusal.kind == kind
        rigged.side.apply(SOURCE.epoch, commit)
        assert rigged.answers.pop() == refusal, "a verdict stands"

    with decode_side() as rigged:
        asyncio.run(scenario(rigged, BlockHasher(CARD.fingerprint, CARD.layout.block_size)))


def reserved(asked: PeerMessage) -> Reserved:
    """The answer to `asked`, a request for blocks."""
    assert isinstance(asked, Prepare)
    ways = (TransferEndpoint("fake", "nowhere", "here"),)
    return Reserved(ticket=asked.ticket, epoch=Epoch("d-1"), blocks=(0, 1, 2), have_blocks=0, endpoints=ways)


def prefill_side(parts: Rig, peers: FakePeers, sender: FakeSender, config: HandoffConfig) -> PrefillSide:
    """With the handoff of a request `r` begun."""
    side = PrefillSide(
        parts.engine,
        parts.arena,
        parts.hasher,
        CARD,
        peers,  # type: ignore[arg-type]
        {"fake": sender},
        config,
        on_lost=lambda key, why, failing: pytest.fail(why),
        wake=lambda: None,
    )
    decode = PeerAddress(WorkerId("d"), Epoch("d-1"), "tcp://127.0.0.1:2")
    submission = Submit(
        request=RequestId("r"),
        attempt=0,
        prompt=tuple(range(1, 41)),
        generated=(),
        sampling=SamplingParams(max_tokens=8),
        decode=decode,
    )
    side.begin(submission, decode)
    return side


class SlowSender(FakeSender):
    """Opens nothing before it may."""

    def __init__(self) -> None:
        self.asked, self.may = Event(), Event()
        self.session = ClosableSession()

    def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> FakeSession:
        self.asked.set()
        assert self.may.wait(20)
        return self.session


class ClosableSession(FakeSession):
    def __init__(self) -> None:
        self.closed = Event()

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("ended_by", ["timeout", "cancel"])
def test_a_session_that_opens_when_nobody_waits_for_it_any_more_is_closed(ended_by: str) -> None:
    async def scenario(parts: Rig) -> None:
        peers, sender = FakePeers(), SlowSender()
        config = HandoffConfig(handoff_timeout=1.0 if ended_by == "timeout" else 30.0)
        side = prefill_side(parts, peers, sender, config)
        await until(lambda: peers.sent)
        side.apply(reserved(peers.sent[0]))
        assert await asyncio.to_thread(sender.asked.wait, 20)
        if ended_by == "cancel":
            side.cancel(Key(RequestId("r"), 0))
        await until(lambda: isinstance(peers.sent[-1], Abort))
        assert not sender.session.closed.is_set()
        sender.may.set()
        assert await asyncio.to_thread(sender.session.closed.wait, 20)
        await asyncio.wait_for(side.close(), 20)

    with rig() as parts:
        asyncio.run(scenario(parts))


class HeldSession(FakeSession):
    """Takes its time to close."""

    def __init__(self) -> None:
        self.closing, self.may, self.closed = Event(), Event(), False

    def close(self) -> None:
        self.closing.set()
        assert self.may.wait(20)
        self.closed = True


def test_a_second_cancel_while_the_session_closes_loses_no_abort() -> None:
    class Sender(FakeSender):
        session = HeldSession()

        def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> FakeSession:
            return self.session

    async def scenario(parts: Rig) -> None:
        peers, sender = FakePeers(), Sender()
        side = prefill_side(parts, peers, sender, HandoffConfig())
        await until(lambda: peers.sent)
        side.apply(reserved(peers.sent[0]))
        key = Key(RequestId("r"), 0)
        await until(lambda: side._by_key[key].pushing)
        side.cancel(key)
        assert await asyncio.to_thread(sender.session.closing.wait, 20)
        side.cancel(key)
        await asyncio.sleep(0.01)
        assert not any(isinstance(message, Abort) for message in peers.sent), "it may still be written"
        sender.session.may.set()
        await asyncio.wait_for(side.close(), 20)
        assert sender.session.closed and isinstance(peers.sent[-1], Abort)

    with rig() as parts:
        asyncio.run(scenario(parts))


@pytest.mark.parametrize("passes", range(6))
def test_a_cancel_around_the_reservation_ends_the_handoff_and_says_so(passes: int) -> None:
    """Whatever number of loop passes lie between the answer and the cancel: the ticket is given up."""

    async def scenario(parts: Rig) -> None:
        peers = FakePeers()
        side = prefill_side(parts, peers, FakeSender(), HandoffConfig())
        if passes:
            await until(lambda: peers.sent)
            side.apply(reserved(peers.sent[0]))
            for _ in range(passes - 1):
                await asyncio.sleep(0)
        key = Key(RequestId("r"), 0)
        side.cancel(key)
        await until(lambda: key not in side._by_key and (not passes or isinstance(peers.sent[-1], Abort)))
        before = len(peers.sent)
        side.renew()
        assert len(peers.sent) == before, "an ended handoff is still renewed"
        await asyncio.wait_for(side.close(), 20)

    with rig() as parts:
        asyncio.run(scenario(parts))
