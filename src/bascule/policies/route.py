"""Where a request goes by its price: every placement's latency and harm predicted, the cheapest under the SLO chosen.

Roles are soft: a prompt may be prefilled on the decode worker itself (`local`) or on any prefill or mixed worker and
handed over (`remote`). The price of a placement is the time that it takes everybody, the request itself and those whose
work it delays; a bound of the SLO that is probably broken costs as much time as a request at its bounds may take.
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.policies.baselines import usable
from bascule.policies.cost import Floats
from bascule.policies.predict import DecodeSide, PrefillSide, Rows, decode_side, exposed_transfer, prefill_side
from bascule.policies.snapshot import DECODE, MIXED, PREFILL, Candidate, Decision, Prediction, RouteQuery, Snapshot
from bascule.types import Placement

BEST = 8
"""Workers of each side that are combined, and candidates of each kind that are recorded."""
WINDOW_S = 0.5
"""Work that a busy worker may have in its queue before prompts wait unbound at the router."""
_WIDTH = 0.1
"""Relative error of predictions: how sharply a bound's price sets in."""
_EQUAL = 1e-6
"""Prices that differ by less (s) are equal."""


class _Priced(Struct, frozen=True):
    """Some placements side by side: prefilled on `prefill`, decoded on `decode` (rows)."""

    prefill: Rows
    decode: Rows
    cached: Floats
    queue_s: Floats
    prefill_s: Floats
    transfer_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    gap_s: Floats
    harm_s: Floats
    price_s: Floats
    load: NDArray[np.int64]


def adaptive(snapshot: Snapshot, query: RouteQuery) -> Decision:
    """The cheapest placement; ties go to the least loaded, then in turn."""
    homes = usable(snapshot, query, (DECODE, MIXED))
    if not len(homes):
        homes = usable(snapshot, query, (PREFILL,))
    if not len(homes):
        return Decision(placement=None, reason="no worker is placeable")
    homes = homes[(snapshot.decoding[homes] < snapshot.slots[homes]) & _fits(snapshot, query, homes)]
    if not len(homes):
        return Decision(placement=None, reason="every worker that decodes is at its limit of requests")
    feeders = usable(snapshot, query, (PREFILL, MIXED))
    feeders = feeders[snapshot.hands_off[feeders] & _fits(snapshot, query, feeders)]
    decode = decode_side(snapshot, query, homes)
    options = [_local(snapshot, query, decode), _remote(snapshot, query, feeders, decode)]
    found = [option for option in options if option is not None]
    if not found:
        return Decision(placement=None, reason="every worker has as many prompts to compute as it should")
    return _choose(snapshot, query, found)


def priced(snapshot: Snapshot, query: RouteQuery, placement: Placement) -> Candidate:
    """What a placement that something else has chosen would bring; its workers must be in the snapshot."""
    prefill = np.array([list(snapshot.ids).index(placement.prefill)], np.intp)
    home = np.array([list(snapshot.ids).index(placement.decode)], np.intp)
    side, decode = prefill_side(snapshot, query, prefill), decode_side(snapshot, query, home)
    transfer = np.zeros(1)
    if placement.remote:
        transfer = exposed_transfer(snapshot, query, prefill, home, side.chunk)
    ttft = query.waited_s + side.queue_s + side.prefill_s
    only = np.zeros(1, np.intp)
    return _candidate(
        snapshot, query, _price(snapshot, query, side, decode, only, only, transfer_s=transfer, ttft=ttft), 0
    )


def _fits(snapshot: Snapshot, query: RouteQuery, rows: Rows) -> NDArray[np.bool_]:
    fits: NDArray[np.bool_] = snapshot.kv_tokens[rows] >= query.prompt_tokens + query.max_tokens
    return fits


def _open(snapshot: Snapshot, side: PrefillSide) -> NDArray[np.bool_]:
    """Workers that should be given one more prompt now."""
    is_open: NDArray[np.bool_] = (snapshot.prefilling[side.rows] == 0) | (side.queue_s <= WINDOW_S)
    return is_open


def _local(snapshot: Snapshot, query: RouteQuery, decode: DecodeSide) -> _Priced | None:
    """Prefill where it is decoded, on the best of the workers that decode."""
    side = prefill_side(snapshot, query, decode.rows)
    keep = np.flatnonzero(_open(snapshot, side))
    if not len(keep):
        return None
    ttft = query.waited_s + side.queue_s + side.prefill_s
    priced = _price(
        snapshot,
        query,
        side,
        decode,
        np.arange(len(decode.rows)),
        np.arange(len(decode.rows)),
        transfer_s=np.zeros(len(decode.rows)),
        ttft=ttft,
    )
    return _best(priced, keep)


def _remote(snapshot: Snapshot, query: RouteQuery, feeders: Rows, decode: DecodeSide) -> _Priced | None:
    """Prefill on one of the best feeders, decode on one of the best homes, and hand over in between."""
    side = prefill_side(snapshot, query, feeders)
    sources = np.flatnonzero(_open(snapshot, side))
    targets = np.flatnonzero(snapshot.hands_off[decode.rows])
    sources = sources[_least(side.queue_s[sources] + side.prefill_s[sources] + side.harm_s[sources])]
    targets = targets[_least(query.output_tokens * decode.tpot_s[targets] + decode.harm_s[targets])]
    left, right = (grid.ravel() for grid in np.meshgrid(sources, targets, indexing="ij"))
    apart = side.rows[left] != decode.rows[right]
    left, right = left[apart], right[apart]
    if not len(left):
        return None
    transfer = exposed_transfer(snapshot, query, side.rows[left], decode.rows[right], side.chunk[left])
    ttft = query.waited_s + (side.queue_s + side.prefill_s)[left]
    return _price(snapshot, query, side, decode, left, right, transfer_s=transfer, ttft=ttft)


def _price(
    snapshot: Snapshot,
    query: RouteQuery,
    side: PrefillSide,
    decode: DecodeSide,
    left: Rows,
    right: Rows,
    *,
    transfer_s: Floats,
    ttft: Floats,
) -> _Priced:
    """Price the placements that prefill on `side.rows[left]` and decode on `decode.rows[right]`."""
    slo, prefill, home = query.slo, side.rows[left], decode.rows[right]
    handed = np.where(prefill == home, 0.0, transfer_s + decode.step_s[right] / 2)
    tpot = decode.tpot_s[right] + handed / max(query.output_tokens - 1, 1)
    gap = np.maximum(decode.gap_s[right], np.where(prefill == home, 0.0, handed + decode.step_s[right]))
    harm = side.harm_s[left] + decode.harm_s[right]
    broken = _chance(ttft, slo.ttft_s) + _chance(tpot, slo.tpot_s) + _chance(gap, slo.gap_s)
    others = snapshot.decoding[home] * (
        _chance(decode.tpot_s[right], slo.tpot_s) - _chance(decode.tpot_before_s[right], slo.tpot_s)
    ) + snapshot.streams[prefill] * _chance(side.step_s[left], slo.gap_s)
    worth = _worth(query)
    return _Priced(
        prefill=prefill,
        decode=home,
        cached=side.cached[left],
        queue_s=side.queue_s[left],
        prefill_s=side.prefill_s[left],
        transfer_s=transfer_s,
        ttft_s=ttft,
        tpot_s=tpot,
        gap_s=gap,
        harm_s=harm,
        price_s=ttft + query.output_tokens * tpot + harm + worth * (broken + others),
        load=snapshot.decoding[home] + snapshot.prefilling[prefill] - (home == query.session),
    )


def _chance(predicted: Floats, bound: float) -> Floats:
    """How probable it is that a bound is broken, given that predictions err."""
    if math.isinf(bound):
        return np.zeros_like(predicted)
    chance: Floats = 1.0 / (1.0 + np.exp(np.clip((bound - predicted) / (_WIDTH * bound), -30.0, 30.0)))
    return chance


def _worth(query: RouteQuery) -> float:
    """Seconds that a request at its bounds may take; what is lost with a broken one."""
    ttft = query.slo.ttft_s if math.isfinite(query.slo.ttft_s) else 0.0
    tpot = query.slo.tpot_s if math.isfinite(query.slo.tpot_s) else 0.0
    return ttft + query.output_tokens * tpot


def _least(values: Floats) -> Rows:
    """Where the `BEST` smallest values are, in any order."""
    if len(values) <= BEST:
        return np.arange(len(values))
    return np.argpartition(values, BEST - 1)[:BEST]


def _best(priced: _Priced, keep: Rows) -> _Priced:
    """The `BEST` cheapest of some placements."""
    keep = keep[_least(priced.price_s[keep])]
    return _Priced(*(getattr(priced, name)[keep] for name in priced.__struct_fields__))


def _choose(snapshot: Snapshot, query: RouteQuery, options: list[_Priced]) -> Decision:
    names = _Priced.__struct_fields__
    every = _Priced(*(np.concatenate([getattr(option, name) for option in options]) for name in names))
    cheapest = every.price_s.min()
    equals = np.flatnonzero(every.price_s <= cheapest + _EQUAL)
    equals = equals[every.load[equals] == every.load[equals].min()]
    winner = int(equals[snapshot.turn % len(equals)])
    order = [winner, *(int(index) for index in np.argsort(every.price_s, kind="stable")[: 2 * BEST] if index != winner)]
    candidates = tuple(_candidate(snapshot, query, every, index) for index in order)
    return Decision(placement=candidates[0].placement, reason=_reason(candidates), candidates=candidates)


def _candidate(snapshot: Snapshot, query: RouteQuery, priced: _Priced, index: int) -> Candidate:
    predicted = Prediction(
        queue_s=float(priced.queue_s[index]),
        prefill_s=float(priced.prefill_s[index]),
        transfer_s=float(priced.transfer_s[index]),
        ttft_s=float(priced.ttft_s[index]),
        tpot_s=float(priced.tpot_s[index]),
        gap_s=float(priced.gap_s[index]),
        harm_s=float(priced.harm_s[index]),
    )
    return Candidate(
        placement=Placement(snapshot.ids[priced.prefill[index]], snapshot.ids[priced.decode[index]]),
        predicted=predicted,
        cached_tokens=int(priced.cached[index]),
        cost_s=float(priced.price_s[index]),
        why_not=broken_bounds(predicted, query),
    )


def broken_bounds(predicted: Prediction, query: RouteQuery) -> str:
    """Which bounds of the SLO a prediction breaks, in words; empty if none."""
    bounds = (
        ("TTFT", predicted.ttft_s, query.slo.ttft_s),
        ("TPOT", predicted.tpot_s, query.slo.tpot_s),
        ("gap", predicted.gap_s, query.slo.gap_s),
    )
    return ", ".join(f"{name} {value:.3g} s over {bound:g} s" for name, value, bound in bounds if value > bound)


def _reason(candidates: tuple[Candidate, ...]) -> str:
    first = candidates[0]
    place = first.placement
    where = f"prefill on {place.prefill}, decode on {place.decode}" if place.remote else f"whole on {place.decode}"
    terms = first.predicted
    told = f"{where}: TTFT {terms.ttft_s:.3g} s, TPOT {terms.tpot_s:.3g} s, harm {terms.harm_s:.3g} s"
    if first.cached_tokens:
        told += f", {first.cached_tokens} tokens cached"
    if len(candidates) > 1:
        second = candidates[1]
        other = second.placement
        to = f"{other.prefill} -> {other.decode}" if other.remote else f"{other.decode}"
        told += f"; next {to} at {second.cost_s - first.cost_s:.3g} s more"
    return told
