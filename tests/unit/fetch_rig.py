"""Two workers' engines, of which one fetches what the other has: messages go directly, blocks over a real transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from engine_rig import BLOCK, CARD, Rig, greedy, named, reference, work

from bascule.engine.sequence import Key
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import Receiver, Sender
from bascule.kv.transfer.coding import Coding
from bascule.kv.transfer.loopback import LoopbackNetwork, LoopbackReceiver, LoopbackSender
from bascule.kv.transfer.select import open_receivers, open_senders
from bascule.peer_wire import Fetch, Fetched, PeerMessage, Revoked
from bascule.types import CostModel, Epoch, ModelCard, RequestId, TicketId, WorkerId
from bascule.wire import FetchFrom, PeerAddress, Submit
from bascule.worker import fetch
from bascule.worker.fetch import Fetches
from bascule.worker.grants import Grants
from bascule.worker.learning import Links
from bascule.worker.lend import Lender

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
        self,
        stack: ExitStack,
        transport: str,
        tamper: Tamper,
        coding: Coding = Coding(),
        card: ModelCard = CARD,
        chunk: int = 64,
    ) -> None:
        self.rigs = [Rig(own_memory=True, card=card, chunk=chunk) for _ in range(2)]
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
            name, key = named(transport)
            receivers = open_receivers(arenas[0], name, "127.0.0.1", safe, coding.codecs, key)
            senders = open_senders(arenas[1], name, key)
        self.grants.receivers = receivers
        for sender in senders.values():
            stack.callback(sender.close)
        stack.callback(self.grants.close)
        self.links = Links()
        rig = self.rigs[0]
        self.wake: Callable[[], None] = lambda: None
        """Called when the asker's engine may have work."""
        self.fetches = Fetches(
            rig.engine,
            rig.arena,
            rig.books,
            HASHER,
            card,
            self,  # type: ignore[arg-type]
            self.grants,
            lambda: self.wake(),
        )
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

    def compute(self, at: int, prompt: Sequence[int], salt: bytes = b"") -> int:
        """Serve a request on one of the two and check its tokens; returns the prompt tokens that were cached."""
        self.number += 1
        rig, name = self.rigs[at], str(self.number)
        rig.engine.submit(work(name, prompt, greedy(OUTPUT), salt=salt))
        rig.run()
        outputs = next(o for key, o in rig.outputs.items() if key.request == name)
        assert [each.token for each in outputs] == reference(prompt, greedy(OUTPUT))
        return outputs[0].cached_tokens

    async def fetch(self, prompt: Sequence[int], tokens: int, salt: bytes = b"") -> int:
        """How many blocks have become cached by it, when it has ended."""
        self.number += 1
        key, hashes = Key(RequestId(f"fetch {self.number}"), 1), HASHER.chain(prompt[:-1], salt)
        before = self.rigs[0].books.count_cached(hashes)
        async with asyncio.timeout(20):
            with patch.object(fetch, "_UNKNOWN_S", 20.0):
                await self.fetches.bring(submission(key, prompt, salt), FetchFrom(PEER_ADDRESS, tokens), lambda _: None)
            while key in self.fetches._tasks:
                await asyncio.sleep(0.001)
        self.fetches.give_up(key)
        return self.rigs[0].books.count_cached(hashes) - before

    async def check(self) -> None:
        """Nothing is held, nor in quarantine for longer than the other side takes to say that it is done."""
        for _ in range(2000):
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


def submission(key: Key, prompt: Sequence[int], salt: bytes = b"") -> Submit:
    return Submit(
        request=key.request,
        attempt=key.attempt,
        prompt=tuple(prompt),
        generated=(),
        sampling=greedy(OUTPUT),
        salt=salt,
    )


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
