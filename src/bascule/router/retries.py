"""Keeps account of failures: which requests may be placed again, and which workers get nothing for a while."""

from __future__ import annotations

import logging
import math
from collections import Counter

from bascule.policies.retry import Budget, Cause, exhausted, rest_s, seems_hung
from bascule.router.flight import Flight
from bascule.router.view import ClusterView
from bascule.types import Placement, WorkerId

log = logging.getLogger(__name__)

GAP_S = 5.0
"""Seconds that a stream may lack a token while later ones are there; a connection that broke has lost it."""
UNNAMED_BEATS = 8
"""Heartbeats in which none of its workers says that it has a request, until that counts as lost on the way: it has not
come there, or the end of it not here."""


class Retries:
    """One for a router; `now` is in the clock's seconds."""

    def __init__(self, view: ClusterView) -> None:
        self.counts: Counter[str] = Counter()
        """Requests placed again, by `Cause`; `refused` are those for which no tries were left in the budget."""
        self.rests: Counter[str] = Counter()
        """How often each worker was left alone for failing."""
        self._view = view
        self._budget = Budget()
        self._heard: dict[WorkerId, float] = {}
        """When each worker last brought a token."""

    def refused(self, flight: Flight, cause: Cause, failed: WorkerId | None, now: float) -> str:
        """Why a request whose attempt has just ended is not placed again; empty if it is."""
        if cause is Cause.FAILED and failed is not None:
            self._struck(failed, flight.placed_at, now)
        if exhausted(flight.failures, flight.losses):
            return f"tried {flight.failures + flight.losses} times"
        if cause is Cause.FAILED and not self._budget.spend():
            self.counts["refused"] += 1
            return "not tried again, for too many requests fail at present: see the workers' logs, and send it again"
        self.counts[cause] += 1
        return ""

    def waited_in_vain(self, flight: Flight, now: float) -> None:
        """A request is about to be given up, by its time limit or its client. A worker whose heartbeats go on may hang
        all the same; that it was silent for so long is told by what it brought of all its requests."""
        if flight.placed is None or not (flight.prefilling or flight.handed_over):
            return  # of a handoff under way, nobody knows here who holds it up
        worker, since = flight.placed.prefill, flight.placed_at
        if flight.handed_over:
            worker, since = flight.placed.decode, max(since, flight.latest_at)
        terms = flight.expected
        expected_s = terms.queue_s + terms.load_s + terms.prefill_s
        if seems_hung(now - max(since, self._heard.get(worker, since)), expected_s):
            self._struck(worker, flight.placed_at, now)

    def _struck(self, worker: WorkerId, placed_at: float, now: float) -> None:
        """A worker has failed a request. If that was placed before the worker's latest rest, it says nothing new."""
        member = self._view.members.get(worker)
        if member is None or placed_at <= member.rested_at:
            return
        member.strikes += 1
        if (seconds := rest_s(member.strikes)) > 0:
            log.warning("worker %s failed %d requests in a row; it gets none for %g s", worker, member.strikes, seconds)
            self.rests[worker] += 1
            member.rested_at = now
            self._view.rest(member, max(member.rest_until, now + seconds), now)

    def placed(self, placement: Placement, now: float) -> None:
        """A request goes to workers. One that failed many gets no other until this one has come to something."""
        for worker in {placement.prefill, placement.decode}:
            member = self._view.members[worker]
            if (seconds := rest_s(member.strikes)) > 0:
                self._view.rest(member, now + seconds, now)

    def brought(self, flight: Flight, worker: WorkerId, now: float) -> None:
        """A worker has brought the latest tokens of a request: it works, once that is decoding, or the end."""
        self._heard[worker] = now
        if flight.ended:
            self._budget.earn()
        if flight.placed is not None and not flight.handed_over and (flight.ended or worker == flight.placed.decode):
            for one in {flight.placed.prefill, worker}:
                self._proved(one, now)

    def _proved(self, worker: WorkerId, now: float) -> None:
        member = self._view.members.get(worker)
        if member is None or not member.strikes:
            return
        if rest_s(member.strikes) and member.rest_until < math.inf:
            log.warning("worker %s works again", worker)
            self._view.rest(member, now, now)
        member.strikes = 0

    def unheard(self, flight: Flight, now: float) -> str:
        """What shows that something of a request's attempt was lost on the way; empty if nothing does."""
        if flight.placed is None:
            return ""
        if flight.gap_outlasts(now, GAP_S):
            return "a token of the stream was lost"
        attempt = flight.request.id, flight.attempt
        members = [member for worker in flight.needed() if (member := self._view.members.get(worker)) is not None]
        for member in members:
            if member.runs is None or attempt in member.runs:
                flight.unnamed.clear()
                return ""
        beats = [one.pulse.beats - flight.unnamed.setdefault(one.id, one.pulse.beats) for one in members]
        return "no worker has it any more: a message was lost" if min(beats, default=0) >= UNNAMED_BEATS else ""
