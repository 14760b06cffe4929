"""The life of requests at the router: admitted, queued, placed, followed, placed again when a worker fails."""

from __future__ import annotations

import logging
import math
from collections import Counter

from msgspec.structs import replace

from bascule.clock import Clock
from bascule.config import RoutingConfig
from bascule.errors import InvalidRequest, RequestError, Unavailable, WorkerFailure
from bascule.observe.state import ClusterState
from bascule.policies.admit import LATE_S, has_room, is_late, worth_starting
from bascule.policies.order import place_in_line
from bascule.policies.retry import Cause
from bascule.policies.route import priced
from bascule.policies.snapshot import Candidate, Decision
from bascule.router.admission import Door
from bascule.router.client import WorkerClient
from bascule.router.flight import Flight
from bascule.router.journal import Journal
from bascule.router.line import FIRST, Line
from bascule.router.policy import PlugIn, orders_by_work, policy_named
from bascule.router.queries import Queries
from bascule.router.refusals import NO_SECOND_HAND, OTHER_WEIGHTS, overloaded, stranded, too_late
from bascule.router.relay import Relay
from bascule.router.retries import Retries
from bascule.router.tallies import Tallies
from bascule.router.view import ClusterView, Member
from bascule.types import ModelCard, Request, RequestId, Slo, WorkerId
from bascule.wire import Failed, Loaded, Saved, StepTokens, Submit

log = logging.getLogger(__name__)

BACK_S = 30.0
"""A worker that has ended because it was asked to is probably started again: for so long requests wait for it."""


class Service:
    """The `Backend` behind the api. Everything runs in one asyncio loop; nothing here waits for a worker."""

    def __init__(
        self,
        view: ClusterView,
        config: RoutingConfig,
        clock: Clock,
        slo: Slo = Slo(),
        journal: Journal | None = None,
    ) -> None:
        """`slo` is what requests are to meet that ask for nothing else; raises ConfigError for an unknown policy."""
        self.view = view
        self.clients: dict[WorkerId, WorkerClient] = {}
        self.journal = journal or Journal(config.policy)
        self._config = config
        self._clock = clock
        self._policy = policy_named(config.policy, config.balance)
        self._by_work = orders_by_work(config.policy)
        self._holds_back = self._by_work or config.admission == "slo"
        """Requests wait rather than break the TPOT of others."""
        self._queries = Queries(view, slo, config.handoff)
        self._flights: dict[RequestId, Flight] = {}
        self._line = Line()
        self._door = Door(config, self._queries, self._line)
        self.relay = Relay(view)
        self.retries = Retries(view)
        self.tallies = Tallies(view)
        self._attached: set[WorkerId] = set()
        """Ids of attached servers, of earlier ones too."""
        self._back_by = -math.inf
        """Until then a worker that has left in order is expected back, and requests wait for it."""

    # ------------------------------------------------------------ what the api calls

    @property
    def card(self) -> ModelCard | None:
        return self.view.card

    @property
    def ready(self) -> bool:
        return self.view.ready

    @property
    def draining(self) -> bool:
        return not self.ready and (self.view.draining or self._clock.now() < self._back_by)

    @property
    def kv_tokens(self) -> int:
        return self.view.kv_tokens

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return len(self._flights)

    async def start(self, request: Request) -> Flight:
        """Admit a request and return when its first tokens are there; see `Backend.start` for what it raises."""
        flight = self.admit(request)
        await flight.first()
        return flight

    def admit(self, request: Request) -> Flight:
        """Take a request in, and place it if there is room; raises as `start` does where it is turned away at once."""
        if request.id in self._flights:
            raise InvalidRequest(f"a request with id {request.id} is under way; use another X-Request-Id")
        if not self.ready and not self.draining:
            raise Unavailable("no worker is ready; see /ready, and try again in a few seconds")
        now = self._clock.now()
        flight = Flight(request, now, now + request.timeout, self._cancelled)
        self._flights[request.id] = flight
        self._queries.prepare(flight)
        self.journal.opened(flight, self._queries.slo_of(flight))
        if len(self._line) or not self._try(flight):
            self._wait(flight)
        if flight in self._line and (refusal := self._stranded(flight) or self._door.refusal(flight, now)) is not None:
            self._end_with(flight, refusal)
            raise refusal
        flight.let_in = True
        return flight

    def state(self) -> ClusterState:
        return ClusterState(
            workers=self.view.statuses(self.needed()),
            queued=len(self._line),
            active=len(self._flights) - len(self._line),
            routing=self.journal.figures(self._policy.failures if isinstance(self._policy, PlugIn) else 0),
            kv_faults=dict(self.view.kv_faults),
            index_violations=len(self.view.audit.violations),
            store_handoffs=self.relay.count,
            retries=dict(self.retries.counts),
            rests=dict(self.retries.rests),
            totals=self.tallies.totals(),
            store_blocks=self.tallies.store_blocks(),
        )

    # ------------------------------------------------------------ what members report

    def joined(self, member: Member, client: WorkerClient) -> None:
        self.clients[member.id] = client
        if member.attached:
            self._attached.add(member.id)
        self._dispatch()

    def lost(self, member: Member, why: str) -> None:
        """A worker is gone for good (and off the view): what ran there goes on elsewhere."""
        self.clients.pop(member.id, None)
        if member.leaving and member.drained:
            self._back_by = self._clock.now() + BACK_S
        for flight in list(self._flights.values()):
            if flight.needs(member.id):
                self._again(flight, Cause.LOST, f"worker {member.id} {why}", member.id)
        self._dispatch()

    def needed(self) -> Counter[WorkerId]:
        """How many requests use each worker: cannot go on without it, or fetch from it."""
        return Counter(worker for flight in self._flights.values() for worker in flight.uses())

    def move_away(self, worker: WorkerId) -> None:
        """Place anew what needs that worker; what could go on nowhere else now stays."""
        takers = self.view.takers(besides=worker)
        for flight in list(self._flights.values()) if takers else ():
            if flight.needs(worker) and not self._bound(flight) and stranded(flight, takers) is None:
                self._again(flight, Cause.MOVED, f"worker {worker} is drained, and its time is over")
        self._dispatch()

    def tokens(self, message: StepTokens) -> None:
        """All tokens of one step of one worker."""
        freed, now, worker = False, self._clock.now(), message.worker
        for item in message.items:
            flight = self._flights.get(item.request)
            if flight is None or flight.attempt != item.attempt:
                if item.finish is None and (client := self.clients.get(worker)) is not None:
                    client.cancel(item.request, item.attempt)  # it still runs what has ended here: say again
                continue
            placed = flight.placed
            if placed is None or worker not in (placed.prefill, placed.decode) or not flight.take(item):
                continue
            if (gap := now - flight.latest_at) > flight.longest_gap_s:  # the first token's is minus infinity
                flight.longest_gap_s = gap
            flight.latest_at = now
            self.retries.brought(flight, worker, now)
            self.relay.brought(flight, worker, now)
            flight.handed_over |= worker == placed.decode
            if flight.prefilling:
                self.tallies.prefilled(flight)
                flight.first_at = min(flight.first_at, now)
                self.view.arrived(placed, flight.uncached, flight.expected, now - flight.placed_at)
                freed |= self._settle_prefill(flight)
            if flight.ended:
                self._queries.ended(flight)
                self._forget(flight)
                self.journal.ended(flight, now)
                freed = True
        if freed:
            self._dispatch()

    def loaded(self, message: Loaded) -> None:
        """KV of a request's prompt came from the store."""
        if (flight := self._current(message)) is not None:
            flight.kv.loaded(message.brought)

    def saved(self, message: Saved) -> None:
        """The KV of a request's first leg is in the store."""
        if (flight := self._current(message)) is None:
            return
        if flight.first_leg and flight.prefilling:  # its one token was sent before this, and nothing comes after it
            self._again(flight, Cause.UNHEARD, "its first token was lost", message.worker)
            self._dispatch()
            return
        self._send_second_leg(flight, message)
        flight.kv.saved(message.bytes)

    def failed(self, message: Failed) -> None:
        if (flight := self._current(message)) is None or not flight.needs(message.worker):
            return
        cause = flight.refused(message)
        if cause is Cause.MOVED and (error := self._stranded(flight)) is not None:
            self._end_with(flight, error)
        elif message.retryable:
            self._again(flight, cause, message.message, message.failing or message.worker)
        else:
            self._end_with(flight, WorkerFailure(f"worker {message.worker}: {message.message}"))
        self._dispatch()

    def unsent(self, worker: WorkerId, submission: Submit) -> None:
        """A submission did not reach its worker, which is not connected."""
        if (flight := self._current(submission)) is not None and flight.placed is not None:
            self._again(flight, Cause.MOVED, f"worker {worker} is not connected")
            self._dispatch()

    def tick(self) -> None:
        """Called a few times a second: ends requests whose deadline has passed, and retries those that lost a token."""
        now = self._clock.now()
        for flight in list(self._flights.values()):
            if (lost := self.retries.unheard(flight, now)) and flight.placed is not None:
                self._again(flight, Cause.UNHEARD, lost, flight.placed.decode)
        for flight in [flight for flight in self._flights.values() if now >= flight.deadline]:
            self.retries.waited_in_vain(flight, now)
            self._stop_workers(flight)
            self._end_with(flight, too_late(flight))
        for flight in self.relay.overdue(now):
            self._send_second_leg(flight)
        for flight in [flight for flight in self._flights.values() if flight in self._line]:
            if (error := self._stranded(flight)) is not None:
                self._end_with(flight, error)
        self._dispatch()

    # ------------------------------------------------------------ inside

    def _current(self, message: Loaded | Saved | Failed | Submit) -> Flight | None:
        """The request whose current attempt a message is about."""
        flight = self._flights.get(message.request)
        return flight if flight is not None and flight.attempt == message.attempt else None

    def _wait(self, flight: Flight) -> None:
        """Put a new request in line, and see who is next if others were there."""
        work_s = self._queries.work_s(flight)
        due = self._queries.due(flight) if self._by_work else flight.received
        self._line.push(flight, place_in_line(flight.request.priority, work_s if self._by_work else 0.0, due), work_s)
        if len(self._line) > 1:
            self._dispatch()

    def _dispatch(self) -> None:
        """Place waiting requests, each in its turn, while the policy finds room."""
        while (flight := self._line.head()) is not None and self._try(flight):
            pass

    def _try(self, flight: Flight) -> bool:
        """Place who is next: False if it has to wait. It must not stand in the way of others, whatever is wrong."""
        try:
            return self._place_next(flight)
        except Exception as error:
            log.exception("request %s could not be placed", flight.request.id)
            self._stop_workers(flight)
            self._end_with(flight, WorkerFailure(f"it could not be placed: {type(error).__name__}: {error}"))
            return True

    def _place_next(self, flight: Flight) -> bool:
        """Place or refuse the head of the line, or move it back; False if it has to wait, and all others behind it."""
        if flight.weights != self.view.weights.fingerprint:
            if bound := self._bound(flight):
                self._end_with(flight, WorkerFailure(bound))
                return True
            self._queries.prepare(flight)
        now = self._clock.now()
        snapshot = self._queries.snapshot(flight, now)
        query = self._queries.query(flight, now, self._line.others_s(flight))
        decision = self._policy(snapshot, query)
        if decision.placement is None:
            self.journal.waits(flight, decision.reason)
            return False
        chosen = decision.chosen() or priced(snapshot, query, decision.placement)
        late = self._by_work and not flight.tokens and len(self._line) > 1 and is_late(query, chosen)
        if late and self._line.demote(flight, LATE_S):
            return True
        if self._holds_back and not has_room(snapshot, query, chosen, self._queries.slo):
            self.journal.waits(flight, "one stream more would break the TPOT of those that decode")
            return False
        asks = self._config.admission == "slo" and not flight.let_in
        if asks and not (verdict := worth_starting(snapshot, query, chosen)).admitted:
            self.journal.decided(flight, decision, chosen, now, taken=False)
            self._end_with(flight, overloaded(verdict))
            return True
        self._line.place(flight, now)
        self._place(flight, decision, chosen, now)
        return True

    def _place(self, flight: Flight, decision: Decision, chosen: Candidate, now: float) -> None:
        placement = chosen.placement
        log.debug("request %s attempt %d: %s", flight.request.id, flight.attempt, decision.reason)
        uncached = flight.known_tokens - chosen.cached_tokens
        context = flight.known_tokens + self._queries.output_tokens(flight) / 2
        self.journal.decided(flight, decision, chosen, now)
        self.view.place(placement, uncached, context, now)
        self.retries.placed(placement, now)
        self.view.expect(placement, flight.hashes, now)
        flight.place(placement, uncached, context, chosen.fetch_from)
        flight.placed_at, flight.expected = now, chosen.predicted
        submission = replace(
            flight.submission(now),
            decode=self.view.members[placement.decode].registration.peer if placement.remote else None,
            stored_tokens=chosen.cached_tokens if chosen.loaded_tokens and not chosen.fetch_from else 0,
            fetch=self.view.lender(chosen),
        )
        if chosen.handed_by is not None:
            submission = self.relay.first_leg(flight, submission, placement, chosen.handed_by, now)
        self.clients[placement.prefill].submit(submission)

    def _send_second_leg(self, flight: Flight, saved: Saved | None = None) -> None:
        if (submission := self.relay.second_leg(flight, self._clock.now(), saved)) is not None and flight.placed:
            self.clients[flight.placed.decode].submit(submission)

    def _again(self, flight: Flight, cause: Cause, why: str, failed: WorkerId | None = None) -> None:
        """Place a request anew, at the head of the queue, behind the tokens its client has, unless it had its tries."""
        self._stop_workers(flight)
        if bound := self._bound(flight):
            self._end_with(flight, WorkerFailure(f"{why}; {bound}"))
            return
        self._unplace(flight)
        flight.retry(cause, failed)
        if refusal := self.retries.refused(flight, cause, failed, self._clock.now()):
            self._end_with(flight, WorkerFailure(f"{why}; {refusal}"))
            return
        log.warning("request %s is placed again (attempt %d): %s", flight.request.id, flight.attempt, why)
        self._queries.prepare(flight)
        self.journal.waits(flight, f"to be placed again: {why}")
        self._line.push(flight, FIRST, self._queries.work_s(flight))

    def _bound(self, flight: Flight) -> str:
        """Why its output could not go on anywhere but where it runs; empty if it could."""
        if flight.tokens and flight.weights and flight.weights != self.view.weights.fingerprint:
            return OTHER_WEIGHTS
        at_server = flight.placed is not None and flight.placed.decode in self._attached
        return NO_SECOND_HAND if at_server and flight.drawn_at_random else ""

    def _stranded(self, flight: Flight) -> RequestError | None:
        """What ends a request that no worker that is left can take: it would wait in vain, and all others behind it."""
        return None if self._clock.now() < self._back_by else stranded(flight, self.view.members.values())

    def _cancelled(self, flight: Flight) -> None:
        self.retries.waited_in_vain(flight, self._clock.now())
        self._stop_workers(flight)
        self._forget(flight)
        if flight.finish is not None:
            self._queries.ended(flight)
        self.journal.ended(flight, self._clock.now())
        self._dispatch()

    def _end_with(self, flight: Flight, error: RequestError) -> None:
        self._forget(flight)
        self.journal.ended(flight, self._clock.now(), error)
        flight.fail(error)

    def _stop_workers(self, flight: Flight) -> None:
        if flight.placed is not None:
            for worker in {flight.placed.prefill, flight.placed.decode}:
                if (client := self.clients.get(worker)) is not None:
                    client.cancel(flight.request.id, flight.attempt)

    def _forget(self, flight: Flight) -> None:
        self._unplace(flight)
        self.tallies.ended(flight)
        self._flights.pop(flight.request.id, None)
        self._line.remove(flight)

    def _unplace(self, flight: Flight) -> None:
        """Take the request off its workers' counts."""
        if flight.placed is not None:
            self._settle_prefill(flight)
            self.view.decoded(flight.placed, flight.context)
            flight.placed = None

    def _settle_prefill(self, flight: Flight) -> bool:
        """The prefill of this attempt is over, if it was not before; returns whether that freed room."""
        if flight.placed is None or not flight.prefilling:
            return False
        flight.prefilling = False
        self.view.prefilled(flight.placed, flight.uncached)
        return True
