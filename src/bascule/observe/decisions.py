"""Why each of the latest requests went where it did, and what came of it: the decision records."""

from __future__ import annotations

import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from msgspec import Struct

from bascule.policies.snapshot import Candidate
from bascule.types import FinishReason, Placement, RequestId, RoutingFigures, Slo, Tier

KEPT = 4096
"""Requests that are remembered; the oldest are forgotten first."""
COMPARED = 512
"""Completed requests over which the error of predictions is taken."""


class Outcome(StrEnum):
    """What became of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    REJECTED = "rejected"
    """Answered 429."""
    CANCELLED = "cancelled"
    """Its client went away."""
    TIMEOUT = "timeout"
    FAILED = "failed"


class Attempt(Struct, frozen=True, kw_only=True):
    """One decision for a request: what was compared, what was chosen, and why."""

    waited_s: float
    """From the request's arrival to this decision."""
    reason: str
    candidates: tuple[Candidate, ...]
    """The best first; the chosen one is always among them."""
    chosen: Placement | None
    """None where the request was turned away after all."""

    @property
    def winner(self) -> Candidate | None:
        """The candidate that was chosen."""
        return next((each for each in self.candidates if each.placement == self.chosen), None)


class Actual(Struct, frozen=True, kw_only=True):
    """How a request went, in seconds as the router saw it; None for what did not happen."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    gap_s: float | None = None
    """Longest gap between two deliveries."""
    e2e_s: float | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens whose KV was found."""
    loaded_tokens: dict[Tier, int] = {}
    """Those of them that came from the store, by tier."""
    load_s: float = 0.0
    """What the request waited for that at the worker, before its prompt was begun."""
    finish: FinishReason | None = None
    error: str = ""
    """What the client was told, if it was an error."""


@dataclass(slots=True)
class Record:
    """One request from its arrival on, without its prompt; attempts and outcome are filled in as it goes."""

    id: RequestId
    public_id: str
    """What its client knows it by; all outputs of one call share it."""
    output: int
    prompt_tokens: int
    max_tokens: int
    slo: Slo
    """What it is placed for: its own bounds, or the cluster's."""
    session: str
    priority: int
    policy: str
    arrived: float
    """Unix time (s)."""
    outcome: Outcome = Outcome.WAITING
    note: str = ""
    """Why it waits, or why it was rejected."""
    attempts: list[Attempt] = field(default_factory=list)
    actual: Actual = field(default_factory=Actual)

    @property
    def errors(self) -> dict[str, float]:
        """|predicted - actual| / actual by term, of a completed request that needed one placement."""
        winner = self.attempts[0].winner if len(self.attempts) == 1 else None
        if winner is None or self.outcome is not Outcome.COMPLETED:
            return {}
        predicted, actual = winner.predicted, self.actual
        pairs = {"ttft": (predicted.ttft_s, actual.ttft_s), "tpot": (predicted.tpot_s, actual.tpot_s)}
        return {term: abs(guess - was) / was for term, (guess, was) in pairs.items() if was}


class DecisionRecords:
    """The latest requests by the id that their clients know, and sums over all of them."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._by_id: dict[str, list[int]] = {}
        """Numbers of the records with one public id, the oldest first."""
        self._opened = 0
        self._errors: dict[str, deque[float]] = {}
        self._decisions: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._records)

    def open(self, record: Record) -> None:
        """Remember a request that has just come."""
        self._records[self._opened] = record
        self._by_id.setdefault(record.public_id, []).append(self._opened)
        self._opened += 1
        if len(self._records) > self._kept:
            _, oldest = self._records.popitem(last=False)
            numbers = self._by_id[oldest.public_id]
            del numbers[0]
            if not numbers:
                del self._by_id[oldest.public_id]

    def decided(self, record: Record, attempt: Attempt) -> None:
        """A decision has been made; without a chosen placement the request is about to be rejected."""
        record.attempts.append(attempt)
        if attempt.chosen is not None:
            record.outcome, record.note = Outcome.RUNNING, ""
            self._decisions["remote" if attempt.chosen.remote else "local"] += 1

    def rejected(self, record: Record, kind: str, why: str) -> None:
        """A request is turned away; `kind` is the short reason that is counted."""
        record.note = why
        self._rejected[kind] += 1

    def ended(self, record: Record, outcome: Outcome, actual: Actual) -> None:
        """A request is over; its predictions count."""
        record.outcome, record.actual = outcome, actual
        for term, error in record.errors.items():
            self._errors.setdefault(term, deque(maxlen=COMPARED)).append(error)

    def find(self, public_id: str) -> list[Record]:
        """All that is remembered of calls with that id, the oldest first; empty if nothing is."""
        return [self._records[number] for number in self._by_id.get(public_id, ())]

    def latest(self, limit: int) -> Iterator[Record]:
        """The latest requests, the newest first."""
        return islice(reversed(self._records.values()), limit)

    def figures(self, *, policy_failures: int = 0, log_lost: int = 0) -> RoutingFigures:
        """What the metrics show."""
        return RoutingFigures(
            errors={term: statistics.median(errors) for term, errors in self._errors.items()},
            decisions=dict(self._decisions),
            rejected=dict(self._rejected),
            policy_failures=policy_failures,
            log_lost=log_lost,
        )
