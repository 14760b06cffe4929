"""A worker in virtual time: the engine's steps, what the router says, and what is told to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from msgspec import Struct

from bascule.engine.core import EngineLimits, StepResult
from bascule.engine.sequence import Key, Work
from bascule.errors import InvalidRequest
from bascule.kv.books import Books
from bascule.sim.agenda import Agenda
from bascule.sim.engine import SimEngine, Streamed
from bascule.sim.spans import Span
from bascule.sim.text import Namer
from bascule.sim.tiers import Supplied, TierPlace, TierSide
from bascule.types import BlockHash, Brought, CostModel, Epoch, ModelCard, Role, StepLoad, WorkerId
from bascule.wire import (
    VERSION,
    Cancel,
    Failed,
    Loaded,
    PeerAddress,
    Register,
    Registered,
    Resync,
    RouterMessage,
    StepTokens,
    Submit,
    TokenItem,
    WorkerMessage,
)
from bascule.worker.kv_events import REPORT_S, KvReporter


class Kind(Struct, frozen=True, kw_only=True):
    """A class of workers: equal hardware, equal settings."""

    name: str
    cost: CostModel
    kv_tokens: int
    """Tokens that its KV memory holds."""
    max_sequences: int = 64
    chunk_tokens: int = 512
    step_tokens: int = 512


class Told(Protocol):
    """The router, as a worker knows it."""

    def tell(self, epoch: Epoch, message: WorkerMessage) -> None:
        """A message has come from a worker."""
        ...

    def streamed(self, streams: Sequence[Streamed]) -> None:
        """Tokens have come that change nothing but how many there are."""
        ...

    def span_begun(self, worker: WorkerId, span: Span) -> None:
        """A worker makes steps that it does not tell of one by one."""
        ...

    def span_ended(self, worker: WorkerId, streams: Sequence[Streamed]) -> None:
        """Its span is over, or will be with the step that runs now; this is what came until now."""
        ...


class SimWorker:
    """One worker from its start to its end."""

    def __init__(
        self,
        worker: WorkerId,
        role: Role,
        kind: Kind,
        card: ModelCard,
        machine: int,
        agenda: Agenda,
        router: Told,
        limits: EngineLimits,
        places: Sequence[TierPlace] = (),
    ) -> None:
        """`places` are the tiers of the KV store that it has."""
        self.id = worker
        self.epoch = Epoch(f"{worker}-1")
        self.role = role
        self.kind = kind
        self.machine = machine
        self.alive = True
        self.busy_s = 0.0
        """Seconds in which a step ran."""
        self.on_progress: Callable[[StepResult], None] = lambda _: None
        """Told of handoffs that came further, and of first tokens."""
        self.on_submit: Callable[[Submit], None] = lambda _: None
        """Told of a request that is to be handed over."""
        self.on_cancel: Callable[[Key], None] = lambda _: None
        self.on_freed: Callable[[], None] = lambda: None
        """Memory may have become free."""
        self._agenda = agenda
        self._router = router
        self._card = card
        self._books = Books(kind.kv_tokens // card.layout.block_size, card.layout.block_size)
        hasher = Namer(card.fingerprint, card.layout.block_size)
        self._engine = SimEngine(card, self._books, hasher, limits, kind.cost)
        self._tiers: TierSide | None = None
        self._reporter = KvReporter(
            worker, self.epoch, self._books, lambda events: router.tell(self.epoch, events), self._computed
        )
        if places:
            self._tiers = TierSide(places, card, agenda, lambda: self.engine, self._reporter.tell, self._supplied)
        self._report_due = False
        self._received = 0
        self._step = 0
        """Number of the step that runs; what was planned for another is void."""
        self._running = False
        self._begun = 0.0

    @property
    def engine(self) -> SimEngine:
        """The engine, up to now: what runs in it ends with the step that runs now."""
        engine = self._engine
        engine.moment = self._agenda.now()
        if (cut := engine.interrupt()) is not None:
            end, before = cut
            self._router.span_ended(self.id, before)
            self._end_at(end)
        return engine

    def offer(self) -> Register:
        """What it registers with."""
        return Register(
            version=VERSION,
            worker=self.id,
            epoch=self.epoch,
            role=self.role,
            card=self._card,
            device=self.kind.name,
            pid=0,
            peer=PeerAddress(self.id, self.epoch, ""),
            max_sequences=self.kind.max_sequences,
            kv_blocks=self._books.num_blocks,
            machine=f"machine-{self.machine}",
            stores=self._tiers.offers if self._tiers is not None else {},
            chunk_tokens=self.kind.chunk_tokens,
            cost=self.kind.cost,
        )

    def receive(self, message: RouterMessage) -> None:
        """A message of the router has come."""
        if not self.alive:
            return
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            self.cancel(Key(message.request, message.attempt))
        elif isinstance(message, Registered | Resync):
            self._reporter.tell_all()

    def cancel(self, key: Key) -> None:
        self.on_cancel(key)
        if self._tiers is not None:
            self._tiers.cancel(key)
        self.engine.cancel(*key)
        self.on_freed()
        self.wake()

    def wake(self) -> None:
        """Something may have become runnable."""
        if not self._running and self.alive and self._engine.has_work():
            self._begin()

    def die(self) -> None:
        """All that it has is lost."""
        self.alive = False
        self._step += 1

    def check_integrity(self) -> list[str]:
        """Every line names a lie in the books or in a sequence's state. Empty means clean."""
        return self.engine.check_integrity()

    # ------------------------------------------------------------ inside

    def _submit(self, submission: Submit) -> None:
        self._received += 1
        if self._tiers is not None:
            self._tiers.bring(submission)
        else:
            self._start(submission)

    def _computed(self, names: Sequence[BlockHash]) -> None:
        if self._tiers is not None:
            self._tiers.computed(names)

    def _supplied(self, supplied: Supplied) -> None:
        if not self.alive:
            return
        submission = supplied.submission
        if supplied.tokens:
            tokens = {str(tier): count for tier, count in supplied.tokens.items()}
            self._router.tell(
                self.epoch,
                Loaded(
                    worker=self.id,
                    epoch=self.epoch,
                    request=submission.request,
                    attempt=submission.attempt,
                    brought=Brought(tokens, supplied.seconds),
                ),
            )
        self._start(submission)

    def _start(self, submission: Submit) -> None:
        handoff = submission.decode is not None
        work = Work(
            request=submission.request,
            attempt=submission.attempt,
            prompt=submission.prompt,
            generated=submission.generated,
            sampling=submission.sampling,
            handoff=handoff,
            slo=submission.slo,
            salt=submission.salt,
            priority=submission.priority,
        )
        try:
            self.engine.submit(work)
        except InvalidRequest as error:
            self._router.tell(
                self.epoch,
                Failed(
                    worker=self.id,
                    epoch=self.epoch,
                    request=submission.request,
                    attempt=submission.attempt,
                    message=error.message,
                    retryable=False,
                ),
            )
            return
        if handoff:
            self.on_submit(submission)
        self.wake()

    def _begin(self) -> None:
        self._engine.moment = self._agenda.now()
        seconds = self._engine.begin()
        self._running = seconds is not None
        if seconds is not None:
            self._begun = self._agenda.now()
            self._end_at(self._begun + seconds)
            if self._engine.span is not None:
                self._router.span_begun(self.id, self._engine.span)

    def _end_at(self, time: float) -> None:
        self._step += 1
        self._agenda.at(time, partial(self._ended, self._step))

    def _ended(self, step: int) -> None:
        if step != self._step:
            return
        now = self._agenda.now()
        self._engine.moment = now
        self.busy_s += now - self._begun
        in_span = self._engine.span is not None
        result, before = self._engine.end()
        self._running = False
        if in_span:
            self._router.span_ended(self.id, before)
        self._publish(result)
        if self._engine.has_work():
            self._begin()

    def _publish(self, result: StepResult) -> None:
        """As a worker does: what changed in the cache before the tokens that end an output, then what it means for
        handoffs."""
        finished = any(output.finish is not None for output in result.outputs)
        if finished:
            self._reporter.tell_changes()
        elif not self._report_due:
            self._report_due = True
            now = self._agenda.now()
            self._agenda.at(REPORT_S * (math.floor(now / REPORT_S) + 1), self._report)
        items: list[TokenItem] = []
        others: list[Streamed] = []
        now = self._agenda.now()
        for output in result.outputs:
            key = Key(output.request, output.attempt)
            sequence = self._engine.sequence(key)
            if output.finish is None and sequence is not None and sequence.told:
                others.append(Streamed(key, 1, now, now, 0.0))
                continue
            if sequence is not None:
                sequence.told = True
            items.append(
                TokenItem(
                    output.request, output.attempt, output.position, output.token, output.cached_tokens, output.finish
                )
            )
        if others:
            self._router.streamed(others)
        self._router.tell(self.epoch, StepTokens(self.id, self.epoch, tuple(items), self._load()))
        if result.progress or items:
            self.on_progress(result)
        if finished:
            self.on_freed()

    def _report(self) -> None:
        self._report_due = False
        if self.alive:
            self._reporter.tell_changes()

    def _load(self) -> StepLoad:
        load = self._engine.load()
        waiting = self._tiers.waiting if self._tiers is not None else {}
        return StepLoad(
            self._received,
            load.prefilling + len(waiting),
            load.backlog_tokens + sum(waiting.values()),
            load.streams,
            load.context_tokens,
            load.slack_s,
        )
