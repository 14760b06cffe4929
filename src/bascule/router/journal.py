"""Tells the decision records and the decision log what the service decides for a request, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from bascule.errors import DeadlineExceeded, Overloaded, RequestError
from bascule.observe.decision_log import DecisionLog
from bascule.observe.decisions import Actual, Attempt, DecisionRecords, Outcome, Record
from bascule.observe.state import RoutingFigures
from bascule.policies.snapshot import Candidate, Decision
from bascule.router.flight import Flight
from bascule.types import FinishReason, Slo


class Journal:
    """One for a router."""

    def __init__(self, policy: str, log: DecisionLog | None = None, wall: Callable[[], float] = time.time) -> None:
        """`policy` is the policy's name; `wall` gives Unix time (s)."""
        self.records = DecisionRecords()
        self._policy = policy
        self._log = log
        self._wall = wall

    def opened(self, flight: Flight, slo: Slo) -> None:
        """A request has come, which is placed for these bounds; its blocks have been hashed."""
        request = flight.request
        flight.prompt_blocks = len(flight.hashes)
        flight.record = Record(
            id=request.id,
            public_id=request.public_id or request.id,
            output=request.output,
            prompt_tokens=len(request.prompt),
            max_tokens=request.sampling.max_tokens,
            slo=slo,
            session=request.session,
            priority=request.priority,
            policy=self._policy,
            arrived=self._wall(),
        )
        self.records.open(flight.record)

    def waits(self, flight: Flight, why: str) -> None:
        if flight.record is not None:
            flight.record.outcome, flight.record.note = Outcome.WAITING, why

    def decided(self, flight: Flight, decision: Decision, priced: Candidate, now: float, *, taken: bool = True) -> None:
        """A policy has chosen the placement `priced`; it is carried out if `taken`."""
        if flight.record is None:
            return
        candidates = decision.candidates
        if decision.chosen() is None:
            candidates = (priced, *candidates)
        attempt = Attempt(
            waited_s=now - flight.received,
            reason=decision.reason,
            candidates=candidates,
            chosen=priced.placement if taken else None,
        )
        self.records.decided(flight.record, attempt)

    def ended(self, flight: Flight, now: float, error: RequestError | None = None) -> None:
        """A request is over: with an error, at its last token, or because its reader left. Counts once."""
        record, flight.record = flight.record, None
        if record is None:
            return
        if isinstance(error, Overloaded):
            self.records.rejected(record, "slo" if error.code == "slo" else "queue", error.message)
        self.records.ended(record, _outcome(flight.finish, error), _actual(flight, now, error))
        if self._log is not None:
            self._log.write(record, flight.hashes[: flight.prompt_blocks])

    def figures(self, policy_failures: int) -> RoutingFigures:
        """What the metrics show."""
        lost = self._log.lost if self._log is not None else 0
        return self.records.figures(policy_failures=policy_failures, log_lost=lost)

    def close(self) -> None:
        """Write what is still to be written."""
        if self._log is not None:
            self._log.close()


def _outcome(finish: FinishReason | None, error: RequestError | None) -> Outcome:
    if error is None:
        return Outcome.CANCELLED if finish is None else Outcome.COMPLETED
    if isinstance(error, Overloaded):
        return Outcome.REJECTED
    return Outcome.TIMEOUT if isinstance(error, DeadlineExceeded) else Outcome.FAILED


def _actual(flight: Flight, now: float, error: RequestError | None) -> Actual:
    tokens = len(flight.tokens)
    several = tokens > 1
    return Actual(
        ttft_s=flight.first_at - flight.received if tokens else None,
        tpot_s=(flight.latest_at - flight.first_at) / (tokens - 1) if several else None,
        gap_s=flight.longest_gap_s if several else None,
        e2e_s=now - flight.received,
        output_tokens=tokens,
        cached_tokens=flight.kv.cached_tokens,
        loaded_tokens=flight.kv.brought.tokens,
        load_s=flight.kv.brought.seconds,
        loaded_bytes=flight.kv.brought.bytes,
        spared_s=flight.kv.brought.spared_s,
        handoff=flight.kv.handoff,
        finish=flight.finish,
        error="" if error is None else error.message,
    )
