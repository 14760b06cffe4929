"""Both sides of a handoff, each with an engine and an arena of its own, that talk over a real transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from engine_rig import BLOCK, CARD, greedy, named, work

from bascule.clock import VirtualClock
from bascule.config import HandoffConfig
from bascule.engine.core import Engine, EngineLimits
from bascule.engine.mock import MockRunner
from bascule.engine.sequence import Key
from bascule.kv.arena import Arena
from bascule.kv.books import Books, Counts
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import Receiver, Sender
from bascule.kv.transfer.coding import Coding
from bascule.kv.transfer.loopback import LoopbackNetwork, LoopbackReceiver, LoopbackSender
from bascule.kv.transfer.select import open_receivers, open_senders
from bascule.peer_wire import Accepted, HandoffRefused, PeerMessage, Reserved, Written
from bascule.types import CostModel, Epoch, RequestId, Slo, TicketId, WorkerId
from bascule.wire import PeerAddress, Submit
from bascule.worker.decode_side import DecodeSide
from bascule.worker.grants import Grants
from bascule.worker.prefill_side import PrefillSide

CHUNK = 16
PROMPT = tuple(range(1, 55))
SAMPLING = greedy(4)
OWN_SLO, OWN_PRIORITY = Slo(1.0, 0.05, 0.15), -3
SOURCE = PeerAddress(WorkerId("p"), Epoch("p-1"), "tcp://127.0.0.1:1")
TARGET = PeerAddress(WorkerId("d"), Epoch("d-1"), "tcp://127.0.0.1:2")
KEY = Key(RequestId("r"), 1)
_PATIENCE = 1000

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
    grants: Grants = field(default_factory=Grants)
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

    def _behind(self) -> bool:
        """Whether a chunk of a prompt that is being computed has still to be announced, or what is announced to be
        checked."""
        handoff = self.prefill._by_key.get(KEY)
        if handoff is None or handoff.first_token is not None or not handoff.computed:
            return False
        incoming = self.decode._tickets.get(handoff.ticket)
        lease = None if incoming is None else incoming.lease
        if incoming is not None and lease is not None and len(incoming.found) < incoming.written - lease.cached:
            return True
        announced = [one for one in self.sent(Written) if isinstance(one, Written) and one.ticket == handoff.ticket]
        return not announced or announced[-1].blocks < handoff.computed

    async def run(self, salt: bytes = b"") -> list[int]:
        """Hand one request over and decode it to its end; all its tokens, wherever they came from.

        On a machine that is busy with other things the prompt's next chunk waits for the handoff of the one before.
        """
        self.prefill.begin(
            Submit(
                request=KEY.request,
                attempt=KEY.attempt,
                prompt=PROMPT,
                generated=(),
                sampling=SAMPLING,
                slo=OWN_SLO,
                salt=salt,
                priority=OWN_PRIORITY,
            ),
            TARGET,
        )
        self.source.submit(work("r", PROMPT, SAMPLING, handoff=True, salt=salt))
        tokens: list[int] = []
        behind = 0
        for _ in range(4000):
            for engine in (self.source, self.target):
                if not engine.has_work():
                    continue
                if engine is self.source and self._behind() and (behind := behind + 1) < _PATIENCE:
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
        for _ in range(_PATIENCE):  # both ends of what was written tell that it is over, from threads of their own
            if not any(counts.held or counts.quarantined for counts in self._counts()):
                break
            await asyncio.sleep(0.005)
        await self.prefill.close()
        await asyncio.sleep(0.05)
        return tokens

    def _counts(self) -> list[Counts]:
        return [engine._books.counts for engine in (self.source, self.target)]


def deliver(pair: Pair, message: PeerMessage) -> PeerMessage | None:
    """No tampering."""
    return message


def mock_runner() -> MockRunner:
    return MockRunner(CARD, CostModel(), lambda _: None)


@contextmanager
def pair(
    transport: str,
    tamper: Tamper = deliver,
    blocks: int = 32,
    new_runner: Callable[[], MockRunner] = mock_runner,
    coding: Coding = Coding(),
    allowed: Coding | None = None,
) -> Iterator[Pair]:
    """Both sides over `transport` (see `named`); the books of both are clean and without leases at the end.

    The prefill side sends with `coding`, and the decode side takes what is `allowed` (else the same).
    """
    codecs = (allowed or coding).codecs
    with ExitStack() as stack:
        runners = [new_runner() for _ in range(2)]
        card = runners[0].card
        arenas = [stack.enter_context(Arena.create(card.layout, blocks)) for _ in range(2)]
        books = [Books(blocks, BLOCK) for _ in range(2)]
        hasher = BlockHasher(card.fingerprint, BLOCK)
        limits = EngineLimits(max_sequences=8, chunk_tokens=CHUNK, step_tokens=CHUNK)
        engines = [
            Engine(runner, arena, book, hasher, limits)
            for runner, arena, book in zip(runners, arenas, books, strict=True)
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
            receivers = {"loopback": LoopbackReceiver(arenas[1], safe, network, codecs)}
            senders = {"loopback": LoopbackSender(arenas[0], network)}
        else:
            name, key = named(transport)
            receivers = open_receivers(arenas[1], name, "127.0.0.1", safe, codecs, key)
            senders = open_senders(arenas[0], name, key)
        lost: list[str] = []
        both.prefill = PrefillSide(
            engines[0],
            arenas[0],
            hasher,
            card,
            both,  # type: ignore[arg-type]
            senders,
            config,
            on_lost=lambda key, why, failing: lost.append(why),
            wake=lambda: None,
            coding=coding,
        )
        grants = both.grants
        both.decode = DecodeSide(
            engines[1],
            arenas[1],
            hasher,
            card,
            TARGET.epoch,
            grants,
            config,
            VirtualClock(),
            both.answer,
            wake=lambda: None,
        )
        grants.receivers = receivers
        yield both
        patience = (
            time.monotonic() + 20
        )  # for the receiver, which tells from its own thread that nothing is written now
        while any(book.counts.held or book.counts.quarantined for book in books) and time.monotonic() < patience:
            loop.run_until_complete(asyncio.sleep(0.01))
        grants.close()
        for sender in senders.values():
            sender.close()
        assert lost == []
        for engine, book in zip(engines, books, strict=True):
            assert engine.check_integrity() == []
            assert (book.counts.held, book.counts.quarantined) == (0, 0)


def verdicts(both: Pair) -> list[str]:
    """`accepted`, or the kind of refusal, in order; a verdict that is said again to who asks again counts once."""
    answers = (message for message in both.to_prefill if isinstance(message, Accepted | HandoffRefused))
    return [answer.kind if isinstance(answer, HandoffRefused) else "accepted" for answer in dict.fromkeys(answers)]
