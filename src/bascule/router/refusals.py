"""What the api is told of requests that no worker has failed: why they were turned away, or ended while they waited."""

from __future__ import annotations

from collections.abc import Collection

from bascule.errors import DeadlineExceeded, Overloaded, RequestError, WorkerFailure
from bascule.policies.admit import Verdict
from bascule.router.flight import Flight
from bascule.router.view import Member

NO_SECOND_HAND = (
    "an output that has begun with sampling, or with penalties that count the output, is not continued on an engine "
    "with other random numbers; send the request again"
)

OTHER_WEIGHTS = "its model was loaded anew meanwhile, and other weights do not go on with its output; send it again"


def line_full(limit: int) -> Overloaded:
    """For a request that comes when as many wait as may."""
    return Overloaded(f"{limit} requests wait already; try again later or raise --queue-limit", retry_after=1.0)


def wait_too_long(flight: Flight, wait_s: float) -> Overloaded:
    """For a request whose turn would come too late for its deadline."""
    return Overloaded(
        f"its turn would come in {wait_s:.2g} s, more than half of its limit of {flight.request.timeout:g} s; try "
        "again later, or send X-Request-Timeout with a larger one",
        retry_after=wait_s / 2,
    )


def overloaded(verdict: Verdict) -> Overloaded:
    """For a request that would miss its SLO."""
    return Overloaded(
        f"the request would miss its SLO now: {verdict.reason}; try again in {verdict.retry_after_s:.0f} s, or ask for "
        "more time with X-SLO-TTFT and X-SLO-TPOT",
        retry_after=verdict.retry_after_s,
        code="slo",
    )


def too_late(flight: Flight) -> DeadlineExceeded:
    """For a request whose deadline has passed."""
    return DeadlineExceeded(
        f"the request took longer than its limit of {flight.request.timeout:g} s; "
        "send X-Request-Timeout with a larger one, or ask for fewer tokens",
        code="timeout",
    )


def stranded(flight: Flight, members: Collection[Member]) -> RequestError | None:
    """What ends a request that none of these members could ever take, however long it waits; None for all others."""
    if all(member.attached for member in members) and not flight.portable:
        return WorkerFailure(f"no worker is left but attached servers; {NO_SECOND_HAND}")
    if len(flight.request.prompt) + flight.request.sampling.max_tokens > max(member.kv_tokens for member in members):
        return WorkerFailure("no worker that is left has enough KV memory for the request")
    return None
