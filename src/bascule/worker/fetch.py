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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bascule.engine.core import Engine, Found
from bascule.engine.sequence import Key
from bascule.kv.arena import Arena
from bascule.kv.books import Books, Lease
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import SECRET_BYTES
from bascule.peer_wire import Fetch, Fetched, Revoked
from bascule.policies.load import LEAST_SHARE, prompt_seconds
from bascule.types import PEER, BlockHash, Brought, CostModel, FetchLoad, ModelCard, Salt, TicketId
from bascule.wire import FetchFrom, Submit
from bascule.worker.grants import Grants
from bascule.worker.loader import LEAST_PATIENCE_S
from bascule.worker.peers import Peers

log = logging.getLogger(__name__)

_UNKNOWN_S = 5.0
"""What a fetch may take while nothing is known of what computing costs."""


@dataclass(frozen=True)
class _Wish:
    """KV that one request wants of a peer."""

    key: Key
    tokens: Sequence[int]
    salt: Salt
    hashes: Sequence[BlockHash]
    """Of the full blocks that the peer is said to have."""
    source: FetchFrom
    patience_s: float
    """How long the request waits for it."""
    came: Callable[[Brought], None]


@dataclass
class _Here:
    """What has come for a request: blocks by their places in the prompt."""

    wish: _Wish
    places: range
    waited_s: float
    bytes: int
    used: int = 0
    """Tokens of them that the engine has found."""
    spared_s: float = 0.0


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
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`wake` is called when memory that requests may wait for is given back."""
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
        self._wake = wake
        self._answers: dict[TicketId, asyncio.Future[Fetched]] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._here: dict[Key, _Here] = {}
        """What has come for requests without a token."""
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

    async def bring(self, submission: Submit, source: FetchFrom, came: Callable[[Brought], None]) -> None:
        """Have a request's prompt fetched, as far as the peer has it and it is not here. Returns when the engine should
        have the request: when all is here, or at the end of a short patience, while the fetch goes on.

        `came` is told all that the engine has found of it, each time that it finds more. The fetch ends, at the latest,
        when computing would have. Never raises for what a peer does.
        """
        key, tokens = Key(submission.request, submission.attempt), (*submission.prompt, *submission.generated)
        size, model = self._card.layout.block_size, self._engine.cost
        wanted = min(source.tokens, len(tokens) - 1) // size
        hashes = self._hasher.chain(tokens[: wanted * size], submission.salt)
        if (cached := self._books.count_cached(hashes)) == wanted:
            return
        behind = len(tokens) - cached * size
        limit = patience = _UNKNOWN_S
        if model != CostModel():
            limit = prompt_seconds(model, len(tokens), cached * size)
            patience = max(LEAST_SHARE * limit, LEAST_PATIENCE_S)
        self.waiting, self.waiting_tokens = self.waiting + 1, self.waiting_tokens + behind
        wish = _Wish(key, tokens, submission.salt, hashes, source, patience, came)
        task = self._tasks[key] = asyncio.create_task(self._within(max(limit, patience), wish))
        task.add_done_callback(lambda _: self._tasks.pop(key, None))
        try:
            await asyncio.wait([task], timeout=patience)
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            self.waiting, self.waiting_tokens = self.waiting - 1, self.waiting_tokens - behind

    def found(self, found: Found) -> range:
        """The engine has found blocks of a prompt in the cache: count those that were fetched for it. Returns their
        places."""
        if (here := self._here.get(Key(found.request, found.attempt))) is None:
            return range(0)
        places = range(max(found.places.start, here.places.start), min(found.places.stop, here.places.stop))
        if not places:
            return places
        model, size, prompt = self._engine.cost, self._card.layout.block_size, len(here.wish.tokens)
        here.used += found.tokens_at(places, size)
        self._hit_tokens += found.tokens_at(places, size)
        behind_s = [prompt_seconds(model, prompt, place * size) for place in (places.start, places.stop)]
        here.spared_s += behind_s[0] - behind_s[1]
        self._spared_s += behind_s[0] - behind_s[1]
        here.wish.came(Brought({PEER: here.used}, here.waited_s, {PEER: here.bytes}, here.spared_s))
        return places

    def give_up(self, key: Key, *, late: bool = False) -> None:
        """Nothing more is to be fetched for a request, or found of it; does nothing for others. `late`: because it is
        computed."""
        self._here.pop(key, None)
        if (task := self._tasks.get(key)) is not None and task.cancel() and late:
            self._failed["late"] += 1

    async def _within(self, limit_s: float, wish: _Wish) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._bring(wish)
        except TimeoutError:
            self._failed["timeout"] += 1
        except Exception:
            log.exception("a prefix could not be fetched from %s", wish.source.peer.worker)
            self._failed["error"] += 1

    async def _bring(self, wish: _Wish) -> None:
        while (first := self._first_missing(wish.hashes)) is not None and first in self._under_way:
            await asyncio.wait([self._under_way[first]])
        if first is None:
            return
        lease = self._engine.borrow(wish.hashes, wish.tokens, len(wish.hashes))
        if lease is None:
            self._failed["memory"] += 1
            return
        done = self._under_way[first] = asyncio.get_running_loop().create_future()
        try:
            if lease.cached < len(wish.hashes):
                await self._fetch(wish, lease)
        finally:
            lease.release()
            self._wake()
            del self._under_way[first]
            done.set_result(None)

    def _first_missing(self, hashes: Sequence[BlockHash]) -> BlockHash | None:
        cached = self._books.count_cached(hashes)
        return hashes[cached] if cached < len(hashes) else None

    async def _fetch(self, wish: _Wish, lease: Lease) -> None:
        begun = asyncio.get_running_loop().time()
        size, cached, peer = self._card.layout.block_size, lease.cached, wish.source.peer.worker
        answer = await self._ask(wish, lease)
        end = cached + min(len(answer.checksums), len(wish.hashes) - cached)
        if end == cached:
            log.info("%s gives nothing of a prefix: %s", peer, answer.reason or "it has no more than is here")
            self._failed["refused" if answer.reason else "nothing"] += 1
            return
        blocks = lease.blocks[cached:end]
        found = await asyncio.to_thread(self._arena.checksums, blocks, size)
        if tuple(found) != answer.checksums[: end - cached]:
            log.warning("blocks fetched from %s are not those that it sent; computing them", peer)
            self._failed["checksum"] += 1
            return
        self._engine.take_in(blocks)
        lease.seal(cached, wish.hashes[cached:end], wish.tokens[cached * size : end * size], wish.salt)
        # A prompt that is being computed by now jumps over what it has not come to yet.
        self._engine.take_found(*wish.key)
        seconds = asyncio.get_running_loop().time() - begun
        came = len(blocks) * self._card.layout.block_bytes
        self._bytes += came
        self._fetch_s += seconds
        if wish.key in self._tasks:
            self._here[wish.key] = _Here(wish, range(cached, end), min(seconds, wish.patience_s), came)

    async def _ask(self, wish: _Wish, lease: Lease) -> Fetched:
        """The peer's answer, after which nobody writes any more. If none is waited for, the lease is given back."""
        ticket, secret = TicketId(uuid.uuid4().hex), secrets.token_bytes(SECRET_BYTES)
        answer = self._answers[ticket] = asyncio.get_running_loop().create_future()
        answered = False
        try:
            endpoints = self._grants.open(ticket, secret, lease)
            self._peers.send(
                wish.source.peer,
                Fetch(
                    ticket=ticket,
                    secret=secret,
                    worker=self._peers.address.worker,
                    fingerprint=self._card.fingerprint,
                    layout=self._card.layout,
                    tokens=tuple(wish.tokens[: len(wish.hashes) * self._card.layout.block_size]),
                    have_blocks=lease.cached,
                    blocks=tuple(lease.blocks[lease.cached :]),
                    endpoints=endpoints,
                    salt=wish.salt,
                ),
            )
            told: Fetched = await answer
            answered = True
            self._grants.finish(ticket)
            return told
        finally:
            del self._answers[ticket]
            if not answered and not self._grants.give_back(ticket, lease):
                self._peers.send(wish.source.peer, Revoked(ticket))
