"""What the api is told of requests that no worker has failed: why they were turned away, or ended while they waited."""

from __future__ import annotations

from collections.abc import Collection

from bascule.errors import DeadlineExceeded, InvalidRequest, Overloaded, RequestError, Unavailable, WorkerFailure
from bascule.policies.admit import Verdict
from bascule.router.flight import Flight
from bascule.router.view import Member
from bascule.types import WorkerId

NO_SECOND_HAND = (
    "an output that has begun with sampling, or with penalties that count the output, is not continued on an engine "
    "with other random numbers; send the request again"
)

OTHER_WEIGHTS = "its model was loaded anew meanwhile, and other weights do not go on with its output; send it again"

NOT_KEPT_APART = (
    "does not look at cache_salt, and might let others find what it caches of this prompt; attach servers that do "
    "(vLLM, Bascule), or send no cache_salt"
)

_AGAIN_S = 1.0
"""When a place in a full line is worth asking for again."""


def line_full(limit: int) -> Overloaded:
    """For a request that comes when as many wait as may."""
    return Overloaded(
        f"the server's line is full: {limit} requests wait; try again in {_AGAIN_S:g} s", retry_after=_AGAIN_S
    )


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


def unfit(flight: Flight, members: Collection[Member]) -> dict[WorkerId, InvalidRequest]:
    """Workers that could never take that request, in whatever state they are: why, and what its client can do."""
    found = dict(flight.unfit)
    for member in members if flight.request.salt else ():
        if not member.registration.keeps_apart:
            found[member.id] = InvalidRequest(f"server {member.id} {NOT_KEPT_APART}", param="cache_salt")
    return found


def stranded(flight: Flight, members: Collection[Member]) -> RequestError | None:
    """What ends a request that none of these members could ever take, however long it waits; None for all others, and
    where there are no members."""
    refusals = unfit(flight, members)
    able = [member for member in members if member.id not in refusals]
    if not able:
        refusal = next(iter(refusals.values())) if members else None
        if refusal is None or not flight.weights:
            return refusal
        return Unavailable(f"only attached servers are left; {refusal.message}, or try again when workers are back")
    if all(member.attached for member in able) and not flight.portable:
        return WorkerFailure(f"no worker is left but attached servers; {NO_SECOND_HAND}")
    if len(flight.request.prompt) + flight.request.sampling.max_tokens > max(member.kv_tokens for member in able):
        return WorkerFailure("no worker that is left has enough KV memory for the request")
    return None
