"""What predictions are computed from, gathered from a snapshot: of all workers at once, or of a single one.

The formulas are written once, for both (`Number`): of all workers they run over arrays, one entry a row; of one over
Python's own floats, for which an array's every operation would cost more than all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.policies.cost import Floats
from bascule.policies.handoff import pushed_seconds
from bascule.policies.snapshot import DECODE, MIXED, SIZES, RouteQuery, Snapshot, size_of

Number = TypeVar("Number", float, Floats)

_LOAD_S = 1e-10
"""Price of a request that is there, to order workers that are equal otherwise."""


class Arithmetic(Struct, Generic[Number], frozen=True):
    """What is written differently for arrays and for floats."""

    least: Callable[[Any, Any], Number]
    most: Callable[[Any, Any], Number]
    choose: Callable[[Any, Any, Any], Number]
    """The second where the first is true, else the third."""
    up: Callable[[Any], Number]
    tanh: Callable[[Any], Number]


OF_ROWS: Arithmetic[Floats] = Arithmetic(np.minimum, np.maximum, np.where, np.ceil, np.tanh)
_OF_ONE: Arithmetic[float] = Arithmetic(
    least=min,
    most=max,
    choose=lambda which, one, other: one if which else other,
    up=lambda number: -(-number // 1.0),  # math.ceil raises where numpy's says that there is no number
    tanh=math.tanh,
)


class Brought(Struct, Generic[Number], frozen=True):
    """What each worker has once it has all that is quicker brought than computed."""

    have: Any
    """Prompt tokens that need not be computed: cached ones, and those that are brought (integers)."""
    seconds: Number
    """0 where none is brought."""
    fetches: Any
    """Where they are brought from the peer, and not from the store (booleans)."""


class Steps(Struct, Generic[Number], frozen=True):
    """A step with some streams in it, in seconds."""

    alone: Number
    beside: Number
    """With a prompt in it, the prompt's own tokens left out."""
    slope: Number
    """What one stream more adds."""


class Workers(Struct, Generic[Number], frozen=True, kw_only=True):
    """Of each worker, beside a prompt that is to be computed there; see `Snapshot` for what is not said here."""

    math: Arithmetic[Number]
    brought: Brought[Number]
    new: Number
    """Tokens of the prompt to be computed."""
    ahead: Number
    """Tokens of others that go before it."""
    behind: Number
    """Prompts that it goes before."""
    total: Number
    """Tokens of all others."""
    streams: Number
    decoding: Number
    prefilling: Number
    lag: Number
    queue_lag: Number
    slack_s: Number
    chunk_tokens: Number
    step_age_s: Number
    share: Number
    stretch: Number
    line_s: Number
    """Seconds of prompts in the line that its streams will have to carry."""
    order_s: Number
    """Next to nothing: what orders workers that are equal else."""
    token_s: Number
    pair_s: Number
    context_s: Number
    one_s: Number
    steps: Callable[[Number, Number], tuple[Steps[Number], Steps[Number]]]
    """Steps of so many streams, and of so many others, with this request among the latter."""


def own_context(query: RouteQuery) -> float:
    """Tokens that this request's stream will see on average."""
    return query.prompt_tokens + query.output_tokens / 2


def of_all(snapshot: Snapshot, query: RouteQuery) -> Workers[Floats]:
    """All rows."""
    brought, cost = worth_bringing(snapshot, query), snapshot.cost
    new = np.maximum(query.prompt_tokens - brought.have, 1.0)
    size = np.minimum(np.frexp(new)[1] - 1, SIZES - 1)
    size += _starts(len(new), SIZES)

    def steps(before: Floats, after: Floats) -> tuple[Steps[Floats], Steps[Floats]]:
        context = snapshot.context_tokens
        contexts = np.array([context * (before > 0), context + own_context(query)])
        found = cost.steps(np.array([before, after]), contexts)
        first, second = (Steps(*(each[at] for each in found)) for at in (0, 1))
        return first, second

    order = _LOAD_S * (snapshot.decoding + snapshot.prefilling)
    if query.session >= 0:
        order[query.session] -= _LOAD_S
    return Workers(
        math=OF_ROWS,
        brought=brought,
        new=new,
        ahead=snapshot.ahead_tokens.take(size),
        behind=snapshot.prompts_behind.take(size),
        total=snapshot.ahead_tokens[:, -1].copy(),  # what lies side by side is quicker to read
        streams=snapshot.streams,
        decoding=snapshot.decoding,
        prefilling=snapshot.prefilling,
        lag=snapshot.lag.take(_starts(len(new), 3) + (new > snapshot.chunk_tokens)),
        queue_lag=snapshot.lag[:, 2],
        slack_s=snapshot.slack_s,
        chunk_tokens=snapshot.chunk_tokens,
        step_age_s=snapshot.step_age_s,
        share=snapshot.prefill_share,
        stretch=snapshot.stretch,
        line_s=_line_s(snapshot, query),
        order_s=order,
        token_s=cost.token_s,
        pair_s=cost.pair_s,
        context_s=cost.context_s,
        one_s=cost.one_s,
        steps=steps,
    )


def of_one(snapshot: Snapshot, query: RouteQuery, row: int) -> Workers[float]:
    """A single row."""
    brought, cost = _brought_to(snapshot, query, row), snapshot.cost
    new = float(max(query.prompt_tokens - brought.have, 1))
    size = size_of(int(new))
    chunk_tokens = snapshot.chunk_tokens.item(row)

    def steps(before: float, after: float) -> tuple[Steps[float], Steps[float]]:
        context = snapshot.context_tokens.item(row)
        first = Steps(*cost.steps_of(row, before, context if before > 0 else 0.0))
        return first, Steps(*cost.steps_of(row, after, context + own_context(query)))

    decoding, prefilling = snapshot.decoding.item(row), snapshot.prefilling.item(row)
    return Workers(
        math=_OF_ONE,
        brought=brought,
        new=new,
        ahead=snapshot.ahead_tokens.item(row, size),
        behind=snapshot.prompts_behind.item(row, size),
        total=snapshot.ahead_tokens.item(row, SIZES - 1),
        streams=snapshot.streams.item(row),
        decoding=decoding,
        prefilling=prefilling,
        lag=snapshot.lag.item(row, int(new > chunk_tokens)),
        queue_lag=snapshot.lag.item(row, 2),
        slack_s=snapshot.slack_s.item(row),
        chunk_tokens=chunk_tokens,
        step_age_s=snapshot.step_age_s.item(row),
        share=snapshot.prefill_share.item(row),
        stretch=snapshot.stretch.item(row),
        line_s=_line_s(snapshot, query).item(row) if query.line_s else 0.0,
        order_s=_LOAD_S * (decoding + prefilling - (query.session == row)),
        token_s=cost.token_s.item(row),
        pair_s=cost.pair_s.item(row),
        context_s=cost.context_s.item(row),
        one_s=cost.one_s.item(row),
        steps=steps,
    )


def _line_s(snapshot: Snapshot, query: RouteQuery) -> Floats:
    """What waits in the line comes to all that take prompts, and hinders the streams of those that decode, too."""
    if not query.line_s:
        return _NOTHING
    feeders = snapshot.placeable & (snapshot.role != DECODE)
    each_s: Floats = query.line_s / max(int(np.count_nonzero(feeders)), 1) * (feeders & (snapshot.role == MIXED))
    return each_s


def worth_bringing(snapshot: Snapshot, query: RouteQuery) -> Brought[Floats]:
    """Each worker brings KV from where it is soonest through with the prompt: the store, or the peer, or neither."""
    have, seconds, fetches = query.cached, _NOTHING, _NOWHERE
    if not _brings(query):
        return Brought(have, seconds, fetches)
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
    return Brought(have, seconds, fetches)


def _brought_to(snapshot: Snapshot, query: RouteQuery, row: int) -> Brought[float]:
    if not _brings(query):
        return Brought(query.cached.item(row), 0.0, False)
    brought = worth_bringing(snapshot, query)
    seconds, fetches = (each.take(row, mode="clip").item() for each in (brought.seconds, brought.fetches))
    return Brought(brought.have.item(row), seconds, fetches)


def _brings(query: RouteQuery) -> bool:
    return query.stored is not None or query.peer >= 0


def _alone(snapshot: Snapshot, query: RouteQuery, have: NDArray[np.int64]) -> Floats:
    """Seconds to compute what is behind the `have` first tokens on each worker, with nothing beside it."""
    new = query.prompt_tokens - have
    alone: Floats = new * (snapshot.cost.token_s + snapshot.cost.pair_s * (query.prompt_tokens - new / 2))
    return alone


_NOTHING = np.zeros(1)
_NOWHERE = np.zeros(1, np.bool_)


@lru_cache(maxsize=4)
def _starts(rows: int, width: int) -> NDArray[np.intp]:
    """Where each row begins in a flat table [rows, width]."""
    return np.arange(0, rows * width, width)
