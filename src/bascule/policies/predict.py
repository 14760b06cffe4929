"""What a placement would bring, for many workers at once: queueing, prefill, what is left of the handoff, the pace of
decoding, and the harm to those already there. All times in seconds, all arrays one entry a row that is asked for.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.policies.cost import CostColumns, Floats
from bascule.policies.snapshot import RouteQuery, Snapshot, size_of
from bascule.types import LinkCost

Rows = NDArray[np.intp]

LEAST_CHUNK = 32
"""Prompt tokens that a step takes on beside streams, however tight their gap bound is."""
GAP_MARGIN = 0.8
"""Share of the gap bound that chunks are planned for."""
SAME_MACHINE = LinkCost(0.002, 4e9)
OTHER_MACHINE = LinkCost(0.005, 1e9)
"""Of links that have not been measured."""


class PrefillSide(Struct, frozen=True):
    """What prefilling the prompt on each of `rows` means; `own_s` is the work itself, streams beside it left out."""

    rows: Rows
    cached: Floats
    queue_s: Floats
    prefill_s: Floats
    own_s: Floats
    chunk: Floats
    """Tokens of the prompt in one step."""
    step_s: Floats
    """How long such a step takes: the gap that it makes in the streams beside it."""
    harm_s: Floats


class DecodeSide(Struct, frozen=True):
    """What decoding the output on each of `rows` means."""

    rows: Rows
    step_s: Floats
    """A step with this stream in it and no prompt."""
    tpot_s: Floats
    tpot_before_s: Floats
    """Without this stream."""
    gap_s: Floats
    harm_s: Floats


def prefill_side(snapshot: Snapshot, query: RouteQuery, rows: Rows) -> PrefillSide:
    """Predict the way to the first token on each of `rows`."""
    cost = snapshot.cost.take(rows)
    cached = query.cached[rows].astype(np.float64)
    new = np.maximum(query.prompt_tokens - cached, 1.0)
    streams, context = snapshot.streams[rows].astype(np.float64), snapshot.context_tokens[rows]
    base = np.where(streams > 0, np.maximum(cost.mixed(new * 0, new * 0, streams, context), 0.0), cost.step_s)
    token = cost.token_s + cost.pair_s * (cached + new / 2)
    chunk = _chunk(query, base, token, streams)
    backlog = snapshot.backlog_tokens[rows]
    total = backlog.sum(axis=1)
    ahead = backlog[:, : size_of(int(new.max(initial=1.0))) + 1].sum(axis=1)
    residual = np.where(total > 0, (np.minimum(total, chunk) * token + base) / 2, cost.decode(streams, context) / 2)
    own = new * token
    behind = snapshot.prefilling[rows] * np.divide(total - ahead, total, out=np.zeros_like(total), where=total > 0)
    return PrefillSide(
        rows=rows,
        cached=cached,
        queue_s=residual + ahead * token + ahead / chunk * base,
        prefill_s=own + np.ceil(new / chunk) * (base + cost.context_s * (cached + (new - chunk).clip(0) / 2)),
        own_s=own,
        chunk=np.minimum(chunk, new),
        step_s=base + np.minimum(chunk, new) * token,
        harm_s=(streams + behind) * own,
    )


def decode_side(snapshot: Snapshot, query: RouteQuery, rows: Rows) -> DecodeSide:
    """Predict the pace of the output on each of `rows`."""
    cost = snapshot.cost.take(rows)
    decoding, context = snapshot.decoding[rows].astype(np.float64), snapshot.context_tokens[rows]
    before = cost.decode(decoding, context)
    after = cost.decode(decoding + 1, context + query.prompt_tokens + query.output_tokens / 2)
    free = 1.0 - snapshot.prefill_share[rows]
    shared = (snapshot.prefill_share[rows] > _SHARED) | (snapshot.prefilling[rows] > 0)
    return DecodeSide(
        rows=rows,
        step_s=after,
        tpot_s=after / free,
        tpot_before_s=before / free,
        gap_s=np.where(shared, np.maximum(after, _usual_gap(query, cost, decoding + 1, context)), after),
        harm_s=decoding * query.output_tokens * np.maximum(after - before, 0.0) / free,
    )


_SHARED = 0.02
"""A worker that spends less of its time on prompts than this decodes undisturbed."""


def exposed_transfer(snapshot: Snapshot, query: RouteQuery, source: Rows, target: Rows, chunk: Floats) -> Floats:
    """What is left of each handoff from `source[i]` to `target[i]` once its last chunk, of `chunk[i]` tokens, is
    computed."""
    same = snapshot.machine[source] == snapshot.machine[target]
    latency = np.where(same, SAME_MACHINE.latency_s, OTHER_MACHINE.latency_s)
    rate = np.where(same, SAME_MACHINE.bytes_per_s, OTHER_MACHINE.bytes_per_s)
    if snapshot.links:
        for index, ends in enumerate(zip(source, target, strict=True)):
            link = snapshot.links.get((snapshot.ids[ends[0]], snapshot.ids[ends[1]]))
            if link is not None:
                latency[index], rate[index] = link.latency_s, link.bytes_per_s
    exposed: Floats = latency + chunk * query.kv_token_bytes / rate
    return exposed


def _chunk(query: RouteQuery, base: Floats, token: Floats, streams: Floats) -> Floats:
    """Tokens of the prompt that go into a step, which streams shorten to keep their gap."""
    spare = np.maximum(GAP_MARGIN * query.gap_planned_s - base, 0.0)
    fitting = np.clip(spare / np.maximum(token, 1e-12), LEAST_CHUNK, query.chunk_tokens)
    chunk: Floats = np.where(streams > 0, fitting, float(query.chunk_tokens))
    return chunk


def _usual_gap(query: RouteQuery, cost: CostColumns, streams: Floats, context: Floats) -> Floats:
    """How long a step with a chunk of somebody's prompt takes."""
    base = cost.mixed(streams * 0, streams * 0, streams, context)
    chunk = _chunk(query, base, cost.token_s, streams)
    gap: Floats = base + chunk * cost.token_s
    return gap
