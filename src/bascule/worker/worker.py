"""A worker: an engine in a thread of its own, a link to the router, and both sides of handoffs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bascule.clock import Clock
from bascule.config import HandoffConfig
from bascule.engine.core import StepResult
from bascule.engine.sequence import Key
from bascule.errors import RegistrationRefused
from bascule.kv.transfer.select import open_receivers, open_senders
from bascule.link_wire import MeasureLink, Neighbours, TryReach
from bascule.peer_wire import Abort, Commit, Fetch, Fetched, PeerMessage, Prepare, Renew, Revoked, Written
from bascule.types import BlockHash, Brought, Epoch, StepLoad, TicketId, Tier, WorkerId, WorkerLoad
from bascule.wire import (
    Cancel,
    Draining,
    Failed,
    Goodbye,
    Loaded,
    Registered,
    RegistrationRefusal,
    Reregister,
    Resync,
    RouterMessage,
    Saved,
    StepTokens,
    Stop,
    Submit,
)
from bascule.worker.arrivals import Arrivals
from bascule.worker.deadlines import Deadlines
from bascule.worker.decode_side import DecodeSide
from bascule.worker.fetch import Fetches
from bascule.worker.grants import Grants
from bascule.worker.kv_events import REPORT_S, KvReporter
from bascule.worker.learning import StepCosts
from bascule.worker.lend import Lender
from bascule.worker.link import RouterSocket
from bascule.worker.link_probe import LinkProbe
from bascule.worker.neighbours import Reach
from bascule.worker.parts import Identity, Parts
from bascule.worker.peers import Peers
from bascule.worker.prefill_side import PrefillSide
from bascule.worker.standing import Standing, offer_of
from bascule.worker.steploop import LOOK_S, StepLoop, items_of
from bascule.worker.store_side import StoreSide

log = logging.getLogger(__name__)

_RENEW_S = 1.0
_DEPARTED_S = 5.0
_EXPIRE_S = 0.1
_REFIT_S = 2.0


class Worker:
    """Runs until the router says stop, refuses it, or `leave` or `stop` is called."""

    def __init__(
        self, identity: Identity, parts: Parts, link: RouterSocket, host: str, config: HandoffConfig, clock: Clock
    ) -> None:
        self._identity = identity
        self._parts = parts
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._peers = Peers(link.context, host, identity.worker, identity.epoch, link.key)
        self._reach = Reach(identity, link.send)
        self._deadlines = Deadlines(self._cancel, clock)
        self._store: StoreSide | None = None
        self._reporter = KvReporter(identity.worker, identity.epoch, parts.books, link.send, self._computed)
        self._standing = Standing(
            identity,
            link.send,
            self._load,
            lambda: self._reporter.told,
            lambda: self._arrivals.keys,
            self.stop,
            clock,
        )
        self._costs = StepCosts(parts.engine, parts.cost)
        self._steps = StepLoop(parts.engine, self._stepped, self._steps_failed, clock=clock)
        card = parts.runner.card
        if parts.tiers is not None:
            self._store = StoreSide(
                parts.tiers,
                parts.engine,
                parts.books,
                parts.hasher,
                card.layout,
                self._reporter.tell,
                self._saved,
                lambda key, brought: self._arrivals.loaded(key, brought),
                self._steps.wake,
            )
        key = link.key.transfers if link.key is not None else None
        self._senders = open_senders(parts.arena, config.transfer, key)
        self._prefill = PrefillSide(
            parts.engine,
            parts.arena,
            parts.hasher,
            card,
            self._peers,
            self._senders,
            config,
            on_lost=lambda key, why, failing: self._fail(key, why, True, failing),
            wake=self._steps.wake,
            coding=parts.coding,
            unreachable=self._reach.unreachable,
            deadlines=self._deadlines,
        )
        self._grants = Grants()
        self._decode = DecodeSide(
            parts.engine,
            parts.arena,
            parts.hasher,
            card,
            identity.epoch,
            self._grants,
            config,
            clock,
            answer=self._peers.answer,
            wake=self._steps.wake,
            deadlines=self._deadlines,
        )
        self._grants.receivers = open_receivers(
            parts.arena, config.transfer, host, self._safe_from_any_thread, parts.coding.codecs, key
        )
        self._fetches = Fetches(
            parts.engine, parts.arena, parts.books, parts.hasher, card, self._peers, self._grants, self._steps.wake
        )
        self._lender = Lender(
            parts.engine,
            parts.arena,
            parts.books,
            parts.hasher,
            card,
            self._senders,
            self._prefill.links,
            answer=self._peers.answer,
            coding=parts.coding,
            bring=self._store.bring if self._store is not None else None,
        )
        self._probe = LinkProbe(identity, parts.engine, parts.arena, card, self._peers, self._senders, send=link.send)
        self._arrivals = Arrivals(
            parts.engine,
            self._prefill,
            self._fetches,
            self._store,
            brought=self._tell_brought,
            failed=self._fail,
            task_ended=self._task_ended,
            wake=self._steps.wake,
        )

    async def run(self) -> None:
        """Serve; returns after a stop, raises RegistrationRefused when the router does not want this worker."""
        self._steps.start()
        stores = self._store.places() if self._store is not None else {}
        offer = offer_of(self._identity, self._parts, self._peers.address, stores, self._grants.tcp_addresses)
        tasks = [
            asyncio.create_task(self._link.serve(self._apply)),
            asyncio.create_task(self._link.turned_away()),
            asyncio.create_task(self._peers.serve(self._peer_message)),
            asyncio.create_task(self._standing.offer(offer)),
            asyncio.create_task(self._standing.beat()),
            asyncio.create_task(self._reach.watch()),
            asyncio.create_task(self._standing.ask_for_leave()),
            asyncio.create_task(_every(_RENEW_S, self._prefill.renew)),
            asyncio.create_task(_every(_DEPARTED_S, lambda: self._peers.forget_departed(self._reach.known))),
            asyncio.create_task(_every(_EXPIRE_S, self._decode.expire)),
            asyncio.create_task(_every(_EXPIRE_S, self._deadlines.check)),
            asyncio.create_task(_every(LOOK_S, self._steps.watch)),
            asyncio.create_task(_every(REPORT_S, self._reporter.tell_changes)),
            asyncio.create_task(_every(_REFIT_S, self._costs.refit)),
        ]
        if self._store is not None:
            tasks.append(asyncio.create_task(self._store.watch()))
        for task in tasks:
            task.add_done_callback(self._task_ended)
        try:
            await self._done
        finally:
            self._reporter.pause()
            self._link.send(Goodbye(self._identity.worker, self._identity.epoch))
            self._arrivals.close()
            await self._prefill.close()
            await self._lender.close()
            await self._probe.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(self._steps.stop, 10.0)
            if self._store is not None:
                await self._store.close()
            self._grants.close()
            for sender in self._senders.values():
                sender.close()
            self._peers.close()

    def leave(self) -> None:
        """End in order, as soon as nothing needs this worker; at once when called again."""
        self._standing.leave()

    def stop(self) -> None:
        """End at once; what runs here goes on elsewhere."""
        if not self._done.done():
            self._done.set_result(None)

    # ------------------------------------------------------------ from the router

    def _apply(self, message: RouterMessage) -> None:
        if isinstance(message, Submit):
            self._deadlines.bound(Key(message.request, message.attempt), message.timeout_s)
            self._arrivals.submit(message)
        elif isinstance(message, Cancel):
            self._cancel(Key(message.request, message.attempt))
        elif isinstance(message, Registered):
            self._standing.taken(message)
            self._tell_all()
        elif isinstance(message, Reregister):
            self._standing.forgotten()
            self._reach.forget_all()
            self._arrivals.received = 0
            self._reporter.pause()
        elif isinstance(message, Neighbours):
            self._reach.told(message)
        elif isinstance(message, TryReach):
            self._reach.asked(message)
        elif isinstance(message, Resync):
            self._tell_all()
        elif isinstance(message, MeasureLink):
            self._probe.measure(message)
        elif isinstance(message, RegistrationRefusal):
            self._end_with(RegistrationRefused(message.reason))
        elif isinstance(message, Draining):
            self._standing.heard(message)
        elif isinstance(message, Stop):
            self.stop()

    def _tell_all(self) -> None:
        self._reporter.tell_all()
        if self._store is not None:
            self._store.tell_all()

    def _computed(self, names: Sequence[BlockHash]) -> None:
        if self._store is not None:
            self._store.computed(names)

    def _tell_brought(self, key: Key, brought: Brought) -> None:
        self._link.send(
            Loaded(
                worker=self._identity.worker,
                epoch=self._identity.epoch,
                request=key.request,
                attempt=key.attempt,
                brought=brought,
            )
        )

    def _saved(self, key: Key, sizes: Mapping[Tier, int], missing: int) -> None:
        told = {tier.value: size for tier, size in sizes.items()}
        self._link.send(Saved(self._identity.worker, self._identity.epoch, key.request, key.attempt, told, missing))

    def _cancel(self, key: Key) -> None:
        self._deadlines.forget(key)
        self._arrivals.cancel(key)
        self._prefill.cancel(key)
        self._decode.cancel(key)
        self._parts.engine.cancel(*key)
        self._decode.grant_promises()
        self._steps.wake()

    # ------------------------------------------------------------ from peers

    def _peer_message(self, sender: Epoch, message: PeerMessage) -> None:
        if isinstance(message, Prepare | Written | Commit | Abort | Renew):
            self._decode.apply(sender, message)
        elif isinstance(message, Fetched):
            if not self._fetches.apply(message):
                self._decode.closed(message.ticket)
        elif isinstance(message, Fetch):
            self._lender.lend(sender, message)
        elif isinstance(message, Revoked) and self._lender.revoke(sender, message.ticket):
            pass
        elif not self._probe.apply(message):
            self._prefill.apply(message)

    def _safe_from_any_thread(self, ticket: TicketId) -> None:
        self._loop.call_soon_threadsafe(self._decode.safe, ticket)

    # ------------------------------------------------------------ from the step thread

    def _stepped(self, result: StepResult) -> None:
        """In the step thread: over to the asyncio loop, and on with the next step."""
        self._loop.call_soon_threadsafe(self._publish, result)

    def _steps_failed(self, error: Exception) -> None:
        """In the step thread: end the worker, so that its requests go elsewhere."""
        self._loop.call_soon_threadsafe(self._end_with, error)

    def _end_with(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def _publish(self, result: StepResult) -> None:
        """One message for all tokens of the step; then what the step means for handoffs."""
        if any(output.finish is not None for output in result.outputs):
            # Before the tokens: whoever answers the end of an output with its next turn finds the blocks in the index.
            self._reporter.tell_changes()
        self._arrivals.stepped(result)
        if result.executed:
            items = items_of(result)
            self._link.send(StepTokens(self._identity.worker, self._identity.epoch, items, self._step_load()))
        for failure in result.failed:
            self._prefill.cancel(Key(failure.request, failure.attempt))
            self._fail(Key(failure.request, failure.attempt), failure.message, True)
        self._advance_handoffs(result)
        if any(output.finish is not None for output in result.outputs):
            self._decode.grant_promises()

    def _advance_handoffs(self, result: StepResult) -> None:
        for chunk in result.progress:
            self._prefill.progressed(chunk)
        for output in result.outputs:
            key = Key(output.request, output.attempt)
            if output.finish is not None:
                self._deadlines.forget(key)
                self._prefill.cancel(key)
            else:
                self._prefill.first_token(key, output.token)

    # ------------------------------------------------------------ to the router

    def _fail(self, key: Key, message: str, retryable: bool, failing: WorkerId | None = None) -> None:
        self._arrivals.cancel(key)
        self._deadlines.forget(key)
        self._link.send(
            Failed(
                worker=self._identity.worker,
                epoch=self._identity.epoch,
                request=key.request,
                attempt=key.attempt,
                message=message,
                retryable=retryable,
                failing=failing,
            )
        )

    def _step_load(self) -> StepLoad:
        load = self._parts.engine.load()
        return StepLoad(
            self._arrivals.received,
            load.prefilling + self._arrivals.waiting,
            load.backlog_tokens + self._arrivals.waiting_tokens,
            load.streams,
            load.context_tokens,
            load.slack_s,
        )

    def _load(self) -> WorkerLoad:
        engine, counts = self._parts.engine.load(), self._parts.books.counts
        return WorkerLoad(
            running=engine.running,
            waiting=engine.waiting,
            kv_blocks_total=self._parts.books.num_blocks,
            kv_blocks_leased=counts.held,
            kv_blocks_cached=counts.cached,
            kv_blocks_quarantined=counts.quarantined,
            promised=self._decode.promised,
            integrity_violations=len(self._steps.violations)
            + (len(self._store.accounts.violations) if self._store else 0),
            handoff_bytes=dict(self._prefill.bytes_sent + self._lender.bytes_sent),
            handoff_refused=dict(self._decode.refused + self._grants.not_authentic),
            hit_tokens=self._arrivals.hit_tokens,
            computed_tokens=self._arrivals.computed_tokens,
            stores=self._store.loads() if self._store is not None else {},
            fetches=self._fetches.figures(),
            step=self._step_load(),
            cost=self._costs.model,
            cost_error=self._costs.error,
            links=self._prefill.links.costs(),
            unreachable=dict(self._reach.unreachable),
        )

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end_with(error)


async def _every(seconds: float, call: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        call()
