"""Handoffs that leave this worker: reserve, push what is computed while prefill goes on, commit, release.

Each handoff is one coroutine that reads like the protocol. It tries twice; if the decode worker has no room, cannot be
reached or refuses twice, the request decodes here, where its KV is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from bascule.config import HandoffConfig
from bascule.engine.core import Engine, Progress
from bascule.engine.sequence import Key
from bascule.kv.arena import Arena
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import Endpoint, Move, Sender, Session, TransferError
from bascule.kv.transfer.coding import Coding
from bascule.kv.transfer.select import open_session
from bascule.peer_wire import (
    Abort,
    Accepted,
    Commit,
    HandoffRefused,
    Manifest,
    PeerMessage,
    Prepare,
    Renew,
    Reserved,
    Revoked,
    Written,
)
from bascule.types import ModelCard, TicketId, WorkerId
from bascule.wire import PeerAddress, Submit
from bascule.worker.deadlines import Deadlines
from bascule.worker.learning import Links
from bascule.worker.outgoing import Endings, Outgoing, Pusher, close_late
from bascule.worker.peer_threads import PeerThreads
from bascule.worker.peers import Peers

log = logging.getLogger(__name__)

T = TypeVar("T")

_ROUNDS = 2
_DIGEST_THREADS = 4
_PUSH_THREADS = 8
"""For each decode worker."""
_REPEAT_S = 1.0
"""A commit without verdict is repeated, and leases are renewed, this often."""


class HandoffFailed(Exception):
    """This round did not work; `again` says whether another may."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class VerdictLost(Exception):
    """The decode side may or may not have taken over: only the router can decide who goes on."""


class PrefillSide:
    """All handoffs that leave this worker. Runs in the asyncio loop; checksums and transfers in threads of its own."""

    def __init__(
        self,
        engine: Engine,
        arena: Arena,
        hasher: BlockHasher,
        card: ModelCard,
        peers: Peers,
        senders: Mapping[str, Sender],
        config: HandoffConfig,
        on_lost: Callable[[Key, str, WorkerId | None], None],
        wake: Callable[[], None],
        coding: Coding = Coding(),
        unreachable: Mapping[WorkerId, str] = {},
        deadlines: Deadlines | None = None,
    ) -> None:
        """`on_lost` is told of requests that are lost, why, and which other worker is to blame, if one is; `wake` is
        called when a sequence may run again.

        To those who are `unreachable` at the time, with the reason, nothing is handed over.
        """
        self.bytes_sent: Counter[str] = Counter()
        """By transport, as they crossed it."""
        self.links = Links()
        self._engine = engine
        self._hasher = hasher
        self._card = card
        self._peers = peers
        self._senders = senders
        self._config = config
        self._on_lost = on_lost
        self._wake = wake
        self._coding = coding
        self._unreachable = unreachable
        self._deadlines = deadlines or Deadlines()
        self._pusher = Pusher(arena)
        self._by_key: dict[Key, Outgoing] = {}
        self._by_ticket: dict[TicketId, Outgoing] = {}
        self._endings = Endings()
        self._digests = ThreadPoolExecutor(_DIGEST_THREADS, "digest")
        self._threads = PeerThreads(_PUSH_THREADS, "push")

    # ------------------------------------------------------------ what the worker tells

    def begin(self, submission: Submit, decode: PeerAddress) -> None:
        """Start the handoff of a request that has just been submitted to the engine."""
        handoff = Outgoing(submission, decode, self._card.layout.block_size)
        self._by_key[handoff.key] = handoff
        handoff.task = asyncio.create_task(self._run(handoff))
        # Not in the coroutine: one that is cancelled before its first step never gets to its `finally`.
        handoff.task.add_done_callback(lambda _: self._ended(handoff))

    def progressed(self, progress: Progress) -> None:
        """A chunk is computed: its checksums are taken now, wherever the reservation stands."""
        if (handoff := self._by_key.get(Key(progress.request, progress.attempt))) is None:
            return
        full, rest = divmod(progress.computed, self._card.layout.block_size)
        handoff.blocks = progress.blocks
        handoff.computed = full + (1 if progress.last and rest else 0)
        handoff.changed.set()
        if not handoff.pushing:
            self._digests.submit(self._pusher.digest, handoff)

    def first_token(self, key: Key, token: int) -> None:
        """The prompt is computed, and this is the first token (it has left for the router)."""
        if (handoff := self._by_key.get(key)) is not None:
            handoff.first_token = token
            handoff.computed_at = asyncio.get_running_loop().time()
            handoff.changed.set()

    def cancel(self, key: Key) -> None:
        """The request has ended or is no longer wanted here."""
        if (handoff := self._by_key.get(key)) is not None and handoff.task is not None:
            handoff.task.cancel()

    def renew(self) -> None:
        """Tell the decode sides which tickets live on; called once a second or so."""
        tickets: dict[PeerAddress, list[TicketId]] = {}
        for ticket, handoff in self._by_ticket.items():
            tickets.setdefault(handoff.decode, []).append(ticket)
        for peer, named in tickets.items():
            self._peers.send(peer, Renew(tuple(named)))

    def apply(self, message: PeerMessage) -> None:
        """A decode side's answer; one to a ticket of an earlier round is ignored."""
        if not isinstance(message, Reserved | Accepted | HandoffRefused | Revoked):
            return
        handoff = self._by_ticket.get(message.ticket)
        if handoff is None:
            return
        if isinstance(message, Reserved):
            if not handoff.reserved.done():
                handoff.reserved.set_result(message)
        elif isinstance(message, Accepted):
            if not handoff.verdict.done():
                handoff.verdict.set_result(None)
        else:
            reason = message.reason if isinstance(message, HandoffRefused) else "the decode worker revoked the ticket"
            again = isinstance(message, HandoffRefused) and message.kind in ("checksum", "unknown")
            for future in (handoff.reserved, handoff.verdict):
                if not future.done():
                    future.set_exception(HandoffFailed(reason, again=again))
                    future.exception()
            handoff.changed.set()

    async def close(self) -> None:
        tasks = [handoff.task for handoff in self._by_key.values() if handoff.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._endings.close()
        self._digests.shutdown(wait=False, cancel_futures=True)
        self._threads.close()

    # ------------------------------------------------------------ one handoff

    async def _run(self, handoff: Outgoing) -> None:
        try:
            await self._hand_over(handoff)
        except VerdictLost:
            self._engine.cancel(*handoff.key)
            silent = handoff.decode.worker
            self._on_lost(handoff.key, f"decode worker {silent} gave no verdict on a handoff", silent)
        except Exception as error:
            log.exception("a handoff failed unexpectedly")
            self._engine.cancel(*handoff.key)
            self._on_lost(handoff.key, f"the handoff failed: {error}", None)

    def _ended(self, handoff: Outgoing) -> None:
        if self._by_key.get(handoff.key) is handoff:
            del self._by_key[handoff.key]
        self._wake()

    async def _hand_over(self, handoff: Outgoing) -> None:
        # Blocks there that are kept for a prompt without memory here are missed by those whose memory it waits for.
        while not (handoff.blocks or self._engine.secure(*handoff.key)):
            handoff.changed.clear()
            await handoff.changed.wait()
        for round_number in range(1, _ROUNDS + 1):
            try:
                await self._round(handoff)
            except HandoffFailed as failure:
                log.warning("handoff of %s to %s: %s", handoff.key.request, handoff.decode.worker, failure)
                if failure.again and round_number < _ROUNDS:
                    continue
                self._engine.keep(*handoff.key)
            else:
                self._engine.release(*handoff.key)
                self._deadlines.forget(handoff.key)
            return

    async def _round(self, handoff: Outgoing) -> None:
        """One ticket from `Prepare` to the verdict. Whatever happens, no write comes after `Abort`."""
        handoff.renew_ticket()
        ticket = handoff.ticket
        self._by_ticket[ticket] = handoff
        session: Session | None = None
        accepted = False
        try:
            secret = secrets.token_bytes(16)
            # While the first chunk is computed, not when the commit waits for them.
            handoff.hashes = tuple(self._hasher.chain(handoff.tokens, handoff.submission.salt))
            reserved = await self._reserve(handoff, secret)
            self._engine.permit(*handoff.key)
            self._wake()
            session = await self._open(handoff, reserved, secret)
            opened = asyncio.get_running_loop().time()
            await self._push(handoff, reserved, session)
            await self._commit(handoff, reserved)
            accepted = True
            # Waiting for blocks over there is no matter of the link.
            exposed = asyncio.get_running_loop().time() - max(handoff.computed_at, opened)
            self.links.handed_over(handoff.decode.worker, handoff.late_bytes, exposed)
        finally:
            self._by_ticket.pop(ticket, None)
            await self._endings.run(self._end(handoff, ticket, session, accepted))

    async def _end(self, handoff: Outgoing, ticket: TicketId, session: Session | None, accepted: bool) -> None:
        try:
            if session is not None:
                # A push that is under way in a thread sees the closed session and stops; no write comes after this.
                await asyncio.to_thread(session.close)
        finally:
            if not accepted:
                self._peers.send(handoff.decode, Abort(ticket))

    async def _reserve(self, handoff: Outgoing, secret: bytes) -> Reserved:
        if (why := self._unreachable.get(handoff.decode.worker)) is not None:
            raise HandoffFailed(f"it cannot be reached at {why}; decoding here", again=False)
        self._peers.send(
            handoff.decode,
            Prepare(
                ticket=handoff.ticket,
                secret=secret,
                source=self._peers.address,
                request=handoff.submission.request,
                attempt=handoff.submission.attempt,
                prompt=handoff.submission.prompt,
                generated=handoff.submission.generated,
                sampling=handoff.submission.sampling,
                fingerprint=self._card.fingerprint,
                layout=self._card.layout,
                slo=handoff.submission.slo,
                salt=handoff.submission.salt,
                timeout_s=self._deadlines.left(handoff.key),
                priority=handoff.submission.priority,
            ),
        )
        try:
            async with asyncio.timeout(self._config.reserve_timeout):
                reserved = await asyncio.shield(handoff.reserved)
        except TimeoutError:
            raise HandoffFailed(
                f"no blocks were granted within {self._config.reserve_timeout:g} s; decoding here", again=False
            ) from None
        if len(reserved.blocks) < handoff.prompt_blocks or reserved.have_blocks > handoff.prompt_blocks:
            raise HandoffFailed(
                f"the decode worker reserved {len(reserved.blocks)} blocks, {reserved.have_blocks} of them filled, for "
                f"{handoff.prompt_blocks}; decoding here",
                again=False,
            )
        return reserved

    async def _open(self, handoff: Outgoing, reserved: Reserved, secret: bytes) -> Session:
        """Connect by the first transport of the decode side's list that works from here."""
        endpoints = [Endpoint(offer.transport, offer.address, offer.machine) for offer in reserved.endpoints]
        with self._threads.of(handoff.decode.epoch) as threads:
            opening = threads.submit(open_session, self._senders, endpoints, handoff.ticket, secret)
            session = await self._opened(opening)
        handoff.transport = session.transport
        return session

    async def _opened(self, opening: Future[Session]) -> Session:
        try:
            async with asyncio.timeout(self._config.handoff_timeout):
                return await asyncio.wrap_future(opening)
        except (TransferError, TimeoutError) as error:
            opening.add_done_callback(close_late)
            raise HandoffFailed(str(error) or "the decode worker cannot be reached", again=False) from error
        except asyncio.CancelledError:
            opening.add_done_callback(close_late)
            raise

    async def _push(self, handoff: Outgoing, reserved: Reserved, session: Session) -> None:
        """Send blocks as they are computed, until all of the prompt's lie in the peer's arena."""
        sent = reserved.have_blocks
        handoff.pushing = True
        try:
            while sent < handoff.prompt_blocks or handoff.first_token is None:
                if handoff.verdict.done():
                    handoff.verdict.result()
                ready = handoff.computed
                if ready > sent:
                    moves = [Move(handoff.blocks[i], reserved.blocks[i]) for i in range(sent, ready)]
                    await self._push_now(handoff, session, moves, sent)
                    sent = ready
                    self._peers.send(handoff.decode, Written(handoff.ticket, sent))
                    continue
                handoff.changed.clear()
                await handoff.changed.wait()
            if sent == reserved.have_blocks or handoff.checksums_from(reserved.have_blocks) is None:
                await self._in_thread(handoff, partial(self._pusher.send, handoff, session, [], sent, None))
        except TransferError as error:
            raise HandoffFailed(str(error), again=True) from error
        except TimeoutError:
            limit = self._config.handoff_timeout
            raise HandoffFailed(f"the decode worker took no data for {limit:g} s", again=False) from None
        finally:
            handoff.pushing = False

    async def _push_now(self, handoff: Outgoing, session: Session, moves: list[Move], first: int) -> None:
        begin, peer = asyncio.get_running_loop().time(), handoff.decode.worker
        size = len(moves) * self._card.layout.block_bytes
        codec = None
        if handoff.round == 1:  # whatever went wrong with coded blocks does not go wrong twice
            codec = self._coding.codec_for(size, self.links.wire_rate(peer, handoff.transport))
        sent = await self._in_thread(handoff, partial(self._pusher.send, handoff, session, moves, first, codec))
        self.bytes_sent[handoff.transport] += sent.wire_bytes
        self.links.crossed(peer, handoff.transport, sent.wire_bytes, sent.link_s)
        self.links.pushed(peer, size, asyncio.get_running_loop().time() - begin)
        if handoff.first_token is not None:
            handoff.late_bytes += size

    async def _commit(self, handoff: Outgoing, reserved: Reserved) -> None:
        checksums = handoff.checksums_from(reserved.have_blocks)
        assert handoff.first_token is not None and checksums is not None
        commit = Commit(
            handoff.ticket,
            handoff.first_token,
            Manifest(
                fingerprint=self._card.fingerprint,
                layout=self._card.layout,
                source_epoch=self._peers.address.epoch,
                target_epoch=reserved.epoch,
                attempt=handoff.submission.attempt,
                tokens=len(handoff.tokens),
                have_blocks=reserved.have_blocks,
                hashes=handoff.hashes,
                checksums=checksums,
            ),
        )
        deadline = asyncio.get_running_loop().time() + self._config.handoff_timeout
        while asyncio.get_running_loop().time() < deadline:
            self._peers.send(handoff.decode, commit)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPEAT_S):
                    return await asyncio.shield(handoff.verdict)
        self._peers.forget(handoff.decode)
        raise VerdictLost

    async def _in_thread(self, handoff: Outgoing, call: Callable[[], T]) -> T:
        """Run a blocking transfer call, for as long as a handoff may go without a sign of life."""
        with self._threads.of(handoff.decode.epoch) as threads:
            async with asyncio.timeout(self._config.handoff_timeout):
                return await asyncio.get_running_loop().run_in_executor(threads, call)
