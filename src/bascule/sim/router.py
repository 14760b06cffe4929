"""The router in virtual time: the live one's service, membership and view, with messages that come when they should."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from bascule.clock import Clock
from bascule.config import RoutingConfig
from bascule.errors import RequestError
from bascule.policies.snapshot import Snapshot
from bascule.router.flight import Flight
from bascule.router.journal import Journal
from bascule.router.link import RouterLink
from bascule.router.membership import SWEPT_BLOCKS, Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.sim.agenda import Agenda
from bascule.sim.engine import Streamed
from bascule.sim.gaps import GapCounts
from bascule.sim.spans import Span, span_seconds, steps_done
from bascule.sim.text import Namer
from bascule.sim.worker import SimWorker
from bascule.types import Epoch, LinkCost, Request, RequestId, Slo, WorkerId
from bascule.wire import RouterMessage, StepTokens, Submit, WorkerMessage

Ended = Callable[[Flight, RequestError | None], None]


class SimLink(RouterLink):
    """Brings the router's messages to the workers, some time later."""

    def __init__(self, agenda: Agenda, seconds: float) -> None:
        """A submission takes `seconds`."""
        self.address = ""
        self.workers: dict[Epoch, SimWorker] = {}
        self._agenda = agenda
        self._seconds = seconds

    def send(self, epoch: Epoch, message: RouterMessage, on_failure: Callable[[], None] | None = None) -> None:
        worker = self.workers.get(epoch)
        if worker is not None and worker.alive:
            self._agenda.after(self._seconds if isinstance(message, Submit) else 0.0, partial(worker.receive, message))
        elif on_failure is not None:
            self._agenda.after(0.0, on_failure)


class SimJournal(Journal):
    """Tells the end of each request to whoever simulates."""

    def __init__(self, policy: str, clock: Clock, ended: Ended) -> None:
        super().__init__(policy, wall=clock.now)
        self._ended = ended

    def ended(self, flight: Flight, now: float, error: RequestError | None = None) -> None:
        open_still = flight.record is not None
        super().ended(flight, now, error)
        if open_still:
            self._ended(flight, error)


class SimView(ClusterView):
    """A view that is brought up to the moment before anybody looks at it: spans are not told step by step."""

    def __init__(self) -> None:
        super().__init__(hasher=Namer)
        self._spans = np.zeros((8, 5))
        """By row: begun, first_s, more_s, steps, steps told; all 0 where there is no span."""

    def snapshot(self, now: float) -> Snapshot:
        self._tell(now, np.flatnonzero(self._spans[:, 3]))
        return super().snapshot(now)

    def span_begun(self, row: int, span: Span) -> None:
        """What runs at a row's worker is told by this from now on."""
        while row >= len(self._spans):
            self._spans = np.concatenate([self._spans, np.zeros_like(self._spans)])
        self._spans[row] = (span.begun, span.first_s, span.more_s, span.steps, 0)

    def span_ended(self, row: int, now: float) -> None:
        """Its steps that have ended by now have been told, but for the one that ends it."""
        self._tell(now, np.array([row]))
        self._spans[row] = 0.0

    def _tell(self, now: float, rows: NDArray[np.intp]) -> None:
        """Tell the columns of the steps of these rows' spans that have ended since they were last told."""
        if not len(rows):
            return
        begun, first_s, more_s, steps, told = self._spans[rows].T
        done = steps_done(now - begun, first_s, more_s, steps)
        if not (fresh := done > told).any():
            return
        rows, begun, first_s, more_s, done, told = (each[fresh] for each in (rows, begun, first_s, more_s, done, told))
        until = span_seconds(done, first_s, more_s)
        took = until - span_seconds(told, first_s, more_s)
        self.columns.streamed(rows, done - told, took, first_s + more_s * done, begun + until)
        self._spans[rows, 4] = done


class SimRouter:
    """The live router's parts around a virtual clock."""

    def __init__(self, agenda: Agenda, config: RoutingConfig, slo: Slo, link: RouterLink, ended: Ended) -> None:
        """`ended` is told of each request that is over, however; raises ConfigError for an unknown policy."""
        self.view = SimView()
        self.gaps = GapCounts()
        self._agenda = agenda
        self._on_end = ended
        self._flights: dict[RequestId, Flight] = {}
        self.service = Service(self.view, config, agenda, slo, SimJournal(config.policy, agenda, self._ended))
        self._membership = Membership(link, self.service, config, agenda)

    def lose(self, worker: SimWorker, why: str) -> None:
        """A worker is known to be gone."""
        self._membership.lost(worker.id, why)

    def admit(self, request: Request) -> Flight:
        """A request has come; raises RequestError where it is turned away at once."""
        flight = self.service.admit(request)
        if not flight.ended:
            self._flights[request.id] = flight
        return flight

    def tick(self) -> None:
        """What the router does a few times a second."""
        self.service.tick()
        self.view.index.expire(self._agenda.now())
        self.view.index.sweep(SWEPT_BLOCKS)

    # ------------------------------------------------------------ what workers tell

    def tell(self, epoch: Epoch, message: WorkerMessage) -> None:
        """A message has come from a worker."""
        if isinstance(message, StepTokens):
            now = self._agenda.now()
            for item in message.items:
                flight = self._flights.get(item.request)
                if flight is not None and flight.attempt == item.attempt and flight.latest_at < math.inf:
                    self.gaps.add(now - flight.latest_at)
        self._membership.apply(epoch, message)

    def streamed(self, streams: Sequence[Streamed]) -> None:
        """Tokens have come that change nothing but how many there are."""
        for stream in streams:
            flight = self._flights.get(stream.key.request)
            if flight is None or flight.attempt != stream.key.attempt or flight.placed is None:
                continue
            first_s = stream.first_at - flight.latest_at
            flight.longest_gap_s = max(flight.longest_gap_s, first_s, stream.last_s)
            self.gaps.add(first_s)
            if stream.tokens > 1:
                self.gaps.add((stream.last_at - stream.first_at) / (stream.tokens - 1), stream.tokens - 1)
            flight.latest_at = stream.last_at
            flight.tokens += repeat(0, stream.tokens)

    def span_begun(self, worker: WorkerId, span: Span) -> None:
        """A worker makes steps that it does not tell of one by one."""
        if (member := self.view.members.get(worker)) is not None:
            self.view.span_begun(member.row, span)

    def span_ended(self, worker: WorkerId, streams: Sequence[Streamed]) -> None:
        """Its span is over, or will be with the step that runs now; this is what came until now."""
        if (member := self.view.members.get(worker)) is not None:
            self.view.span_ended(member.row, self._agenda.now())
            self.streamed(streams)

    def learnt(self, source: WorkerId, target: WorkerId, cost: LinkCost) -> None:
        """What a handoff has shown of its link."""
        if source in self.view.members and target in self.view.members:
            self.view.links[source, target] = cost

    def _ended(self, flight: Flight, error: RequestError | None) -> None:
        self._flights.pop(flight.request.id, None)
        self._on_end(flight, error)
