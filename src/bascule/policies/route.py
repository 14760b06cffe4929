"""Where a request goes by its price: every placement's latency and harm predicted, the cheapest under the SLO chosen.

Roles are soft: a prompt may be prefilled on the decode worker itself (`local`) or on any prefill or mixed worker and
handed over (`remote`). The price of a placement is the time that it takes everybody, the request itself and those whose
work it delays; a bound of the SLO that is probably broken costs as much time as a request at its bounds may take.
"""

from __future__ import annotations

from math import inf, isfinite
from typing import Generic

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from bascule.policies.cost import Floats
from bascule.policies.handoff import Handoffs, Rows, connected, cut_off, handoffs, left_out
from bascule.policies.inputs import OF_ROWS, Arithmetic, Brought, Number, Workers, of_all, of_one
from bascule.policies.predict import DecodeSide, PrefillSide, both_sides
from bascule.policies.snapshot import DECODE, PREFILL, Candidate, Decision, Prediction, RouteQuery, Snapshot
from bascule.types import Placement, Tier

BEST = 6
"""Workers of each side that are combined."""
RECORDED = 6
"""Candidates that a decision tells of."""
WINDOW_S = 0.5
"""Work that a busy worker may have in its queue before prompts wait unbound at the router."""
_WIDTH = 0.1
"""Relative error of predictions: how sharply a bound's price sets in."""
_GAP_WIDTH = 0.04
"""The same of the gap, for which workers cut their chunks with a margin."""
_EQUAL = 1e-6
"""Prices that differ by less (s) are equal."""

Mask = NDArray[np.bool_]


class _Sides(Struct, Generic[Number], frozen=True):
    """What a request is told of each worker, and what either side of a placement there costs on its own."""

    brought: Brought[Number]
    prefill: PrefillSide[Number]
    decode: DecodeSide[Number]
    ttft_s: Number
    prefill_price_s: Number
    decode_price_s: Number
    """Without what the bounds on the request's own TPOT and gap are worth, which a handoff changes."""
    whole_price_s: Number
    """Both together and those bounds, of a request that is prefilled where it is decoded."""


class _Priced(Struct, frozen=True):
    """Some placements side by side: prefilled on `prefill`, decoded on `decode` (rows)."""

    prefill: Rows
    decode: Rows
    handoffs: Handoffs | None
    """None where prefill and decode are on the same worker."""
    tpot_s: Floats
    gap_s: Floats
    price_s: Floats


def adaptive(snapshot: Snapshot, query: RouteQuery) -> Decision:
    """The cheapest placement; ties go to the least loaded, then in turn."""
    fits = snapshot.kv_tokens >= query.prompt_tokens + query.max_tokens
    able = _able(snapshot, query, fits)
    homes = able & (snapshot.role != PREFILL)
    if not homes.any():
        homes = able
    if not homes.any():
        return Decision(placement=None, reason="no worker is placeable that could hold it")
    homes = homes & (snapshot.decoding < snapshot.slots)
    if not homes.any():
        return Decision(placement=None, reason="every worker that decodes is at its limit of requests")
    sides = _sides(of_all(snapshot, query), query)
    feeders = able & ((snapshot.prefilling == 0) | (sides.prefill.queue_s <= WINDOW_S))
    options = [_whole(sides, _least(sides.whole_price_s, homes & feeders, snapshot.turn))]
    feeders &= snapshot.hands_off & (snapshot.role != DECODE)
    options += _remote(snapshot, query, sides, feeders, homes & snapshot.hands_off)
    options = [option for option in options if len(option.price_s)]
    if not options:
        return Decision(placement=None, reason="every worker has as many prompts to compute as it should")
    return _choose(snapshot, query, sides, options)


def priced(snapshot: Snapshot, query: RouteQuery, placement: Placement) -> Candidate:
    """What a placement that something else has chosen would bring; its workers must be in the snapshot."""
    prefill, decode = (snapshot.row_of(worker) for worker in (placement.prefill, placement.decode))
    if placement.remote:
        sides = _sides(of_all(snapshot, query), query)
        handed = _handed_over(snapshot, query, sides, np.array([prefill], np.intp), np.array([decode], np.intp))
        return _candidate(snapshot, query, sides, handed, 0)
    one = _sides(of_one(snapshot, query, decode), query)
    predicted = Prediction(
        queue_s=one.prefill.queue_s,
        load_s=one.prefill.load_s,
        prefill_s=one.prefill.prefill_s,
        ttft_s=one.ttft_s,
        tpot_s=one.decode.tpot_s,
        gap_s=one.decode.gap_s,
        harm_s=one.prefill.harm_s + one.decode.harm_s,
    )
    bringing = one.brought.have, one.brought.fetches
    return _told(snapshot, query, prefill, decode, predicted, bringing, one.whole_price_s)


def _able(snapshot: Snapshot, query: RouteQuery, fits: Mask) -> Mask:
    """Rows that may be used and where it fits; those that failed this request only when there is no other."""
    able = snapshot.placeable & fits
    if not query.portable:
        able = able & snapshot.hands_off
    if query.excluded:
        kept = able & np.array([worker not in query.excluded for worker in snapshot.ids])
        able = kept if kept.any() else able
    return able


def _sides(workers: Workers[Number], query: RouteQuery) -> _Sides[Number]:
    """Price each worker's two sides."""
    prefill, decode = both_sides(workers, query)
    math, slo, worth = workers.math, query.slo, _worth(query)
    ttft = query.waited_s + prefill.queue_s + prefill.load_s + prefill.prefill_s
    lost_here = _chance(math, ttft, slo.ttft_s) + workers.streams * _chance(math, prefill.step_s, slo.gap_s, _GAP_WIDTH)
    lost_there = workers.decoding * _more_chance(math, decode.tpot_s, decode.tpot_more_s, slo.tpot_s)
    own = _chance(math, decode.tpot_s, slo.tpot_s) + _chance(math, decode.gap_s, slo.gap_s, _GAP_WIDTH)
    # Of equal workers the least loaded must be among the best, though a load of one is no price.
    prefill_price = ttft + prefill.harm_s + worth * lost_here + workers.order_s
    decode_price = query.output_tokens * decode.tpot_s + decode.harm_s + worth * lost_there + workers.order_s
    return _Sides(
        brought=workers.brought,
        prefill=prefill,
        decode=decode,
        ttft_s=ttft,
        prefill_price_s=prefill_price,
        decode_price_s=decode_price,
        whole_price_s=prefill_price + decode_price + worth * own,
    )


def _whole(sides: _Sides[Floats], rows: Rows) -> _Priced:
    return _Priced(
        prefill=rows,
        decode=rows,
        handoffs=None,
        tpot_s=sides.decode.tpot_s[rows],
        gap_s=sides.decode.gap_s[rows],
        price_s=sides.whole_price_s[rows],
    )


def _remote(snapshot: Snapshot, query: RouteQuery, sides: _Sides[Floats], feeders: Mask, homes: Mask) -> list[_Priced]:
    """Prefill on one of the best feeders, decode on one of the best homes, and hand over in between."""
    if snapshot.unreached:
        kept = connected(snapshot, query, np.flatnonzero(feeders), np.flatnonzero(homes), whole=False)
        feeders = np.zeros_like(feeders)
        feeders[kept] = True
    sources = _least(sides.prefill_price_s, feeders, snapshot.turn)
    targets = _least(sides.decode_price_s, homes, snapshot.turn)
    left, right = np.repeat(sources, len(targets)), np.tile(targets, len(sources))
    if any(source in snapshot.unreached for source in sources.tolist()):
        reached = [_reached(snapshot, query, sides, source, homes) for source in sources.tolist()]
        left, right = np.repeat(sources, [len(rows) for rows in reached]), np.concatenate(reached)
    apart = left != right
    left, right = left[apart], right[apart]
    return [_handed_over(snapshot, query, sides, left, right)] if len(left) else []


def _reached(snapshot: Snapshot, query: RouteQuery, sides: _Sides[Floats], source: int, homes: Mask) -> Rows:
    """The best homes that can be handed over to from `source`."""
    homes = homes.copy()
    homes[cut_off(snapshot, query, source)] = False
    return _least(sides.decode_price_s, homes, snapshot.turn)


def _handed_over(snapshot: Snapshot, query: RouteQuery, sides: _Sides[Floats], left: Rows, right: Rows) -> _Priced:
    """Price the placements that prefill on `left` and decode on `right`: both sides, and the handoff in between."""
    slo, step = query.slo, sides.decode.step_s[right]
    ways = handoffs(snapshot, query, left, right, sides.prefill.last_tokens[left])
    if ways.twice.any():
        again_s = np.where(ways.twice, sides.prefill.prefill_s[right], 0.0)
        ways = replace(ways, exposed_s=ways.exposed_s + again_s, busy_s=ways.busy_s + again_s)
    handed = ways.exposed_s + step / 2
    late = handed / max(query.output_tokens - 1, 1)
    tpot = sides.decode.tpot_s[right] + late
    gap = np.maximum(sides.decode.gap_s[right], handed + step)
    # Checking and copying the KV takes the workers' time too, from all that decode there.
    busy = ways.busy_s * (1 + snapshot.streams[left] + snapshot.decoding[right])
    own = (
        busy
        + query.output_tokens * late
        + _worth(query) * (_chance(OF_ROWS, tpot, slo.tpot_s) + _chance(OF_ROWS, gap, slo.gap_s, _GAP_WIDTH))
    )
    return _Priced(
        prefill=left,
        decode=right,
        handoffs=ways,
        tpot_s=tpot,
        gap_s=gap,
        price_s=sides.prefill_price_s[left] + sides.decode_price_s[right] + own,
    )


def _chance(math: Arithmetic[Number], predicted: Number, bound: float, width: float = _WIDTH) -> Number | float:
    """How probable it is that a bound is broken, given that predictions err."""
    if bound == inf:
        return 0.0
    return 0.5 + 0.5 * math.tanh((predicted - bound) * (0.5 / (width * bound)))


def _more_chance(math: Arithmetic[Number], predicted: Number, more: Number, bound: float) -> Number | float:
    """How much more probable a broken bound becomes for those that are slowed down by `more` to `predicted`.

    A bound that is broken already still counts as if it could be kept: else a worker would become the better, the more
    it had fallen behind.
    """
    if bound == inf:
        return 0.0
    predicted = math.least(predicted, bound + more / 2)
    return _chance(math, predicted, bound) - _chance(math, predicted - more, bound)


def _worth(query: RouteQuery) -> float:
    """Seconds that a request at its bounds may take; what is lost with a broken one."""
    ttft = query.slo.ttft_s if isfinite(query.slo.ttft_s) else 0.0
    tpot = query.slo.tpot_s if isfinite(query.slo.tpot_s) else 0.0
    return ttft + query.output_tokens * tpot


def _finite(prices: Floats) -> Floats:
    """What cannot be reckoned is dear, not out of the question."""
    finite: Floats = np.fmin(prices, 1e300)
    return finite


def _least(values: Floats, rows: Mask, turn: int) -> Rows:
    """The rows with the `BEST` smallest values, the smallest first; where more are equal, the next in turn."""
    left = np.where(rows, _finite(values), np.inf)
    found: list[int] = []
    # A few passes over all cost less than to partition them.
    while len(found) < BEST and left[at := int(left.argmin())] < np.inf:
        left[at] = np.inf
        found.append(at)
    if len(found) == BEST and values[found[-1]] == values[found[0]]:
        equals = np.flatnonzero(rows & (values == values[found[0]]))
        return np.roll(equals, -(turn - turn % BEST))[:BEST]
    return np.array(found, np.intp)


def _choose(snapshot: Snapshot, query: RouteQuery, sides: _Sides[Floats], options: list[_Priced]) -> Decision:
    places = [(option, at) for option in options for at in range(len(option.price_s))]
    prices = _finite(np.concatenate([option.price_s for option in options]))
    best = prices.argsort(kind="stable")[:RECORDED].tolist()
    equals = np.flatnonzero(prices <= prices[best[0]] + _EQUAL).tolist()
    if len(equals) > 1:
        loads = [_load(snapshot, query, *places[index]) for index in equals]
        equals = [index for index, load in zip(equals, loads, strict=True) if load == min(loads)]
    winner = equals[snapshot.turn % len(equals)]
    order = [winner, *(index for index in best if index != winner)]
    candidates = tuple(_candidate(snapshot, query, sides, *places[index]) for index in order)
    return Decision(
        placement=candidates[0].placement, reason=_reason(snapshot, query, candidates), candidates=candidates
    )


def _load(snapshot: Snapshot, query: RouteQuery, option: _Priced, at: int) -> int:
    """Requests on the workers of a placement; the one that knows the conversation counts as a little emptier."""
    home = option.decode[at]
    return int(snapshot.decoding[home] + snapshot.prefilling[option.prefill[at]] - (home == query.session))


def _candidate(snapshot: Snapshot, query: RouteQuery, sides: _Sides[Floats], priced: _Priced, at: int) -> Candidate:
    prefill, decode = int(priced.prefill[at]), int(priced.decode[at])
    ways = priced.handoffs
    predicted = Prediction(
        queue_s=float(sides.prefill.queue_s[prefill]),
        load_s=float(sides.prefill.load_s[prefill]),
        prefill_s=float(sides.prefill.prefill_s[prefill]),
        transfer_s=0.0 if ways is None else float(ways.exposed_s[at]),
        ttft_s=float(sides.ttft_s[prefill]),
        tpot_s=float(priced.tpot_s[at]),
        gap_s=float(priced.gap_s[at]),
        harm_s=float(sides.prefill.harm_s[prefill] + sides.decode.harm_s[decode]),
    )
    bringing = int(sides.brought.have[prefill]), bool(sides.brought.fetches.take(prefill, mode="clip"))
    handed_by = None if ways is None else ways.by(at)
    return _told(snapshot, query, prefill, decode, predicted, bringing, float(priced.price_s[at]), handed_by)


def _told(
    snapshot: Snapshot,
    query: RouteQuery,
    prefill: int,
    decode: int,
    predicted: Prediction,
    bringing: tuple[int, bool],
    cost_s: float,
    handed_by: Tier | None = None,
) -> Candidate:
    """Of a placement on these rows, with so many tokens there then, and whether they are fetched from the peer."""
    have, fetches = bringing
    return Candidate(
        placement=Placement(snapshot.ids[prefill], snapshot.ids[decode]),
        predicted=predicted,
        handed_by=handed_by,
        cached_tokens=have,
        loaded_tokens=have - query.cached.item(prefill),
        fetch_from=snapshot.ids[query.peer] if fetches else None,
        cost_s=cost_s,
        why_not=broken_bounds(predicted, query),
    )


def broken_bounds(predicted: Prediction, query: RouteQuery) -> str:
    """Which bounds of the SLO a prediction breaks, in words; empty if none."""
    slo = query.slo
    if predicted.ttft_s <= slo.ttft_s and predicted.tpot_s <= slo.tpot_s and predicted.gap_s <= slo.gap_s:
        return ""
    bounds = (
        ("TTFT", predicted.ttft_s, slo.ttft_s),
        ("TPOT", predicted.tpot_s, slo.tpot_s),
        ("gap", predicted.gap_s, slo.gap_s),
    )
    return ", ".join(f"{name} {value:.3g} s over {bound:g} s" for name, value, bound in bounds if value > bound)


def _reason(snapshot: Snapshot, query: RouteQuery, candidates: tuple[Candidate, ...]) -> str:
    first = candidates[0]
    place = first.placement
    where = f"prefill on {place.prefill}, decode on {place.decode}" if place.remote else f"whole on {place.decode}"
    where += f" by way of {first.handed_by}" if first.handed_by else ""
    terms = first.predicted
    told = f"{where}: TTFT {terms.ttft_s:.3g} s, TPOT {terms.tpot_s:.3g} s, harm {terms.harm_s:.3g} s"
    if first.cached_tokens:
        told += f", {first.cached_tokens} tokens cached"
    if first.loaded_tokens:
        told += f" ({first.loaded_tokens} of them {f'on {first.fetch_from}' if first.fetch_from else 'in the store'})"
    if len(candidates) > 1:
        second = candidates[1]
        other = second.placement
        to = f"{other.prefill} -> {other.decode}" if other.remote else f"{other.decode}"
        told += f"; next {to} at {second.cost_s - first.cost_s:.3g} s more"
    return f"{told}; {why}" if (why := _left_out(snapshot, query, candidates)) else told


def _left_out(snapshot: Snapshot, query: RouteQuery, candidates: tuple[Candidate, ...]) -> str:
    """Which tiers the best of the handoffs leaves out for now, in words."""
    if snapshot.stores is None or snapshot.stores.shunned_s is None:
        return ""
    place = next((each.placement for each in candidates if each.placement.remote), None)
    if place is None:
        return ""
    return left_out(snapshot, query, snapshot.row_of(place.prefill), np.array([snapshot.row_of(place.decode)], np.intp))
