"""What a placement would bring, for all workers at once: queueing, prefill, what is left of the handoff, the pace of
decoding, and the harm to those already there. All times in seconds, all arrays one entry a row of the snapshot.

One request more on a worker, waiting or decoding, never makes any of this better; tests hold it to that.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.policies.batch import GAP_MARGIN, LEAST_CHUNK, TPOT_MARGIN
from bascule.policies.cost import Floats
from bascule.policies.handoff import pushed_seconds
from bascule.policies.snapshot import DECODE, MIXED, SIZES, RouteQuery, Snapshot

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
    """With the prompts that wait now, there and in the line, which this stream's steps have to carry."""
    tpot_more_s: Floats
    """By how much this stream slows those beside it."""
    gap_s: Floats
    harm_s: Floats


def predict(snapshot: Snapshot, query: RouteQuery) -> tuple[PrefillSide, DecodeSide]:
    """Predict the way to the first token, and the way on from there, on each worker."""
    context = snapshot.context_tokens
    own_context = query.prompt_tokens + query.output_tokens / 2
    brought = _worth_bringing(snapshot, query)
    new = np.maximum(query.prompt_tokens - brought.have, 1.0)
    size = np.minimum(np.frexp(new)[1] - 1, SIZES - 1)
    size += _starts(len(new), SIZES)
    # On the first axis: the streams that run on average until the prompt is computed, of which those that go before it
    # become some, and those that will with this one.
    behind = snapshot.prompts_behind.take(size)
    coming = (snapshot.prefilling - behind) / 2
    streams = np.array([np.minimum(snapshot.streams + coming, snapshot.decoding), snapshot.decoding + 1.0])
    contexts = np.array([context * (streams[0] > 0), context + own_context])
    alone, beside, slope = snapshot.cost.steps(streams, contexts)
    token = snapshot.cost.token_s + snapshot.cost.pair_s * (query.prompt_tokens - new / 2)
    chunk = _chunk(snapshot, query, beside, token)
    pace = _pace(snapshot, query, streams[0], alone[0], beside[0], token, chunk[0])
    ahead = snapshot.ahead_tokens.take(size)
    total = snapshot.ahead_tokens[:, -1].copy()  # what lies side by side is quicker to read
    prefill = _prefill(snapshot, query, ahead, total, behind, new, token, pace, brought)
    more = slope[1] + snapshot.cost.context_s * own_context
    with_chunk, with_least = (np.maximum(beside[1] + tokens * token, alone[1]) for tokens in (chunk[1], LEAST_CHUNK))
    return prefill, _decode(snapshot, query, total, alone[1], more, with_chunk, with_least)


@lru_cache(maxsize=4)
def _starts(rows: int, width: int) -> NDArray[np.intp]:
    """Where each row begins in a flat table [rows, width]."""
    return np.arange(0, rows * width, width)


class _Pace(Struct, frozen=True):
    """How prompts get on beside the streams of each worker, whose own part of a step is `base` seconds, and which take
    `alone` seconds without: `chunk` tokens a step for the first `fast` tokens, which use up what the streams have saved
    of their TPOT, then `paced` a step."""

    alone: Floats
    base: Floats
    chunk: Floats
    fast: Floats
    paced: Floats

    def steps(self, tokens: Floats) -> Floats:
        """Steps that so many tokens take."""
        slow = np.maximum(tokens - self.fast, 0.0)
        found: Floats = (tokens - slow) / self.chunk + slow / self.paced
        return found


def _pace(
    snapshot: Snapshot, query: RouteQuery, streams: Floats, alone: Floats, base: Floats, token: Floats, chunk: Floats
) -> _Pace:
    """`chunk` is what the gap lets through."""
    chunk = np.where(streams > 0, chunk, snapshot.chunk_tokens)
    kept = TPOT_MARGIN * query.tpot_planned_s
    fast = snapshot.slack_s * chunk / np.maximum(base + chunk * token - kept, 1e-12)
    paced = np.minimum(np.maximum((kept - base) / np.maximum(token, 1e-12), LEAST_CHUNK), chunk)
    return _Pace(alone, base, chunk, fast, paced)


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
    ahead: Floats,
    total: Floats,
    behind: Floats,
    new: Floats,
    token: Floats,
    pace: _Pace,
    brought: _Brought,
) -> PrefillSide:
    """`new` tokens of `token` seconds, with so many tokens of others ahead, in `total`, and so many prompts behind."""
    base, chunk = pace.base, pace.chunk
    # The step that runs now: one of streams, or one with a chunk in it of those that have to keep a gap.
    chunk_now = np.minimum(np.minimum(total, snapshot.chunk_tokens) * token, GAP_MARGIN * query.gap_planned_s)
    running = np.maximum(chunk_now + base * (total > 0), pace.alone)
    own = new * token
    steps = pace.steps(ahead)
    waiting = np.maximum(running - snapshot.step_age_s, 0.0) + ahead * token + steps * base
    queue = snapshot.lag[:, 2] * waiting
    own_steps = np.maximum(np.ceil(new / chunk), pace.steps(ahead + new) - steps)
    lag = snapshot.lag.take(_starts(len(new), 3) + (new > snapshot.chunk_tokens))
    return PrefillSide(
        queue_s=queue,
        load_s=np.maximum(brought.seconds - queue, 0.0),
        have=brought.have,
        fetches=brought.fetches,
        prefill_s=lag * np.maximum(own + own_steps * base, np.maximum(pace.alone, snapshot.cost.one_s)),
        last_tokens=np.minimum(new, snapshot.chunk_tokens),
        step_s=np.maximum(base + np.minimum(chunk, new) * token, pace.alone),
        harm_s=(snapshot.streams + behind) * own,
    )


def _decode(
    snapshot: Snapshot, query: RouteQuery, total: Floats, after: Floats, more: Floats, shared: Floats, least: Floats
) -> DecodeSide:
    """Steps with this stream in them: of streams alone (`more` is its part), with a chunk of somebody's prompt, and
    with the least of one. Prompts slow a stream to the TPOT that workers plan for it, and not further; whatever else
    makes steps longer than predicted, they cannot cut."""
    share, stretch = snapshot.prefill_share, snapshot.stretch
    more = more * stretch
    prompts = total * snapshot.cost.token_s
    if query.line_s:
        feeders = snapshot.placeable & (snapshot.role != DECODE)
        each_s = query.line_s / max(int(np.count_nonzero(feeders)), 1)
        prompts += each_s * (feeders & (snapshot.role == MIXED))
    pace = after * stretch
    carried = np.minimum(pace + prompts / query.output_tokens, np.maximum(pace, shared))
    planned = np.maximum(np.maximum(least, after), TPOT_MARGIN * query.slo.tpot_s)
    return DecodeSide(
        step_s=after,
        tpot_s=np.maximum(pace, np.minimum(carried, planned)),
        tpot_more_s=more,
        gap_s=np.where((share > _SHARED) | (snapshot.prefilling > 0), shared, after),
        harm_s=query.output_tokens * snapshot.decoding * more,
    )


def _chunk(snapshot: Snapshot, query: RouteQuery, base: Floats, token: Floats) -> Floats:
    """Tokens of a prompt that go into a step beside streams, which shorten it to keep their gap."""
    fitting = (GAP_MARGIN * query.gap_planned_s - base) / np.maximum(token, 1e-12)
    chunk: Floats = np.minimum(np.maximum(fitting, LEAST_CHUNK), snapshot.chunk_tokens)
    return chunk
