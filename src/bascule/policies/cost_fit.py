"""A cost model from measured steps: non-negative, by relative error, unmoved by outliers and by what was not measured.

Minimised is, over steps with prediction p and time t, and coefficients x that were x0 before,

    sum |p / t - 1|  +  trust * sum (x / x0 - 1)^2

The first sum is one of absolute relative errors, so a step that took far too long (a stopped process, a page fault)
pulls no harder than any other; in squares it is what iteratively reweighted least squares solve. The second keeps each
coefficient that these steps say nothing of where it was. Coefficients below zero are held at zero (active set).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bascule.policies.cost import KNOTS, Floats, decode_seconds
from bascule.types import CostModel

_TRUST = 0.1
"""Of a model that runs. With ten times as much, a machine twice as slow needs several refits to be believed."""
_LITTLE_TRUST = 0.01
"""Of one that is a first guess."""
_SCALARS = ("step_s", "token_s", "pair_s", "context_s", "draw_s")
_DEEP = 256
"""Tokens that a prompt's tokens have to attend to, on average, for what pairs cost to show. By steps that have fewer, a
first guess would take a part of what each token costs for it, and long prompts to be many times as dear as they are."""
_SMALL = 0.02
"""Relative errors below this count in squares: no clock and no machine is better than that."""
_ROUNDS = 10


class StepSample(NamedTuple):
    """What a step had in it, and what it took."""

    new: int
    """Tokens of its prefill parts."""
    pairs: float
    """Pairs of new token and token it attends to, of these."""
    behind: int
    """Tokens of context before them."""
    streams: int
    context: int
    """Tokens of context of the streams."""
    seconds: float


def step_sample(parts: Iterable[tuple[int, int]], seconds: float) -> StepSample:
    """Of a step over `parts`, each (tokens before it, its tokens); one token behind others is a stream's."""
    new = behind = streams = context = 0
    pairs = 0.0
    for start, tokens in parts:
        if start and tokens == 1:
            streams += 1
            context += start
        else:
            new += tokens
            behind += start
            pairs += tokens * (start + tokens / 2)
    return StepSample(new, pairs, behind, streams, context, seconds)


def fit(samples: Sequence[StepSample], start: CostModel) -> CostModel:
    """The model that `samples` speak for, coming from `start`; steps without a positive finite time are left out.

    A `start` of nothing but zeros knows nothing, and has no say.
    """
    table = _usable(samples)
    if not len(table):
        return start
    trust = _TRUST
    if start == CostModel():
        # A line through everything first, so that a table entry without a sample has something to stay at.
        trust = _LITTLE_TRUST
        new, pairs = table[:, 0], table[:, 1]
        if not (pairs > _DEEP * new).any():
            table = table.copy()
            table[:, 1] = 0.0
        start = _model(_solved(_terms(table, as_table=False), table[:, -1], np.zeros(len(_SCALARS)), trust))
    return _model(_solved(_terms(table, as_table=True), table[:, -1], _coefficients(start), trust))


def predicted(model: CostModel, samples: Sequence[StepSample]) -> Floats:
    """What `model` says of each of `samples`, in seconds [samples]."""
    return _predicted(model, _table(samples))


def median_error(model: CostModel, samples: Sequence[StepSample]) -> float | None:
    """Median of |predicted - measured| / measured over the usable ones of `samples`; None if there are none."""
    table = _usable(samples)
    if not len(table):
        return None
    return float(np.median(np.abs(_predicted(model, table) / table[:, -1] - 1)))


def _predicted(model: CostModel, table: Floats) -> Floats:
    own: Floats = _terms(table, as_table=True) @ _coefficients(model)
    return own


def _coefficients(model: CostModel) -> Floats:
    """The scalars, then a table of KNOTS entries."""
    table = [decode_seconds(model, 1 << knot, 0) for knot in range(KNOTS)]
    return np.array([*(getattr(model, name) for name in _SCALARS), *table])


def _table(samples: Sequence[StepSample]) -> Floats:
    """[samples, fields]"""
    return np.array(samples, np.float64).reshape(-1, len(StepSample._fields))


def _usable(samples: Sequence[StepSample]) -> Floats:
    """[samples, fields], those with a time and with something in them."""
    table = _table(samples)
    good: NDArray[np.bool_] = np.isfinite(table).all(1) & (table[:, -1] > 0) & (table[:, 0] + table[:, 3] > 0)
    return table[good]


def _terms(table: Floats, *, as_table: bool) -> Floats:
    """What each coefficient is multiplied by in each step: [samples, scalars], then the table's KNOTS columns."""
    new, pairs, behind, streams, context, _ = table.T
    beside = new > 0
    scalars = np.stack([np.ones(len(table)), new + streams, pairs, behind + context, streams * beside], axis=1)
    if not as_table:
        return scalars
    scalars[~beside, :2] = 0.0
    alone = np.where(beside, 1.0, np.maximum(streams, 1.0))
    knot = np.minimum(np.frexp(alone)[1] - 1, KNOTS - 2)
    share = np.ldexp(alone, -knot) - 1
    hats = np.zeros((len(table), KNOTS))
    rows = np.arange(len(table))
    hats[rows, knot], hats[rows, knot + 1] = 1 - share, share
    return np.hstack([scalars, hats * ~beside[:, None]])


def _model(coefficients: Floats) -> CostModel:
    scalars, knots = coefficients[: len(_SCALARS)], coefficients[len(_SCALARS) :]
    rising = np.maximum.accumulate(knots) if len(knots) else knots  # more streams never take less
    return CostModel(**dict(zip(_SCALARS, scalars.tolist(), strict=True)), stream_s=tuple(rising.tolist()))


def _solved(terms: Floats, seconds: Floats, before: Floats, trust: float) -> Floats:
    """The coefficients that minimise what the module's docstring says."""
    relative = terms / seconds[:, None]
    # In units of what it was, or, of what was nothing, of what would make up a step by itself.
    largest = relative.max(axis=0)
    unit = np.where(before > 0, before, 1 / np.where(largest > 0, largest, np.inf))
    scaled, kept = relative * unit, np.where(before > 0, trust, _LITTLE_TRUST)
    anchor = (before > 0).astype(np.float64)
    solution = anchor.copy()
    for _ in range(_ROUNDS):
        weight = 1 / np.maximum(np.abs(scaled @ solution - 1), _SMALL)
        weighted = scaled * weight[:, None]
        latest = _non_negative(weighted.T @ scaled + 2 * np.diag(kept), weighted.sum(axis=0) + 2 * kept * anchor)
        done = np.abs(latest - solution).max() < 1e-3
        solution = latest
        if done:
            break
    found: Floats = solution * unit
    return found


def _non_negative(matrix: Floats, right: Floats) -> Floats:
    """The x >= 0 that minimises x'Mx / 2 - r'x, by Lawson and Hanson's active sets, from all coefficients on."""
    free = np.ones(len(right), np.bool_)
    solution = np.zeros(len(right))
    for _ in range(3 * len(right)):
        solution[:] = 0.0
        solution[free] = np.linalg.solve(matrix[np.ix_(free, free)], right[free])
        if (solution < 0).any():
            free &= solution > 0
            continue
        pull = np.where(free, 0.0, right - matrix @ solution)
        if pull.max() <= 1e-9:
            break
        free[pull.argmax()] = True
    return np.maximum(solution, 0.0)
