"""Who may come in, and who had better come back later: pure functions over predictions."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from bascule.policies.baselines import usable
from bascule.policies.batch import LEAST_CHUNK
from bascule.policies.inputs import Steps, own_context
from bascule.policies.predict import predict
from bascule.policies.route import broken_bounds
from bascule.policies.snapshot import DECODE, PREFILL, Candidate, RouteQuery, Snapshot
from bascule.types import Slo

LATE_S = 10.0
"""A request that will miss its TTFT whatever is done lets others go first that may meet theirs, as if it had come so
much later."""
WAIT_MARGIN = 0.8
"""Share of the TTFT bound that those who have to wait are let in for: under overload the line is always as long as it
may be, and all of it would be late by what the prediction misses."""
_SOONEST_S = 1.0


class Verdict(Struct, frozen=True):
    """Whether a request is taken; if not, why and in how many seconds it may be worth another try."""

    admitted: bool
    reason: str = ""
    retry_after_s: float = 0.0


ADMITTED = Verdict(True)


def is_late(query: RouteQuery, chosen: Candidate) -> bool:
    """Whether the first token will come after its bound even if the request goes at once."""
    return chosen.predicted.ttft_s > query.slo.ttft_s


def has_room(snapshot: Snapshot, query: RouteQuery, chosen: Candidate, usual: Slo) -> bool:
    """Whether the worker that is to decode can take one more stream and keep the TPOT bound: the `usual` one, for who
    asks for a tighter one must not hold up all others.

    Prefill must not run ahead of what decode can take: beyond this, requests wait unbound, which costs their TTFT, and
    not the TPOT of all. As workers cut prompts to keep TPOT, a stream is too many where even the least that prompts are
    cut to takes too long beside it; where one stream alone cannot keep the bound beside that, they are reckoned without
    prompts. Where the bound cannot be kept even so, waiting would not help.
    """
    row = snapshot.row_of(chosen.placement.decode)
    bound = max(usual.tpot_s, query.slo.tpot_s)
    if not snapshot.decoding[row]:
        return True
    cost, own = snapshot.cost, own_context(query)
    among, alone = (
        Steps(*cost.steps_of(row, streams, context + own))
        for streams, context in ((snapshot.decoding.item(row) + 1.0, snapshot.context_tokens.item(row)), (1.0, 0.0))
    )
    least = LEAST_CHUNK * cost.token_s.item(row)
    crowded, lone = (max(steps.beside + least, steps.alone) for steps in (among, alone))
    if lone > bound:
        crowded, lone = among.alone, alone.alone
    return crowded <= bound or lone > bound


def worth_starting(snapshot: Snapshot, query: RouteQuery, chosen: Candidate) -> Verdict:
    """Whether a request that could be placed now should be: not if its TTFT or TPOT will break the SLO anyway.

    An idle attached server takes any: what it costs is a guess, and only trying it teaches better.
    """
    predicted, slo = chosen.predicted, query.slo
    row = snapshot.row_of(chosen.placement.decode)
    if not snapshot.hands_off[row] and not snapshot.decoding[row]:
        return ADMITTED
    if predicted.ttft_s <= slo.ttft_s and predicted.tpot_s <= slo.tpot_s:
        return ADMITTED
    broken = broken_bounds(predicted, query)
    return Verdict(False, broken, max(_SOONEST_S, predicted.ttft_s - slo.ttft_s, predicted.queue_s))


def worth_waiting(
    snapshot: Snapshot, query: RouteQuery, queued_s: float, pace: float | None = None, ahead: int = 0
) -> Verdict:
    """Whether a request that has to wait behind `ahead` others, `queued_s` seconds of prompts' work, may still meet its
    SLO.

    `pace` is how many of these seconds have lately been begun in a second; where it is not known, workers that compute
    prompts are taken to do nothing else. Where all that decode have as many requests as they take, each in line waits
    for one to end, too: they are taken to be spread over the time that an output takes.
    """
    feeders = usable(snapshot, query, besides=(DECODE,))
    homes = usable(snapshot, query, besides=(PREFILL,))
    feeders = feeders if len(feeders) else homes
    homes = homes if len(homes) else feeders
    if not len(feeders):
        return ADMITTED
    prefill, decode = predict(snapshot, query)
    soonest = float(np.min((prefill.queue_s + prefill.load_s + prefill.prefill_s)[feeders]))
    turn_s = queued_s / (pace or len(feeders))
    if (snapshot.decoding[homes] >= snapshot.slots[homes]).all():
        ends_per_s = float(np.sum(snapshot.slots[homes] / np.maximum(decode.tpot_s[homes], 1e-9))) / query.output_tokens
        turn_s = max(turn_s, (ahead + 1) / max(ends_per_s, 1e-9))
    ttft = query.waited_s + turn_s + soonest
    if ttft > WAIT_MARGIN * query.slo.ttft_s:
        late = ttft - query.slo.ttft_s
        return Verdict(
            False, f"TTFT {ttft:.3g} s over {WAIT_MARGIN:g} of {query.slo.ttft_s:g} s", max(_SOONEST_S, late)
        )
    tpot = float(np.min(decode.tpot_s[homes]))
    if tpot > query.slo.tpot_s:
        return Verdict(False, f"TPOT {tpot:.3g} s over {query.slo.tpot_s:g} s", _SOONEST_S)
    return ADMITTED
