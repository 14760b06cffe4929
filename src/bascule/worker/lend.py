"""KV for another worker: what it asks for of this worker's cache is pushed into its memory, as in a handoff."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import TypeVar

from bascule.engine.core import Engine
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.codecs.base import Codec
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import SECRET_BYTES, Endpoint, Move, Pushed, Sender, Session, TransferError
from bascule.kv.transfer.coding import Coding
from bascule.kv.transfer.select import open_session
from bascule.peer_wire import Fetch, Fetched, PeerMessage
from bascule.types import Epoch, ModelCard, Salt, TicketId
from bascule.worker.learning import Links
from bascule.worker.peer_threads import PeerThreads

log = logging.getLogger(__name__)

T = TypeVar("T")

_THREADS = 4
"""For each worker that asks."""
_PIECE = 32
"""Blocks pushed at a time: between two pieces a fetch that is taken back ends."""
_PIECE_S = 60.0
"""Who takes longer to receive a piece gets no more."""

Bring = Callable[[Sequence[int], Salt], Awaitable[object]]


class Loan:
    """One ticket on its way."""

    def __init__(self, fetch: Fetch, asker: Epoch) -> None:
        self.fetch = fetch
        self.asker = asker
        self.session: Session | None = None
        self.given_up = False
        self.checksums: list[bytes] = []
        """Of the blocks that lie in the asker's arena."""


class Lender:
    """All that peers ask of this worker. Runs in the asyncio loop; pushes in threads of its own."""

    def __init__(
        self,
        engine: Engine,
        arena: Arena,
        books: Books,
        hasher: BlockHasher,
        card: ModelCard,
        senders: Mapping[str, Sender],
        links: Links,
        answer: Callable[[Epoch, PeerMessage], None],
        coding: Coding,
        bring: Bring | None,
    ) -> None:
        """`answer` sends to the worker with that epoch; `bring` has what the store holds of a prompt loaded."""
        self.bytes_sent: Counter[str] = Counter()
        """By transport, as they crossed it."""
        self._engine = engine
        self._arena = arena
        self._books = books
        self._hasher = hasher
        self._card = card
        self._senders = senders
        self._links = links
        self._answer = answer
        self._coding = coding
        self._bring = bring
        self._loans: dict[TicketId, Loan] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = PeerThreads(_THREADS, "kv-lend")

    def lend(self, asker: Epoch, fetch: Fetch) -> None:
        """Give a peer what it asks for; answers `Fetched` in any case."""
        if fetch.ticket not in self._loans:
            loan = self._loans[fetch.ticket] = Loan(fetch, asker)
            self._keep(asyncio.create_task(self._lend(loan)))

    def revoke(self, asker: Epoch, ticket: TicketId) -> bool:
        """A peer wants no more of what it asked for: stop writing, and say so. False if this is no loan."""
        if (loan := self._loans.get(ticket)) is None or loan.asker != asker:
            return False
        self._give_up(loan)
        return True

    def _give_up(self, loan: Loan) -> None:
        """Its push ends with an error, and the loan with an answer."""
        loan.given_up = True
        if loan.session is not None:
            # In none of the asker's threads: all of them may be waiting for it.
            self._keep(asyncio.create_task(asyncio.to_thread(loan.session.close)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lend(self, loan: Loan) -> None:
        reason = self._mismatch(loan.fetch)
        try:
            if not reason:
                reason = await self._push(loan)
        except TransferError as error:
            reason = str(error)
        except Exception as error:
            log.exception("a fetch of another worker failed")
            reason = f"{type(error).__name__}: {error}"
        finally:
            del self._loans[loan.fetch.ticket]
        if reason:
            log.info("a fetch by %s brought nothing: %s", loan.asker, reason)
        self._answer(loan.asker, Fetched(loan.fetch.ticket, () if reason else tuple(loan.checksums), reason))

    def _mismatch(self, fetch: Fetch) -> str:
        """Why nothing here is of use to the asker; empty if it may be."""
        ours = self._card
        if fetch.fingerprint != ours.fingerprint:
            return f"KV of model {fetch.fingerprint} is wanted, this worker serves {ours.fingerprint}"
        if fetch.layout != ours.layout:
            return f"KV of layout {fetch.layout} is wanted, this worker's is {ours.layout}"
        blocks, rest = divmod(len(fetch.tokens), ours.layout.block_size)
        if rest or not 0 <= fetch.have_blocks < blocks or len(fetch.blocks) != blocks - fetch.have_blocks:
            return f"{len(fetch.tokens)} tokens and {len(fetch.blocks)} blocks do not go together"
        if len(fetch.tokens) > self._engine.most_tokens or max(fetch.tokens) >= ours.vocab:
            return f"{len(fetch.tokens)} tokens up to {max(fetch.tokens)} cannot be a prompt here"
        if len(fetch.secret) != SECRET_BYTES:
            return f"the secret has {len(fetch.secret)} bytes instead of {SECRET_BYTES}"
        return ""

    async def _push(self, loan: Loan) -> str:
        """Push what is cached; returns why nothing was."""
        fetch, begun = loan.fetch, asyncio.get_running_loop().time()
        hashes = self._hasher.chain(fetch.tokens, fetch.salt)
        if self._bring is not None and self._books.count_cached(hashes) < len(hashes):
            await self._bring(fetch.tokens, fetch.salt)
        have = self._books.count_cached(hashes)
        lease = self._engine.borrow(hashes, fetch.tokens, have) if have > fetch.have_blocks else None
        if lease is None:
            return "no more of it is cached here, or this worker is short of memory"
        with lease:
            blocks = lease.blocks[fetch.have_blocks : lease.cached]
            moves = [Move(*ends) for ends in zip(blocks, fetch.blocks, strict=False)]
            await self._push_all(loan, moves)
            pushed = len(moves) * self._card.layout.block_bytes
            self._links.handed_over(fetch.worker, pushed, asyncio.get_running_loop().time() - begun)
        return ""

    async def _push_all(self, loan: Loan, moves: Sequence[Move]) -> None:
        """Piece by piece; when this returns or raises, nothing more is written."""
        fetch = loan.fetch
        endpoints = [Endpoint(each.transport, each.address, each.machine) for each in fetch.endpoints]
        opening = partial(open_session, self._senders, endpoints, fetch.ticket, fetch.secret)
        session = await self._in_thread(loan, opening)
        loan.session = session
        try:
            for start in range(0, len(moves), _PIECE):
                if loan.given_up:
                    raise TransferError("the fetch was taken back")
                piece, begun = moves[start : start + _PIECE], perf_counter()
                size = len(piece) * self._card.layout.block_bytes
                codec = self._coding.codec_for(size, self._links.wire_rate(fetch.worker, session.transport))
                async with asyncio.timeout(_PIECE_S):
                    pushed = await self._in_thread(loan, partial(self._push_piece, loan, session, piece, codec))
                seconds = perf_counter() - begun
                self.bytes_sent[session.transport] += pushed.wire_bytes
                self._links.crossed(fetch.worker, session.transport, pushed.wire_bytes, seconds - pushed.idle_s)
                self._links.pushed(fetch.worker, size, seconds)
        except TimeoutError:
            raise TransferError(f"{len(piece)} blocks were not taken within {_PIECE_S:g} s") from None
        finally:
            await asyncio.to_thread(session.close)

    def _push_piece(self, loan: Loan, session: Session, piece: Sequence[Move], codec: Codec | None) -> Pushed:
        """In a thread: the blocks lie in the asker's arena when this returns."""
        pushed = session.push(piece, codec)
        session.flush()
        exact = [place for place in range(len(piece)) if place not in pushed.coded]
        found = self._arena.checksums([piece[place].source for place in exact], self._card.layout.block_size)
        there = dict(zip(exact, found, strict=True)) | pushed.coded
        loan.checksums += [there[place] for place in range(len(piece))]
        return pushed

    async def _in_thread(self, loan: Loan, call: Callable[[], T]) -> T:
        with self._threads.of(loan.asker) as threads:
            return await asyncio.get_running_loop().run_in_executor(threads, call)

    async def close(self) -> None:
        """Give up what is under way."""
        for loan in self._loans.values():
            self._give_up(loan)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.close()
