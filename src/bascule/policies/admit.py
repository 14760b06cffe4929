"""Who may come in, in what order, and who had better come back later: pure functions over predictions."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from bascule.policies.baselines import usable
from bascule.policies.predict import predict
from bascule.policies.route import broken_bounds
from bascule.policies.snapshot import DECODE, MIXED, PREFILL, Candidate, RouteQuery, Snapshot

AGEING = 1.0
"""Seconds of work by which a waiting request moves up for each second that it waits: one that takes two seconds is
overtaken only by shorter ones that come within the two seconds after it."""
_SOONEST_S = 1.0


class Verdict(Struct, frozen=True):
    """Whether a request is taken; if not, why and in how many seconds it may be worth another try."""

    admitted: bool
    reason: str = ""
    retry_after_s: float = 0.0


ADMITTED = Verdict(True)


def place_in_line(priority: int, work_s: float, due_s: float) -> tuple[int, float]:
    """A key to wait by, the smallest first: by priority, then the shortest work with ageing, the sooner due the better.

    `due_s` is when the first token should be there, on the same clock for all; the key does not change as time passes.
    """
    return priority, work_s + AGEING * due_s


def worth_starting(query: RouteQuery, chosen: Candidate) -> Verdict:
    """Whether a request that could be placed now should be: not if its TTFT or TPOT will break the SLO anyway."""
    predicted, slo = chosen.predicted, query.slo
    if predicted.ttft_s <= slo.ttft_s and predicted.tpot_s <= slo.tpot_s:
        return ADMITTED
    broken = broken_bounds(predicted, query)
    return Verdict(False, broken, max(_SOONEST_S, predicted.ttft_s - slo.ttft_s, predicted.queue_s))


def worth_waiting(snapshot: Snapshot, query: RouteQuery, queued_s: float) -> Verdict:
    """Whether a request that has to wait behind `queued_s` seconds of other prompts' work may still meet its SLO."""
    feeders = usable(snapshot, query, (PREFILL, MIXED))
    homes = usable(snapshot, query, (DECODE, MIXED))
    feeders = feeders if len(feeders) else homes
    homes = homes if len(homes) else feeders
    if not len(feeders):
        return ADMITTED
    prefill, decode = predict(snapshot, query)
    soonest = float(np.min((prefill.queue_s + prefill.prefill_s)[feeders]))
    ttft = query.waited_s + queued_s / len(feeders) + soonest
    if ttft > query.slo.ttft_s:
        late = ttft - query.slo.ttft_s
        return Verdict(False, f"TTFT {ttft:.3g} s over {query.slo.ttft_s:g} s", max(_SOONEST_S, late))
    tpot = float(np.min(decode.tpot_s[homes]))
    if tpot > query.slo.tpot_s:
        return Verdict(False, f"TPOT {tpot:.3g} s over {query.slo.tpot_s:g} s", _SOONEST_S)
    return ADMITTED
