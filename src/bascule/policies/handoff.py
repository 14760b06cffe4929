"""What handing KV over takes: pushed from one worker to the other, or by way of a tier of the store that both have."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.policies.cost import Floats, PrefillPart, step_seconds
from bascule.policies.snapshot import STORE_TIERS, RouteQuery, Snapshot, StoreColumns
from bascule.types import CostModel, LinkCost, Tier

Rows = NDArray[np.intp]

SAME_MACHINE = LinkCost(0.002, 4e9)
OTHER_MACHINE = LinkCost(0.005, 1e9)
"""Of links that have not been measured."""
_RELAY_S = 0.02
"""What a handoff by way of the store takes beside saving and loading: the saver's turn, and word to the router."""
_PUSHED = -1


class Handoffs(Struct, frozen=True):
    """Some handoffs side by side."""

    exposed_s: Floats
    """From the first token until the decode worker has all."""
    busy_s: Floats
    """What copying all of it takes, which both workers' other streams wait for."""
    tier: NDArray[np.int64]
    """Index in `STORE_TIERS` of the tier that it goes by; less than 0 where it is pushed."""
    twice: NDArray[np.bool_]
    """It can only go by a tier that is left out else, so the prompt is probably computed a second time."""

    def by(self, index: int) -> Tier | None:
        """The tier that one of them goes by; None where it is pushed."""
        return STORE_TIERS[tier] if (tier := int(self.tier[index])) >= 0 else None


def handoffs(snapshot: Snapshot, query: RouteQuery, source: Rows, target: Rows, last_tokens: Floats) -> Handoffs:
    """Handoffs from `source[i]` to `target[i]` whose last chunk, of `last_tokens[i]`, nothing hides, each by the way
    that `query.handoff` asks for, or the quicker one.

    A tier by which they have come to nothing is left out for a while, but where there is no other way.
    """
    exposed = pushed_seconds(snapshot, query, source, target, last_tokens)
    busy = pushed_seconds(snapshot, query, source, target, np.full(len(source), float(query.prompt_tokens)))
    tier = np.full(len(source), _PUSHED)
    apart = np.zeros(len(source), np.bool_)
    if query.handoff == "push" or snapshot.stores is None:
        return Handoffs(exposed, busy, tier, twice=apart)
    if snapshot.unreached:
        pairs_of_rows = zip(source.tolist(), target.tolist(), strict=True)
        apart = np.array([end in snapshot.unreached.get(start, ()) for start, end in pairs_of_rows], np.bool_)
    stores, pairs = snapshot.stores, np.arange(len(source))
    shared = _shared(stores, source, target)
    missing = np.maximum(query.prompt_tokens - query.cached[target], 0)
    load = stores.latency_s[target] + (missing * query.kv_token_bytes)[:, None] * stores.byte_s[target]
    save = stores.latency_s[source] + (last_tokens * query.kv_token_bytes)[:, None] * stores.byte_s[source]
    through = np.where(shared, _RELAY_S + save + load, np.inf)
    twice = apart & shared.any(axis=1)
    if stores.shunned_s is not None:
        trusted = shared & (_shunned_s(stores, source, target) <= 0)
        twice &= ~trusted.any(axis=1)
        through = np.where(trusted | twice[:, None], through, np.inf)
    else:
        twice[:] = False
    best = through.argmin(axis=1)
    seconds = through[pairs, best]
    stored = np.isfinite(seconds) if query.handoff == "store" else seconds < exposed
    stored |= apart & np.isfinite(seconds)
    return Handoffs(
        exposed_s=np.where(stored, seconds, exposed),
        busy_s=np.where(stored, load[pairs, best], busy),
        tier=np.where(stored, best, tier),
        twice=twice,
    )


def _shared(stores: StoreColumns, source: Rows | int, target: Rows) -> NDArray[np.bool_]:
    """Which tiers those of a pair have in common: [pairs, tiers]."""
    shared: NDArray[np.bool_] = (stores.place[source] == stores.place[target]) & (stores.place[source] >= 0)
    return shared


def _shunned_s(stores: StoreColumns, source: Rows | int, target: Rows) -> Floats:
    """Seconds for which each tier is left out between those of a pair: [pairs, tiers]."""
    if stores.shunned_s is None:
        return np.zeros((len(target), len(STORE_TIERS)))
    seconds: Floats = np.maximum(stores.shunned_s[source], stores.shunned_s[target])
    return seconds


def left_out(snapshot: Snapshot, query: RouteQuery, source: int, targets: Rows) -> str:
    """By which tiers nothing is handed over from `source` to any of `targets` for now, and until when, in words; empty
    if there are none."""
    stores = snapshot.stores
    if query.handoff == "push" or stores is None or stores.shunned_s is None:
        return ""
    waits = np.where(_shared(stores, source, targets), _shunned_s(stores, source, targets), 0.0).max(axis=0)
    told = [
        f"the {tier} tier (again in {wait:.0f} s)" for tier, wait in zip(STORE_TIERS, waits, strict=True) if wait > 0
    ]
    return f"by way of {' and '.join(told)} handoffs have come to nothing" if told else ""


def cut_off(snapshot: Snapshot, query: RouteQuery, source: int) -> Rows:
    """Rows that nothing can be handed over to from `source`: it cannot connect to them, nor may KV go by a shared tier.

    The decode worker need not reach the prefill worker, which it answers over the same connection.
    """
    rows = np.array(sorted(snapshot.unreached.get(source, ())), np.intp)
    if len(rows) and query.handoff != "push" and snapshot.stores is not None:
        rows = rows[~_shared(snapshot.stores, source, rows).any(axis=1)]
    return rows


def within_reach(snapshot: Snapshot, query: RouteQuery, source: int, targets: Rows) -> Rows:
    """Those of `targets` that `source` can hand over to, itself among them; those to which all would go by tiers that
    are left out only if there are no others."""
    if source not in snapshot.unreached:
        return targets
    near = np.setdiff1d(targets, cut_off(snapshot, query, source))
    if snapshot.stores is None or snapshot.stores.shunned_s is None:
        return near
    trusted = _shared(snapshot.stores, source, near) & (_shunned_s(snapshot.stores, source, near) <= 0)
    sure = near[trusted.any(axis=1) | ~np.isin(near, list(snapshot.unreached[source]))]
    return sure if len(sure) else near


def connected(snapshot: Snapshot, query: RouteQuery, sources: Rows, targets: Rows, *, whole: bool) -> Rows:
    """Those of `sources` that can hand over to one of `targets`, and with `whole` those that are targets themselves."""
    if not snapshot.unreached:
        return sources
    wanted, pushed = frozenset(targets.tolist()), query.handoff == "push" or snapshot.stores is None

    def is_cut_off(source: int, unreached: frozenset[int]) -> bool:
        if len(unreached) < len(wanted) - 1 or (whole and source in wanted):
            return False
        others = wanted - {source} if source in wanted else wanted
        return others <= unreached and (pushed or others <= set(cut_off(snapshot, query, source).tolist()))

    lonely = [source for source, unreached in snapshot.unreached.items() if is_cut_off(source, unreached)]
    return np.setdiff1d(sources, np.array(lonely, np.intp)) if lonely else sources


def prefill_and_rest(
    cost: CostModel, link: LinkCost, prompt_tokens: int, chunk_tokens: int, kv_token_bytes: int
) -> tuple[float, float]:
    """Seconds of a prompt's steps with nothing beside them, and of its handoff beyond them: each chunk is pushed while
    the next is computed, so over a fast link only the last chunk's push is left, and over a slow one they queue up."""
    computed = sent = 0.0
    for start in range(0, prompt_tokens, chunk_tokens):
        new = min(chunk_tokens, prompt_tokens - start)
        computed += step_seconds(cost, [PrefillPart(new, start)], 0, 0)
        sent = max(sent, computed) + new * kv_token_bytes / link.bytes_per_s
    return computed, sent - computed + link.latency_s


def pushed_seconds(snapshot: Snapshot, query: RouteQuery, source: Rows, target: Rows, tokens: Floats) -> Floats:
    """Seconds to push the KV of `tokens[i]` tokens from `source[i]` to `target[i]`."""
    same = snapshot.machine[source] == snapshot.machine[target]
    latency = np.where(same, SAME_MACHINE.latency_s, OTHER_MACHINE.latency_s)
    rate = np.where(same, SAME_MACHINE.bytes_per_s, OTHER_MACHINE.bytes_per_s)
    if snapshot.links:
        ids, links = snapshot.ids, snapshot.links
        for index, (start, end) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
            link = links.get((ids[start], ids[end]))
            if link is not None:
                latency[index], rate[index] = link.latency_s, link.bytes_per_s
    seconds: Floats = latency + tokens * query.kv_token_bytes / rate
    return seconds
