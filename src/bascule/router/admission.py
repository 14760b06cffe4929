"""Who is turned away at the door, because he would have to wait too long; who has been let in is not turned away."""

from __future__ import annotations

from bascule.config import RoutingConfig
from bascule.errors import Overloaded
from bascule.policies.admit import worth_waiting
from bascule.router.flight import Flight
from bascule.router.line import Line
from bascule.router.queries import Queries
from bascule.router.refusals import line_full, overloaded, wait_too_long

_WAIT_SHARE = 0.5
"""Of its time limit that a request may spend in line; the rest is for its prompt and its output."""


class Door:
    """One for a router; `refusal` is asked when a request has just been put in line."""

    def __init__(self, config: RoutingConfig, queries: Queries, line: Line) -> None:
        self._limit = config.queue_limit
        self._by_slo = config.admission == "slo"
        self._queries = queries
        self._line = line

    def refusal(self, flight: Flight, now: float) -> Overloaded | None:
        """Why a request that would have to wait had better not; None if it may."""
        if len(self._line) > self._limit:
            return line_full(self._limit)
        pace = self._line.pace(now)
        if pace is not None and (wait_s := self._line.among_s(flight) / pace) > _WAIT_SHARE * (flight.deadline - now):
            return wait_too_long(flight, wait_s)
        if self._by_slo:
            query = self._queries.query(flight, now, self._line.others_s(flight))
            verdict = worth_waiting(
                self._queries.snapshot(flight, now), query, self._line.ahead_s(flight), pace, self._line.ahead(flight)
            )
            return None if verdict.admitted else overloaded(verdict)
        return None
