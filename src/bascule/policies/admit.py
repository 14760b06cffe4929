"""Who may come in, and who had better come back later: pure functions over predictions."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from bascule.policies.baselines import usable
from bascule.policies.predict import decode_side, prefill_side
from bascule.policies.route import broken_bounds
from bascule.policies.snapshot import DECODE, MIXED, PREFILL, Candidate, RouteQuery, Snapshot

_SOONEST_S = 1.0


class Verdict(Struct, frozen=True):
    """Whether a request is taken; if not, why and in how many seconds it may be worth another try."""

    admitted: bool
    reason: str = ""
    retry_after_s: float = 0.0


ADMITTED = Verdict(True)


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
    side = prefill_side(snapshot, query, feeders)
    ttft = query.waited_s + queued_s / len(feeders) + float(np.min(side.queue_s + side.prefill_s))
    if ttft > query.slo.ttft_s:
        late = ttft - query.slo.ttft_s
        return Verdict(False, f"TTFT {ttft:.3g} s over {query.slo.ttft_s:g} s", max(_SOONEST_S, late))
    tpot = float(np.min(decode_side(snapshot, query, homes).tpot_s))
    if tpot > query.slo.tpot_s:
        return Verdict(False, f"TPOT {tpot:.3g} s over {query.slo.tpot_s:g} s", _SOONEST_S)
    return ADMITTED
