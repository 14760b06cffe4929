"""The life of requests at the router: admitted, queued, placed, followed, placed again when a worker fails."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from bascule.clock import Clock
from bascule.config import RoutingConfig
from bascule.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, WorkerFailure
from bascule.policies.route import Policy, policy_named
from bascule.router.client import WorkerClient
from bascule.router.flight import Flight
from bascule.router.view import ClusterView, Member
from bascule.types import ClusterState, ModelCard, Request, RequestId, RouteQuery, WorkerId
from bascule.wire import Failed, StepTokens, Submit, TokenItem

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Placements of one request, the first included, before a worker's failure becomes the request's."""

GAP_S = 5.0
"""Seconds that a stream may lack a token while later ones are there; a connection that broke has lost it."""

NO_SECOND_HAND = (
    "an output that has begun with sampling, or with penalties that count the output, is not continued on an engine "
    "with other random numbers; send the request again"
)


class Service:
    """The `Backend` behind the api. Everything runs in one asyncio loop; nothing here waits for a worker."""

    def __init__(self, view: ClusterView, config: RoutingConfig, clock: Clock) -> None:
        self.view = view
        self.clients: dict[WorkerId, WorkerClient] = {}
        self._config = config
        self._clock = clock
        self._policy: Policy = policy_named(config.policy, config.balance)
        self._flights: dict[RequestId, Flight] = {}
        self._queue: deque[Flight] = deque()
        self._attached: set[WorkerId] = set()
        """Ids of attached servers, of earlier ones too."""

    # ------------------------------------------------------------ what the api calls

    @property
    def card(self) -> ModelCard | None:
        return self.view.card

    @property
    def ready(self) -> bool:
        return any(not member.suspect for member in self.view.members.values())

    @property
    def kv_tokens(self) -> int:
        return self.view.kv_tokens

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return len(self._flights)

    async def start(self, request: Request) -> Flight:
        """Admit a request and return when its first tokens are there; see `Backend.start` for what it raises."""
        if request.id in self._flights:
            raise InvalidRequest(f"a request with id {request.id} is under way; use another X-Request-Id")
        if not self.ready:
            raise Unavailable("no worker is ready; see /ready, and try again in a few seconds")
        flight = Flight(request, self._clock.now() + request.timeout, self._cancelled)
        self._queue.append(flight)
        self._flights[request.id] = flight
        self._dispatch()
        if flight.placed is None and len(self._queue) > self._config.queue_limit:
            self._forget(flight)
            raise Overloaded(
                f"{self._config.queue_limit} requests wait already; try again later or raise --queue-limit",
                retry_after=1.0,
            )
        try:
            await flight.first()
        except asyncio.CancelledError:
            flight.cancel()
            raise
        return flight

    def state(self) -> ClusterState:
        return ClusterState(
            workers=self.view.statuses(),
            queued=len(self._queue),
            active=len(self._flights) - len(self._queue),
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
        for flight in list(self._flights.values()):
            if flight.needs(member.id):
                self._again(flight, member.id, f"worker {member.id} {why}")
        self._dispatch()

    def tokens(self, message: StepTokens) -> None:
        """All tokens of one step of one worker."""
        freed = False
        for item in message.items:
            flight = self._flights.get(item.request)
            if flight is None or flight.attempt != item.attempt:
                self._stop_stray(message.worker, item)
                continue
            if flight.placed is None:
                continue
            if message.worker not in (flight.placed.prefill, flight.placed.decode) or not flight.take(item):
                continue
            flight.handed_over |= message.worker == flight.placed.decode
            if flight.prefilling:
                freed |= self._settle_prefill(flight)
            if flight.ended:
                self._forget(flight)
                freed = True
        if freed:
            self._dispatch()

    def failed(self, message: Failed) -> None:
        flight = self._flights.get(message.request)
        if flight is None or flight.attempt != message.attempt or not flight.needs(message.worker):
            return
        if message.retryable:
            self._again(flight, message.worker, message.message)
        else:
            self._end_with(flight, WorkerFailure(f"worker {message.worker}: {message.message}"))
        self._dispatch()

    def unsent(self, worker: WorkerId, submission: Submit) -> None:
        """A submission did not reach its worker, which is not connected."""
        flight = self._flights.get(submission.request)
        if flight is not None and flight.attempt == submission.attempt and flight.placed is not None:
            self._again(flight, worker, f"worker {worker} is not connected")
            self._dispatch()

    def tick(self) -> None:
        """Called a few times a second: ends requests whose deadline has passed, and retries those that lost a token."""
        now = self._clock.now()
        for flight in list(self._flights.values()):
            if flight.gap_outlasts(now, GAP_S) and flight.placed is not None:
                self._again(flight, flight.placed.decode, "a token of the stream was lost")
        for flight in [flight for flight in self._flights.values() if now >= flight.deadline]:
            self._stop_workers(flight)
            self._end_with(
                flight,
                DeadlineExceeded(
                    f"the request took longer than its limit of {flight.request.timeout:g} s; "
                    "send X-Request-Timeout with a larger one, or ask for fewer tokens",
                    code="timeout",
                ),
            )
        self._end_stranded()
        self._dispatch()

    # ------------------------------------------------------------ inside

    def _dispatch(self) -> None:
        """Place waiting requests, first come first served, while the policy finds room."""
        while self._queue:
            flight = self._queue[0]
            decision = self._policy(self.view.snapshot(), self._query(flight))
            if decision.placement is None:
                return
            self._queue.popleft()
            log.debug("request %s attempt %d: %s", flight.request.id, flight.attempt, decision.reason)
            self.view.place(decision.placement, flight.known_tokens)
            flight.place(decision.placement)
            decode = self.view.members[decision.placement.decode].registration.peer
            self.clients[decision.placement.prefill].submit(
                Submit(
                    request=flight.request.id,
                    attempt=flight.attempt,
                    prompt=flight.request.prompt,
                    generated=tuple(flight.tokens),
                    sampling=flight.request.sampling,
                    decode=decode if decision.placement.remote else None,
                )
            )

    def _query(self, flight: Flight) -> RouteQuery:
        return RouteQuery(
            request=flight.request.id,
            prompt_tokens=flight.known_tokens,
            max_tokens=flight.request.sampling.max_tokens,
            excluded=flight.excluded,
            portable=flight.portable,
        )

    def _again(self, flight: Flight, failed: WorkerId, why: str) -> None:
        """Place a request anew, at the head of the queue, behind the tokens its client has."""
        self._stop_workers(flight)
        if flight.placed is not None and flight.placed.decode in self._attached and _drawn_at_random(flight):
            self._end_with(flight, WorkerFailure(f"{why}; {NO_SECOND_HAND}"))
            return
        self._unplace(flight)
        flight.retry(failed)
        if flight.attempt >= MAX_ATTEMPTS:
            self._end_with(flight, WorkerFailure(f"{why}; tried {MAX_ATTEMPTS} times"))
            return
        log.warning("request %s is placed again (attempt %d): %s", flight.request.id, flight.attempt, why)
        self._queue.appendleft(flight)

    def _end_stranded(self) -> None:
        """End what only workers of our own can continue where none is left but attached servers: it would wait in vain
        at the head of the queue, and all others behind it."""
        members = self.view.members.values()
        if self._queue and members and all(member.attached for member in members):
            for flight in [flight for flight in self._queue if not flight.portable]:
                self._end_with(flight, WorkerFailure(f"no worker is left but attached servers; {NO_SECOND_HAND}"))

    def _cancelled(self, flight: Flight) -> None:
        self._stop_workers(flight)
        self._forget(flight)
        self._dispatch()

    def _end_with(self, flight: Flight, error: WorkerFailure | DeadlineExceeded) -> None:
        self._forget(flight)
        flight.fail(error)

    def _stop_workers(self, flight: Flight) -> None:
        if flight.placed is not None:
            for worker in {flight.placed.prefill, flight.placed.decode}:
                if (client := self.clients.get(worker)) is not None:
                    client.cancel(flight.request.id, flight.attempt)

    def _stop_stray(self, worker: WorkerId, item: TokenItem) -> None:
        """A worker still runs what has ended here: say again that it may stop."""
        if item.finish is None and (client := self.clients.get(worker)) is not None:
            client.cancel(item.request, item.attempt)

    def _forget(self, flight: Flight) -> None:
        self._unplace(flight)
        if self._flights.pop(flight.request.id, None) is not None and flight in self._queue:
            self._queue.remove(flight)

    def _unplace(self, flight: Flight) -> None:
        """Take the request off its workers' counts."""
        if flight.placed is not None:
            self._settle_prefill(flight)
            self.view.decoded(flight.placed)
            flight.placed = None

    def _settle_prefill(self, flight: Flight) -> bool:
        """The prefill of this attempt is over, if it was not before; returns whether that freed room."""
        if flight.placed is None or not flight.prefilling:
            return False
        flight.prefilling = False
        self.view.prefilled(flight.placed, flight.placed_tokens)
        return True


def _drawn_at_random(flight: Flight) -> bool:
    """Whether its client has tokens that only the engine that drew them could go on from, as the seed wants it."""
    return bool(flight.tokens) and flight.request.sampling.temperature > 0
