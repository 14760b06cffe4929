"""Why each of the latest requests went where it did, and what came of it: the decision records."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterator
from enum import StrEnum
from itertools import islice

from msgspec import Struct, msgpack

from bascule.observe.state import RoutingFigures
from bascule.policies.snapshot import Candidate
from bascule.types import FinishReason, Placement, RequestId, Slo, StoreHandoff

KEPT = 4096
"""Requests that are remembered once they have ended; those that ended first are forgotten first."""
REFUSED_KEPT = 512
"""Those that were answered 429, which have a place of their own: under overload they would push out all that was
served."""
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


class Attempt(Struct, frozen=True, kw_only=True, array_like=True):
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


class Actual(Struct, frozen=True, kw_only=True, array_like=True):
    """How a request went, in seconds as the router saw it; None for what did not happen."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    gap_s: float | None = None
    """Longest gap between two deliveries."""
    e2e_s: float | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens whose KV was found."""
    loaded_tokens: dict[str, int] = {}
    """Those of them that came from the store, by tier, or from a peer."""
    load_s: float = 0.0
    """What the request waited for that at the worker, before its prompt was begun."""
    loaded_bytes: dict[str, int] = {}
    """Moved for it, as they were stored or sent, used or not."""
    spared_s: float = 0.0
    """Of computing, by the worker's cost model."""
    handoff: StoreHandoff | None = None
    """What was handed over by way of the store, if that was the way; a later attempt's comes on top."""
    finish: FinishReason | None = None
    error: str = ""
    """What the client was told, if it was an error."""


class Record(Struct, kw_only=True, array_like=True):
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
    attempts: list[Attempt] = []
    actual: Actual = Actual()

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
    """The latest requests by the id that their clients know, and sums over all of them.

    Who has ended is kept packed, in two fifths of the bytes: each look at it gives a new record, equal to what it was.
    """

    def __init__(self, kept: int = KEPT, refused_kept: int = REFUSED_KEPT) -> None:
        """The first `kept` is of requests that ended otherwise than refused."""
        self._records: dict[int, Record | _Packed] = {}
        """By their numbers, in the order they came in."""
        self._by_id: dict[str, tuple[int, ...]] = {}
        """Numbers of the records with one public id, the oldest first."""
        self._under_way: dict[RequestId, int] = {}
        self._served = _Ring(kept)
        self._refused = _Ring(refused_kept)
        self._opened = 0
        self._errors: dict[str, deque[float]] = {}
        self._decisions: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._records)

    def open(self, record: Record) -> None:
        """Remember a request that has just come, at least until it has ended."""
        number, self._opened = self._opened, self._opened + 1
        self._records[number] = record
        self._under_way[record.id] = number
        self._by_id[record.public_id] = (*self._by_id.get(record.public_id, ()), number)

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
        """A request is over, and its record does not change any more; its predictions count."""
        record.outcome, record.actual = outcome, actual
        for term, error in record.errors.items():
            self._errors.setdefault(term, deque(maxlen=COMPARED)).append(error)
        if (number := self._under_way.pop(record.id, None)) is not None:
            self._records[number] = _packed(record)
            ring = self._refused if outcome is Outcome.REJECTED else self._served
            if (oldest := ring.push(number)) is not None:
                self._forget(oldest)

    def find(self, public_id: str) -> list[Record]:
        """All that is remembered of calls with that id, the oldest first; empty if nothing is."""
        return [_unpacked(self._records[number]) for number in self._by_id.get(public_id, ())]

    def latest(self, limit: int) -> Iterator[Record]:
        """The latest requests, the newest first, as of now: it may be read on while others come."""
        return map(_unpacked, list(islice(reversed(self._records.values()), limit)))

    def figures(self, *, policy_failures: int = 0, log_lost: int = 0) -> RoutingFigures:
        """What the metrics show."""
        return RoutingFigures(
            errors={term: statistics.median(errors) for term, errors in self._errors.items()},
            decisions=dict(self._decisions),
            rejected=dict(self._rejected),
            policy_failures=policy_failures,
            log_lost=log_lost,
        )

    def _forget(self, number: int) -> None:
        public_id = self._records.pop(number).public_id
        if others := tuple(other for other in self._by_id[public_id] if other != number):
            self._by_id[public_id] = others
        else:
            del self._by_id[public_id]


class _Ring:
    """Numbers of the records that are kept of one kind, in the order they ended."""

    def __init__(self, most: int) -> None:
        self._numbers: deque[int] = deque()
        self._most = most

    def push(self, number: int) -> int | None:
        """Keep one more; returns the one that has to go for it, if one has."""
        self._numbers.append(number)
        return self._numbers.popleft() if len(self._numbers) > self._most else None


class _Packed(Struct, frozen=True, gc=False):
    """A record that does not change any more."""

    public_id: str
    data: bytes


_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(Record).decode


def _packed(record: Record) -> _Packed | Record:
    """The record in few bytes; as it is where that cannot be done."""
    try:
        return _Packed(record.public_id, _encode(record))
    except (TypeError, ValueError, OverflowError):  # a plug-in's ids need not be plain strings
        return record


def _unpacked(record: _Packed | Record) -> Record:
    return _decode(record.data) if isinstance(record, _Packed) else record
