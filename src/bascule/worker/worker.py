"""A worker: an engine in a thread of its own, a link to the router, and both sides of handoffs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from bascule.clock import Clock
from bascule.config import HandoffConfig
from bascule.engine.core import StepResult, Work
from bascule.engine.sequence import Key
from bascule.errors import RegistrationRefused, RequestError
from bascule.kv.transfer.base import machine_id
from bascule.kv.transfer.select import open_receivers, open_senders
from bascule.types import BlockHash, Epoch, StepLoad, TicketId, WorkerLoad
from bascule.wire import (
    VERSION,
    Abort,
    Cancel,
    Commit,
    Failed,
    Goodbye,
    Heartbeat,
    Loaded,
    PeerMessage,
    Prepare,
    Register,
    Registered,
    RegistrationRefusal,
    Renew,
    Reregister,
    Resync,
    RouterMessage,
    Saved,
    StepTokens,
    Stop,
    Submit,
    TokenItem,
    Written,
)
from bascule.worker.decode_side import DecodeSide
from bascule.worker.kv_events import REPORT_S, KvReporter
from bascule.worker.learning import StepCosts
from bascule.worker.link import RouterSocket
from bascule.worker.parts import Identity, Parts
from bascule.worker.peers import Peers
from bascule.worker.prefill_side import PrefillSide
from bascule.worker.steploop import StepLoop
from bascule.worker.store_side import Brought, StoreSide

log = logging.getLogger(__name__)

_REGISTER_AGAIN_S = 1.0
_RENEW_S = 1.0
_EXPIRE_S = 0.1
_REFIT_S = 2.0


class Worker:
    """Runs until the router says stop, refuses it, or `stop` is called."""

    def __init__(
        self, identity: Identity, parts: Parts, link: RouterSocket, host: str, config: HandoffConfig, clock: Clock
    ) -> None:
        self._identity = identity
        self._parts = parts
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._registered = asyncio.Event()
        self._heartbeat_s = 0.5
        self._received = 0
        """Submissions since the router took this worker in."""
        self._peers = Peers(link.context, host, identity.worker, identity.epoch)
        self._store: StoreSide | None = None
        self._reporter = KvReporter(identity.worker, identity.epoch, parts.books, link.send, self._computed)
        self._costs = StepCosts(parts.engine, parts.cost)
        self._steps = StepLoop(parts.engine, self._stepped, self._steps_failed)
        card = parts.runner.card
        if parts.tiers is not None:
            self._store = StoreSide(
                parts.tiers, parts.engine, parts.books, parts.hasher, card.layout, self._reporter.tell, self._saved
            )
        self._senders = open_senders(parts.arena, config.transfer)
        self._prefill = PrefillSide(
            parts.engine,
            parts.arena,
            parts.hasher,
            card,
            self._peers,
            self._senders,
            config,
            on_lost=self._handoff_lost,
            wake=self._steps.wake,
            coding=parts.coding,
        )
        self._decode = DecodeSide(
            parts.engine,
            parts.arena,
            parts.hasher,
            card,
            identity.epoch,
            config,
            clock,
            answer=self._peers.answer,
            wake=self._steps.wake,
        )
        self._decode.receivers = open_receivers(
            parts.arena, config.transfer, host, self._safe_from_any_thread, parts.coding.codecs
        )

    async def run(self) -> None:
        """Serve; returns after a stop, raises RegistrationRefused when the router does not want this worker."""
        self._steps.start()
        tasks = [
            asyncio.create_task(self._link.serve(self._apply)),
            asyncio.create_task(self._peers.serve(self._peer_message)),
            asyncio.create_task(self._register()),
            asyncio.create_task(self._beat()),
            asyncio.create_task(_every(_RENEW_S, self._prefill.renew)),
            asyncio.create_task(_every(_EXPIRE_S, self._decode.expire)),
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
            await self._prefill.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(self._steps.stop, 10.0)
            if self._store is not None:
                await self._store.close()
            self._decode.close()
            for sender in self._senders.values():
                sender.close()
            self._peers.close()

    def stop(self) -> None:
        """Leave at once."""
        if not self._done.done():
            self._done.set_result(None)

    # ------------------------------------------------------------ from the router

    def _apply(self, message: RouterMessage) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            self._cancel(Key(message.request, message.attempt))
        elif isinstance(message, Registered):
            self._heartbeat_s = message.heartbeat_s
            self._registered.set()
            self._tell_all()
        elif isinstance(message, Reregister):
            self._registered.clear()
            self._received = 0
            self._reporter.pause()
        elif isinstance(message, Resync):
            self._tell_all()
        elif isinstance(message, RegistrationRefusal):
            self._end_with(RegistrationRefused(message.reason))
        elif isinstance(message, Stop):
            self.stop()

    def _tell_all(self) -> None:
        self._reporter.tell_all()
        if self._store is not None:
            self._store.tell_all()

    def _computed(self, names: Sequence[BlockHash]) -> None:
        if self._store is not None:
            self._store.computed(names)

    def _submit(self, submission: Submit) -> None:
        self._received += 1
        if self._store is None:
            self._begin(submission)
        else:
            self._store.start(submission, self._brought).add_done_callback(self._task_ended)

    def _brought(self, submission: Submit, brought: Brought | None) -> None:
        """What the store had of a prompt, if anything, is on the device."""
        if brought is not None:
            self._link.send(
                Loaded(
                    worker=self._identity.worker,
                    epoch=self._identity.epoch,
                    request=submission.request,
                    attempt=submission.attempt,
                    tokens=brought.tokens,
                    seconds=brought.seconds,
                )
            )
        self._begin(submission)

    def _saved(self, key: Key) -> None:
        self._link.send(Saved(self._identity.worker, self._identity.epoch, key.request, key.attempt))

    def _begin(self, submission: Submit) -> None:
        key = Key(submission.request, submission.attempt)
        if submission.decode is not None:
            # Before the engine has it: a step of another thread may be done with it at once.
            self._prefill.begin(submission, submission.decode)
        try:
            self._parts.engine.submit(
                Work(
                    request=submission.request,
                    attempt=submission.attempt,
                    prompt=submission.prompt,
                    generated=submission.generated,
                    sampling=submission.sampling,
                    handoff=submission.decode is not None,
                    slo=submission.slo,
                )
            )
        except RequestError as error:
            self._prefill.cancel(key)
            self._fail(key, str(error), retryable=False)
        except Exception as error:
            log.exception("a request could not be submitted")
            self._prefill.cancel(key)
            self._fail(key, f"{type(error).__name__}: {error}", retryable=True)
        self._steps.wake()

    def _cancel(self, key: Key) -> None:
        if self._store is not None:
            self._store.cancel(key)
        self._prefill.cancel(key)
        self._decode.cancel(key)
        self._parts.engine.cancel(*key)
        self._decode.grant_promises()
        self._steps.wake()

    # ------------------------------------------------------------ from peers

    def _peer_message(self, sender: Epoch, message: PeerMessage) -> None:
        if isinstance(message, Prepare | Written | Commit | Abort | Renew):
            self._decode.apply(sender, message)
        else:
            self._prefill.apply(message)

    def _safe_from_any_thread(self, ticket: TicketId) -> None:
        self._loop.call_soon_threadsafe(self._decode.safe, ticket)

    def _handoff_lost(self, key: Key, why: str) -> None:
        self._fail(key, why, retryable=True)

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
        if result.executed:
            items = tuple(
                TokenItem(
                    output.request,
                    output.attempt,
                    output.position,
                    output.token,
                    output.cached_tokens,
                    output.finish,
                    output.logprobs,
                )
                for output in result.outputs
            )
            self._link.send(StepTokens(self._identity.worker, self._identity.epoch, items, self._step_load()))
        for failure in result.failed:
            self._prefill.cancel(Key(failure.request, failure.attempt))
            self._fail(Key(failure.request, failure.attempt), failure.message, retryable=True)
        self._advance_handoffs(result)
        if any(output.finish is not None for output in result.outputs):
            self._decode.grant_promises()

    def _advance_handoffs(self, result: StepResult) -> None:
        for chunk in result.progress:
            self._prefill.progressed(chunk)
        for output in result.outputs:
            key = Key(output.request, output.attempt)
            if output.finish is not None:
                self._prefill.cancel(key)
                if self._store is not None:
                    self._store.ended(key)
            else:
                self._prefill.first_token(key, output.token)

    # ------------------------------------------------------------ to the router

    def _fail(self, key: Key, message: str, *, retryable: bool) -> None:
        if self._store is not None:
            self._store.cancel(key)
        self._link.send(
            Failed(
                worker=self._identity.worker,
                epoch=self._identity.epoch,
                request=key.request,
                attempt=key.attempt,
                message=message,
                retryable=retryable,
            )
        )

    async def _register(self) -> None:
        """Offer this worker until it is taken, and again when a new router asks for it."""
        offer = Register(
            version=VERSION,
            worker=self._identity.worker,
            epoch=self._identity.epoch,
            role=self._identity.role,
            card=self._parts.runner.card,
            device=self._identity.device,
            pid=os.getpid(),
            peer=self._peers.address,
            max_sequences=self._parts.max_sequences,
            kv_blocks=self._parts.books.num_blocks,
            machine=machine_id(),
            cost=self._parts.cost,
            stores=self._store.places() if self._store is not None else {},
        )
        while True:
            if not self._registered.is_set():
                self._link.send(offer)
            await asyncio.sleep(_REGISTER_AGAIN_S)

    async def _beat(self) -> None:
        while True:
            await self._registered.wait()
            identity = self._identity
            self._link.send(Heartbeat(identity.worker, identity.epoch, self._load(), self._reporter.sequence))
            await asyncio.sleep(self._heartbeat_s)

    def _step_load(self) -> StepLoad:
        load = self._parts.engine.load()
        prefilling, backlog = load.prefilling, load.backlog_tokens
        if self._store is not None:
            prefilling, backlog = prefilling + self._store.waiting, backlog + self._store.waiting_tokens
        return StepLoad(self._received, prefilling, backlog, load.streams, load.context_tokens)

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
            integrity_violations=len(self._steps.violations),
            handoff_bytes=dict(self._prefill.bytes_sent),
            handoff_refused=dict(self._decode.refused),
            hit_tokens=engine.hit_tokens,
            stores=self._store.loads() if self._store is not None else {},
            step=self._step_load(),
            cost=self._costs.model,
            cost_error=self._costs.error,
            links=self._prefill.links.costs(),
        )

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end_with(error)


async def _every(seconds: float, call: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        call()
