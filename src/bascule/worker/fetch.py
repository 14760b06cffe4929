"""KV from another worker: what a peer has computed of a prompt is written into this worker's cache, and not computed.

The blocks are leased here first and granted to the peer, which pushes them as it does in a handoff. They count once
their checksums are those that the peer sent. Whatever goes wrong, the prompt is computed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections import Counter
from collections.abc import Sequence

from bascule.engine.core import Engine
from bascule.kv.arena import Arena
from bascule.kv.books import Books, Lease
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import SECRET_BYTES
from bascule.peer_wire import Fetch, Fetched, Revoked
from bascule.policies.load import prompt_seconds
from bascule.types import PEER, BlockHash, CostModel, FetchLoad, ModelCard, TicketId
from bascule.wire import FetchFrom
from bascule.worker.grants import Grants
from bascule.worker.parts import Brought
from bascule.worker.peers import Peers

log = logging.getLogger(__name__)

_UNKNOWN_S = 5.0
"""What a fetch may take while nothing is known of what computing costs."""


class Fetches:
    """All that this worker asks of its peers. Runs in the asyncio loop; only checksums are taken in a thread."""

    def __init__(
        self,
        engine: Engine,
        arena: Arena,
        books: Books,
        hasher: BlockHasher,
        card: ModelCard,
        peers: Peers,
        grants: Grants,
    ) -> None:
        self.waiting = 0
        """Prompts that wait for what is fetched for them."""
        self.waiting_tokens = 0
        """Their tokens that are not cached on the device."""
        self._engine = engine
        self._arena = arena
        self._books = books
        self._hasher = hasher
        self._card = card
        self._peers = peers
        self._grants = grants
        self._answers: dict[TicketId, asyncio.Future[Fetched]] = {}
        self._under_way: dict[BlockHash, asyncio.Future[None]] = {}
        """Fetches by the first block that they bring."""
        self._hit_tokens = 0
        self._bytes = 0
        self._fetch_s = 0.0
        self._spared_s = 0.0
        self._failed: Counter[str] = Counter()

    def figures(self) -> FetchLoad:
        return FetchLoad(
            hit_tokens=self._hit_tokens,
            bytes=self._bytes,
            fetch_s=self._fetch_s,
            spared_s=self._spared_s,
            failed=dict(self._failed),
        )

    def apply(self, message: Fetched) -> bool:
        """A peer's answer: it writes no more. False if nobody waits for it any more."""
        answer = self._answers.get(message.ticket)
        if answer is None or answer.done():
            return False
        answer.set_result(message)
        return True

    async def bring(self, tokens: Sequence[int], source: FetchFrom) -> Brought | None:
        """Have a prompt's KV fetched, as far as the peer has it and it is not here; None if nothing came.

        Takes no longer than computing it would. Never raises for what a peer does.
        """
        size = self._card.layout.block_size
        wanted = min(source.tokens, len(tokens) - 1) // size
        hashes = self._hasher.chain(tokens[: wanted * size])
        if (cached := self._books.count_cached(hashes)) == wanted:
            return None
        behind = len(tokens) - cached * size
        model = self._engine.cost
        patience = prompt_seconds(model, len(tokens), cached * size) if model != CostModel() else _UNKNOWN_S
        self.waiting, self.waiting_tokens = self.waiting + 1, self.waiting_tokens + behind
        try:
            async with asyncio.timeout(patience):
                return await self._bring(tokens, hashes, source)
        except TimeoutError:
            self._failed["timeout"] += 1
            return None
        except Exception:
            log.exception("a prefix could not be fetched from %s", source.peer.worker)
            self._failed["error"] += 1
            return None
        finally:
            self.waiting, self.waiting_tokens = self.waiting - 1, self.waiting_tokens - behind

    async def _bring(self, tokens: Sequence[int], hashes: Sequence[BlockHash], source: FetchFrom) -> Brought | None:
        while (first := self._first_missing(hashes)) is not None and first in self._under_way:
            await asyncio.wait([self._under_way[first]])
        if first is None:
            return None
        lease = self._engine.borrow(tokens, len(hashes))
        if lease is None:
            self._failed["memory"] += 1
            return None
        done = self._under_way[first] = asyncio.get_running_loop().create_future()
        try:
            if lease.cached == len(hashes):
                return None
            return await self._fetch(tokens, hashes, lease, source)
        finally:
            lease.release()
            del self._under_way[first]
            done.set_result(None)

    def _first_missing(self, hashes: Sequence[BlockHash]) -> BlockHash | None:
        cached = self._books.count_cached(hashes)
        return hashes[cached] if cached < len(hashes) else None

    async def _fetch(
        self, tokens: Sequence[int], hashes: Sequence[BlockHash], lease: Lease, source: FetchFrom
    ) -> Brought | None:
        begun = asyncio.get_running_loop().time()
        size, cached = self._card.layout.block_size, lease.cached
        answer = await self._ask(tokens[: len(hashes) * size], lease, source)
        count = min(len(answer.checksums), len(hashes) - cached)
        if not count:
            log.info(
                "%s gives nothing of a prefix: %s", source.peer.worker, answer.reason or "it has no more than here"
            )
            self._failed["refused" if answer.reason else "nothing"] += 1
            return None
        blocks = lease.blocks[cached : cached + count]
        found = await asyncio.to_thread(self._arena.checksums, blocks, size)
        if tuple(found) != answer.checksums[:count]:
            log.warning("blocks fetched from %s are not those that it sent; computing them", source.peer.worker)
            self._failed["checksum"] += 1
            return None
        self._engine.take_in(blocks)
        lease.seal(cached, hashes[cached : cached + count], tokens[cached * size : (cached + count) * size])
        seconds = asyncio.get_running_loop().time() - begun
        self._count(len(tokens), cached * size, count * size, seconds)
        return Brought({PEER: count * size}, seconds)

    async def _ask(self, tokens: Sequence[int], lease: Lease, source: FetchFrom) -> Fetched:
        """The peer's answer, after which nobody writes any more. If none is waited for, the lease is given back."""
        ticket, secret = TicketId(uuid.uuid4().hex), secrets.token_bytes(SECRET_BYTES)
        answer = self._answers[ticket] = asyncio.get_running_loop().create_future()
        answered = False
        try:
            endpoints = self._grants.open(ticket, secret, lease)
            self._peers.send(
                source.peer,
                Fetch(
                    ticket=ticket,
                    secret=secret,
                    worker=self._peers.address.worker,
                    fingerprint=self._card.fingerprint,
                    layout=self._card.layout,
                    tokens=tuple(tokens),
                    have_blocks=lease.cached,
                    blocks=tuple(lease.blocks[lease.cached :]),
                    endpoints=endpoints,
                ),
            )
            told: Fetched = await answer
            answered = True
            self._grants.finish(ticket)
            return told
        finally:
            del self._answers[ticket]
            if not answered and not self._grants.give_back(ticket, lease):
                self._peers.send(source.peer, Revoked(ticket))

    def _count(self, prompt: int, before: int, fetched: int, seconds: float) -> None:
        model = self._engine.cost
        self._hit_tokens += fetched
        self._bytes += fetched // self._card.layout.block_size * self._card.layout.block_bytes
        self._fetch_s += seconds
        self._spared_s += prompt_seconds(model, prompt, before) - prompt_seconds(model, prompt, before + fetched)
