"""Routing by simple rules: what is usual elsewhere, kept so that it can be compared with, and fallen back to.

Each takes the workers that may be used and have room, and picks one, or one of each pool. Requests that find no room
wait unbound at the router, so that the choice is made when the work can start.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bascule.policies.handoff import connected, left_out, within_reach
from bascule.policies.snapshot import DECODE, PREFILL, Decision, Policy, RouteQuery, Snapshot
from bascule.types import Placement

Rows = NDArray[np.intp]
Numbers = NDArray[np.float64]
Pick = Callable[[Snapshot, RouteQuery, Rows, Numbers], int]
"""Of some rows and the load of each, the row to take; there is at least one."""

_DECODE_WEIGHT = 64
"""A running stream counts as this many prompt tokens where both are compared by rule."""
_LOCAL_TOKENS = 2048
_LOCAL_SHARE = 0.7
"""Dynamo's rule: fewer uncached tokens than this, and a smaller part of the prompt, are prefilled where they decode."""


def least_loaded(snapshot: Snapshot, query: RouteQuery, rows: Rows, load: Numbers) -> int:
    """The row with the least load; equals take turns, so that no name is favoured."""
    equals = rows[load == load.min()]
    return int(equals[snapshot.turn % len(equals)])


def round_robin(snapshot: Snapshot, query: RouteQuery, rows: Rows, load: Numbers) -> int:
    """The next row in turn, whatever its load."""
    return int(rows[snapshot.turn % len(rows)])


def at_random(snapshot: Snapshot, query: RouteQuery, rows: Rows, load: Numbers) -> int:
    """Any row, drawn by the request's id."""
    return int(rows[zlib.crc32(f"{query.request} {snapshot.turn}".encode()) % len(rows)])


def longest_prefix(snapshot: Snapshot, query: RouteQuery, rows: Rows, load: Numbers) -> int:
    """The row with most of the prompt cached, the least loaded of equals."""
    cached = query.cached[rows]
    return least_loaded(snapshot, query, rows[cached == cached.max()], load[cached == cached.max()])


def whole(snapshot: Snapshot, query: RouteQuery, *, pick: Pick) -> Decision:
    """Prefill and decode on one worker, any that is placeable."""
    return _local(usable(snapshot, query), snapshot, query, pick, "whole requests")


def disaggregated(snapshot: Snapshot, query: RouteQuery, *, pick: Pick) -> Decision:
    """Prefill on one worker and decode on another, from static pools of any sizes.

    Where one of the pools has no worker left, the other serves whole requests: every worker can do both. Attached
    servers take, whole, what finds no room there.
    """
    servers = usable(snapshot, query, besides=(PREFILL, DECODE))
    servers = servers[~snapshot.hands_off[servers]]
    decision = _split(snapshot, query, pick)
    if decision.placement is None and len(servers):
        return _local(servers, snapshot, query, pick, "attached servers take no handoff")
    return decision


def _split(snapshot: Snapshot, query: RouteQuery, pick: Pick) -> Decision:
    """Over workers of our own: no KV goes to or from an attached server."""
    prefills = usable(snapshot, query, besides=(DECODE,))
    prefills = prefills[snapshot.hands_off[prefills]]
    decodes = usable(snapshot, query, besides=(PREFILL,))
    decodes = decodes[snapshot.hands_off[decodes]]
    if not len(prefills) or not len(decodes):
        missing = "decode" if len(prefills) else "prefill"
        rows = prefills if len(prefills) else decodes
        return _local(rows, snapshot, query, pick, f"no {missing} worker is placeable")
    if not len(linked := connected(snapshot, query, prefills, decodes, whole=True)):
        rows = np.union1d(prefills, decodes)
        return _local(rows, snapshot, query, pick, "no prefill worker can connect to a decode worker")
    prefills = linked[takes_prompt(snapshot, query, linked)]
    decodes = decodes[snapshot.decoding[decodes] < snapshot.slots[decodes]]
    if not len(prefills):
        return Decision(placement=None, reason="every prefill worker's window is full")
    if not len(decodes):
        return Decision(placement=None, reason="every decode worker's slots are taken")
    if not len(prefills := connected(snapshot, query, prefills, decodes, whole=True)):
        return Decision(placement=None, reason="every decode worker with a slot is out of a prefill worker's reach")
    prefill = _source(snapshot, query, prefills, pick)
    reached = within_reach(snapshot, query, prefill, decodes)
    decode = pick(snapshot, query, reached, decode_load(snapshot, reached))
    told = left_out(snapshot, query, prefill, decodes if decode == prefill else np.array([decode], np.intp))
    names = snapshot.ids
    return Decision(
        placement=Placement(names[prefill], names[decode]),
        reason=f"split: {snapshot.ahead_tokens[prefill, -1]:.0f} prompt tokens were queued on {names[prefill]} before "
        f"this request, {names[decode]} decodes {snapshot.decoding[decode]}{told and f'; {told}'}",
    )


def _source(snapshot: Snapshot, query: RouteQuery, rows: Rows, pick: Pick) -> int:
    """The row to prefill on: of a request that is placed again, where most of its KV has survived, whatever the rule.

    Else it would be computed a second time wherever there is least to do, while the worker that has it stands by.
    """
    if query.excluded and query.cached[rows].any():
        pick = longest_prefix
    return pick(snapshot, query, rows, prompt_load(snapshot, rows))


def thresholds(snapshot: Snapshot, query: RouteQuery, *, pick: Pick) -> Decision:
    """Dynamo's rule: short and mostly cached prompts are prefilled where they decode, others on a prefill worker."""
    decodes = usable(snapshot, query, besides=(PREFILL,))
    best = int(query.cached[decodes].max(initial=0))
    uncached = query.prompt_tokens - best
    if len(decodes) and uncached < min(_LOCAL_TOKENS, _LOCAL_SHARE * query.prompt_tokens):
        return _local(decodes, snapshot, query, longest_prefix, f"{uncached} uncached tokens are few")
    return disaggregated(snapshot, query, pick=pick)


def _local(rows: Rows, snapshot: Snapshot, query: RouteQuery, pick: Pick, why: str) -> Decision:
    if not len(rows):
        return Decision(placement=None, reason="no worker is placeable")
    rows = rows[(snapshot.decoding[rows] < snapshot.slots[rows]) & takes_prompt(snapshot, query, rows)]
    if not len(rows):
        return Decision(placement=None, reason="every worker is at its limit of requests or of prompt tokens in flight")
    row = int(rows[0])
    if len(rows) > 1:
        row = pick(snapshot, query, rows, prompt_load(snapshot, rows) + decode_load(snapshot, rows))
    name = snapshot.ids[row]
    return Decision(placement=Placement(name, name), reason=f"{why}: {name} decodes {snapshot.decoding[row]}")


def usable(snapshot: Snapshot, query: RouteQuery, besides: tuple[int, ...] = ()) -> Rows:
    """Rows that may be used, `besides` those of some roles; those that failed this request only when there is no
    other."""
    allowed = snapshot.placeable
    for role in besides:
        allowed = allowed & (snapshot.role != role)
    if not query.portable:
        allowed = allowed & snapshot.hands_off
    rows = allowed.nonzero()[0]
    if query.excluded:
        kept = [row for row in rows.tolist() if snapshot.ids[row] not in query.excluded]
        rows = np.array(kept, np.intp) if kept else rows
    return rows


def takes_prompt(snapshot: Snapshot, query: RouteQuery, rows: Rows) -> NDArray[np.bool_]:
    """An idle worker takes any prompt; a busy one only what its window still holds."""
    fits = prompt_load(snapshot, rows) + query.prompt_tokens - query.cached[rows] <= snapshot.window_tokens
    takes: NDArray[np.bool_] = fits | (snapshot.prefilling[rows] == 0)
    return takes


def prompt_load(snapshot: Snapshot, rows: Rows) -> Numbers:
    load: Numbers = snapshot.ahead_tokens[rows, -1]
    return load


def decode_load(snapshot: Snapshot, rows: Rows) -> Numbers:
    load: Numbers = _DECODE_WEIGHT * snapshot.decoding[rows].astype(np.float64)
    return load


PICKS: dict[str, Pick] = {"least-loaded": least_loaded, "round-robin": round_robin}

BASELINES: dict[str, Callable[..., Decision]] = {
    "single": whole,
    "replicated": whole,
    "disaggregated": disaggregated,
    "thresholds": thresholds,
}
FIXED: dict[str, Policy] = {
    "least-loaded": partial(whole, pick=least_loaded),
    "round-robin": partial(whole, pick=round_robin),
    "random": partial(whole, pick=at_random),
    "prefix-only": partial(whole, pick=longest_prefix),
}
