"""What a placement would bring, for all workers at once: queueing, prefill, what is left of the handoff, the pace of
decoding, and the harm to those already there. All times in seconds, all arrays one entry a row of the snapshot.

One request more on a worker, waiting or decoding, never makes any of this better; tests hold it to that.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.policies.batch import GAP_MARGIN, LEAST_CHUNK
from bascule.policies.cost import Floats
from bascule.policies.handoff import pushed_seconds
from bascule.policies.snapshot import SIZES, RouteQuery, Snapshot

_SHARED = 0.02
"""A worker that spends less of its time on prompts than this decodes undisturbed."""


class PrefillSide(Struct, frozen=True):
    """What prefilling the prompt on each worker means."""

    queue_s: Floats
    load_s: Floats
    """What bringing KV takes longer than the queue; 0 where none is brought."""
    prefill_s: Floats
    have: NDArray[np.int64]
    """Prompt tokens that need not be computed: cached ones, and those that are brought because it is quicker."""
    fetches: NDArray[np.bool_]
    """Where they are brought from the peer, and not from the store."""
    last_tokens: Floats
    """At most so many are in the last chunk, whose handoff nothing hides."""
    step_s: Floats
    """A step with a chunk of the prompt: the gap that it makes in the streams beside it."""
    harm_s: Floats


class DecodeSide(Struct, frozen=True):
    """What decoding the output on each worker means."""

    step_s: Floats
    """A step with this stream in it and no prompt."""
    tpot_s: Floats
    ahead_s: Floats
    """Work on prompts that are there, which this stream's steps have to carry."""
    tpot_more_s: Floats
    """By how much this stream slows those beside it."""
    gap_s: Floats
    harm_s: Floats


def predict(snapshot: Snapshot, query: RouteQuery) -> tuple[PrefillSide, DecodeSide]:
    """Predict the way to the first token, and the way on from there, on each worker."""
    context = snapshot.context_tokens
    own_context = query.prompt_tokens + query.output_tokens / 2
    # On the first axis: the streams that run now, and those that will with this one.
    streams = np.array([snapshot.streams, snapshot.decoding + 1.0])
    contexts = np.array([context * (snapshot.streams > 0), context + own_context])
    alone, beside, slope = snapshot.cost.steps(streams, contexts)
    brought = _worth_bringing(snapshot, query)
    new = np.maximum(query.prompt_tokens - brought.have, 1.0)
    token = snapshot.cost.token_s + snapshot.cost.pair_s * (query.prompt_tokens - new / 2)
    chunk = _chunk(snapshot, query, beside, token)
    prefill = _prefill(snapshot, query, new, token, streams[0], beside[0], chunk[0], brought)
    more = slope[1] + snapshot.cost.context_s * own_context
    return prefill, _decode(snapshot, query, alone[1], more, beside[1] + chunk[1] * token)


class _Brought(Struct, frozen=True):
    """What each worker has once it has all that is quicker brought than computed."""

    have: NDArray[np.int64]
    seconds: Floats
    fetches: NDArray[np.bool_]


def _worth_bringing(snapshot: Snapshot, query: RouteQuery) -> _Brought:
    """Each worker brings KV from where it is soonest through with the prompt: the store, or the peer, or neither."""
    have, seconds, fetches = query.cached, _NOTHING, _NOWHERE
    if query.stored is None and query.peer < 0:
        return _Brought(have, seconds, fetches)
    least = _alone(snapshot, query, have)
    if query.stored is not None and query.load_s is not None:
        took = _alone(snapshot, query, query.stored) + query.load_s
        quicker = (query.stored > have) & (took < least)
        have, seconds = np.where(quicker, query.stored, have), np.where(quicker, query.load_s, 0.0)
        least = np.where(quicker, took, least)
    if query.peer >= 0:
        rows = np.flatnonzero((query.cached < query.peer_tokens) & snapshot.hands_off)
        rows = rows[rows != query.peer]
        if snapshot.unreached:  # who asks must reach the peer, and the peer who asks
            rows = np.setdiff1d(rows, np.array(snapshot.estranged(query.peer), np.intp))
        fetched = np.maximum(query.cached, query.peer_tokens)
        fetch_s = np.full(len(fetched), np.inf)
        more = (fetched - query.cached)[rows].astype(np.float64)
        source = np.full(len(rows), query.peer, np.intp)
        fetch_s[rows] = query.peer_load_s + pushed_seconds(snapshot, query, source, rows, more)
        fetches = _alone(snapshot, query, fetched) + fetch_s < least
        have, seconds = np.where(fetches, fetched, have), np.where(fetches, fetch_s, seconds)
    return _Brought(have, seconds, fetches)


def _alone(snapshot: Snapshot, query: RouteQuery, have: NDArray[np.int64]) -> Floats:
    """Seconds to compute what is behind the `have` first tokens on each worker, with nothing beside it."""
    new = query.prompt_tokens - have
    alone: Floats = new * (snapshot.cost.token_s + snapshot.cost.pair_s * (query.prompt_tokens - new / 2))
    return alone


_NOTHING = np.zeros(1)
_NOWHERE = np.zeros(1, np.bool_)


def _prefill(
    snapshot: Snapshot,
    query: RouteQuery,
    new: Floats,
    token: Floats,
    streams: Floats,
    base: Floats,
    chunk: Floats,
    brought: _Brought,
) -> PrefillSide:
    """`new` tokens of `token` seconds, beside streams that take `base` and let a step have `chunk` tokens."""
    chunk = np.where(streams > 0, chunk, snapshot.chunk_tokens)
    size = np.minimum(np.frexp(new)[1] - 1, SIZES - 1)
    size += np.arange(0, snapshot.ahead_tokens.size, SIZES)
    ahead, total = snapshot.ahead_tokens.take(size), snapshot.ahead_tokens[:, -1]
    # The step that runs now: one of streams, or one with a chunk in it of those that have to keep a gap.
    chunk_now = np.minimum(np.minimum(total, snapshot.chunk_tokens) * token, GAP_MARGIN * query.gap_planned_s)
    running = base * ((streams > 0) | (total > 0))
    own = new * token
    lag = snapshot.lag.take(np.arange(0, 2 * len(new), 2) + (new > snapshot.chunk_tokens))
    queue = lag * (np.maximum(chunk_now + running - snapshot.step_age_s, 0.0) + ahead * (token + base / chunk))
    return PrefillSide(
        queue_s=queue,
        load_s=np.maximum(brought.seconds - queue, 0.0),
        have=brought.have,
        fetches=brought.fetches,
        prefill_s=lag * (own + np.ceil(new / chunk) * base),
        last_tokens=np.minimum(new, snapshot.chunk_tokens),
        step_s=base + np.minimum(chunk, new) * token,
        harm_s=(streams + snapshot.prompts_behind.take(size)) * own,
    )


def _decode(snapshot: Snapshot, query: RouteQuery, after: Floats, more: Floats, shared: Floats) -> DecodeSide:
    """Steps with this stream in them: of streams alone (`more` is its part), and with a chunk of somebody's prompt."""
    share, stretch = snapshot.prefill_share, snapshot.stretch
    more = more * stretch
    return DecodeSide(
        step_s=after,
        tpot_s=after * stretch,
        ahead_s=snapshot.ahead_tokens[:, -1] * snapshot.cost.token_s,
        tpot_more_s=more,
        gap_s=np.where((share > _SHARED) | (snapshot.prefilling > 0), shared, after),
        harm_s=query.output_tokens * snapshot.decoding * more,
    )


def _chunk(snapshot: Snapshot, query: RouteQuery, base: Floats, token: Floats) -> Floats:
    """Tokens of a prompt that go into a step beside streams, which shorten it to keep their gap."""
    fitting = (GAP_MARGIN * query.gap_planned_s - base) / np.maximum(token, 1e-12)
    chunk: Floats = np.minimum(np.maximum(fitting, LEAST_CHUNK), snapshot.chunk_tokens)
    return chunk
