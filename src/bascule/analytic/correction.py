"""From physics to the answer: the trees' correction, and clients that never make anything faster by being more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from msgspec import Struct

from bascule.analytic.boosting import Growth, find_edges, grow
from bascule.analytic.physics import Array, Efficiency
from bascule.analytic.questions import Questions, take
from bascule.analytic.serving import Timing
from bascule.analytic.trees import Tree, bins_of, tree_sum

_DATED, _UNDATED = 0.7, 0.3
"""Weights of a row with and without the date and version of its framework: each is learnt from both ways."""


class Correction(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Trees over the features of `Questions.features`, for TTFT and for TPOT."""

    features: list[str]
    edges: list[list[float]]
    ttft: list[Tree]
    tpot: list[Tree]


def physical(questions: Questions, efficiency: Efficiency) -> Array:
    """Logarithms of TTFT and TPOT in seconds, [rows, 2], by physics alone."""
    return _logarithms(questions.timing(efficiency))


def corrected(correction: Correction, questions: Questions, efficiency: Efficiency) -> Array:
    """The same with the trees' corrections."""
    timing = questions.timing(efficiency)
    values = questions.features(timing)
    bins = bins_of(np.column_stack([values[name] for name in correction.features]), correction.edges)
    more = np.column_stack([tree_sum(trees, bins) for trees in (correction.ttft, correction.tpot)])
    return _logarithms(timing) + more


def learn(questions: Questions, efficiency: Efficiency, measured: Array, growth: Growth) -> Correction:
    """Trees for what physics leaves of `measured`: logarithms of TTFT and TPOT in seconds, [rows, 2]."""
    timing = questions.timing(efficiency)
    both = [each.features(timing) for each in (questions, questions.undated())]
    values = np.vstack([np.column_stack(list(each.values())) for each in both])
    edges = find_edges(values)
    bins = bins_of(values, edges)
    weights = np.repeat([_DATED, _UNDATED], len(questions))
    errors = np.tile(measured - _logarithms(timing), (2, 1))
    ttft, tpot = (grow(bins, errors[:, side], weights, growth) for side in (0, 1))
    return Correction(features=list(both[0]), edges=edges, ttft=ttft, tpot=tpot)


def never_falling(
    questions: Questions, efficiency: Efficiency, answer: Callable[[Questions, Efficiency], Array]
) -> Array:
    """`answer` (logarithms, [rows, 2]), made so that more clients never wait less.

    Each row is asked at 1, 2, 4, 8 ... clients up to the first number that is not below its own; each answer is at
    least the one before, and the row's own lies on the line between its neighbours. Rows of which nobody said how many
    workers they have are asked as they are: more clients there mean that somebody had more workers.
    """
    clients = np.maximum(1.0, questions.traffic.concurrency)
    counted = ~np.isnan(questions.workers + questions.prefill_workers)
    knots = np.where(counted, np.ceil(np.log2(clients) - 1e-9).astype(np.int64) + 1, 1)
    rows = np.repeat(np.arange(len(questions)), knots)
    starts = np.cumsum(knots) - knots
    knot = np.arange(len(rows)) - np.repeat(starts, knots)
    asked = questions.take(rows).under(np.where(counted[rows], 2.0**knot, clients[rows]))
    answers = answer(asked, take(efficiency, rows))
    for step in range(1, int(knots.max())):
        at = np.flatnonzero(knot == step)
        answers[at] = np.maximum(answers[at], answers[at - 1])
    last = starts + knots - 1
    before = np.maximum(last - 1, starts)
    part = np.clip(np.log2(clients) - (knots - 2), 0.0, 1.0)[:, None]
    result: Array = answers[before] + (answers[last] - answers[before]) * part
    return result


def _logarithms(timing: Timing) -> Array:
    return np.log(np.column_stack([timing.ttft, timing.tpot]))
