"""Paired comparison of runs: bootstrap intervals over seeds, who is ahead, from which level on, what no other beats.

Runs of one seed had the same requests, so that what is compared is the difference within a seed. Seeds are what is
drawn again: requests of one run hang together by the queue that they shared, and are no independent witnesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

DRAWS = 2000
EQUAL = 0.03
"""Figures that surely differ by less than this share are equal."""
_SHARES = (0.025, 0.975)
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5th percentiles of Student's distribution with 1, 2, ... degrees of freedom."""
_NORMAL = 1.960

Numbers = NDArray[np.float64]


class Outcome(StrEnum):
    """How one side's figure stands to the other's."""

    MORE = "more"
    LESS = "less"
    EQUAL = "equal"
    """The interval lies within 3 % of 1."""
    UNDECIDED = "undecided"
    """The interval has 1 in it."""


class Ratio(Struct, frozen=True):
    """One side's figure over the other's, with a 95 % interval; `seeds` is how many pairs speak for it."""

    value: float
    lo: float
    hi: float
    seeds: int

    @property
    def outcome(self) -> Outcome:
        if self.seeds < 2:
            return Outcome.UNDECIDED
        if self.lo >= 1 - EQUAL and self.hi <= 1 + EQUAL:
            return Outcome.EQUAL
        return Outcome.MORE if self.lo > 1 else Outcome.LESS if self.hi < 1 else Outcome.UNDECIDED

    @property
    def inverse(self) -> Ratio:
        return Ratio(1 / self.value, 1 / self.hi, 1 / self.lo if self.lo else math.inf, self.seeds)


class Share(Struct, frozen=True):
    """A figure of one run as a count over something that it is to be divided by: requests or tokens over seconds."""

    count: float
    over: float


UNKNOWN = Ratio(1.0, 0.0, math.inf, 0)


def stretch(seeds: int) -> float:
    """By how much the bootstrap's deviations are too small: it knows a few seeds' spread only as well as Student did.

    With it, an interval covers about as often as it says, from two seeds on.
    """
    return math.sqrt(seeds / (seeds - 1)) * _student(seeds - 1)


def _student(freedom: float) -> float:
    """The 97.5th percentile of Student's distribution over that of the normal one."""
    if freedom <= len(_STUDENT):
        return _STUDENT[max(1, math.floor(freedom)) - 1] / _NORMAL
    z = _NORMAL
    return 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)


@cache
def drawn(seeds: int, stratum: int = 0) -> NDArray[np.intp]:
    """Which of so many seeds each of the draws is made of; the same in every process, another one in each stratum."""
    return np.random.default_rng((seeds, stratum)).integers(0, seeds, (DRAWS, seeds))


def mean_draws(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, Numbers]:
    """Logarithm of the ratio of two paired figures above 0 (geometric mean over the seeds), and its bootstrap draws."""
    logs = np.log(np.asarray(ours, float)) - np.log(np.asarray(theirs, float))
    middle = float(logs.mean())
    return middle, _stretched(middle, logs[drawn(len(logs))].mean(axis=1), len(logs))


def share_draws(ours: Sequence[Share], theirs: Sequence[Share], least: float = 0.5) -> tuple[float, Numbers]:
    """Likewise of two paired shares, pooled over the seeds.

    `least` is added to each count, over the mean of both times: none can be 0, and nothing equals nothing.
    """
    sums = np.array(
        [(a.count, a.over, b.count, b.over) for a, b in zip(ours, theirs, strict=True)],
        float,
    )

    def log_ratio(pooled: Numbers) -> Numbers:
        rates = _rates(pooled, least)
        return np.asarray(np.log(rates[:, 0]) - np.log(rates[:, 1]))

    middle = float(log_ratio(sums.sum(axis=0)[None])[0])
    return middle, _stretched(middle, log_ratio(sums[drawn(len(sums))].sum(axis=1)), len(sums))


def ratio(draws: tuple[float, Numbers], seeds: int) -> Ratio:
    """Of what `mean_draws` or `share_draws` gave; a single seed has no interval, and stays undecided."""
    middle, found = draws
    if seeds < 2:
        return Ratio(math.exp(middle), 0.0, math.inf, seeds)
    lo, hi = np.quantile(found, _SHARES)
    return Ratio(math.exp(middle), math.exp(lo), math.exp(hi), seeds)


def mean_ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Ratio:
    """Of figures of which some runs have none; their seeds are left out."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a and b]
    if not pairs:
        return UNKNOWN
    mine, other = zip(*pairs, strict=True)
    return ratio(mean_draws(mine, other), len(pairs))


def share_ratio(ours: Sequence[Share], theirs: Sequence[Share]) -> Ratio:
    """Of shares; unknown where there are no runs."""
    return ratio(share_draws(ours, theirs), len(ours)) if ours else UNKNOWN


def strata_ratio(strata: Sequence[tuple[Sequence[Share], Sequence[Share]]], least: float = 0.5) -> Ratio:
    """Of the sums of our and their rates over several levels, whose seeds are drawn apart from each other.

    Each level of two seeds or more is as many witnesses as it has seeds; of how much they know together, Welch and
    Satterthwaite tell. Levels of one seed are left out; where there are no others, they give a ratio without an
    interval.
    """
    ours, theirs = np.zeros(DRAWS), np.zeros(DRAWS)
    found: list[tuple[int, float, float, Numbers, Numbers]] = []
    for stratum, (mine, other) in enumerate(strata):
        if len(mine) < 2:
            continue
        sums = np.array([(a.count, a.over, b.count, b.over) for a, b in zip(mine, other, strict=True)], float)
        (whole,), parts = (
            _rates(sums.sum(axis=0)[None], least),
            _rates(sums[drawn(len(mine), stratum)].sum(axis=1), least),
        )
        # As far from the middle as a sample of so few is too near to itself.
        parts = whole + math.sqrt(len(mine) / (len(mine) - 1)) * (parts - whole)
        found.append((len(mine), float(whole[0]), float(whole[1]), parts[:, 0], parts[:, 1]))
        ours, theirs = ours + parts[:, 0], theirs + parts[:, 1]
    if not found:
        once = [(a, b) for mine, other in strata for a, b in zip(mine, other, strict=True)]
        rows = _rates(np.array([(a.count, a.over, b.count, b.over) for a, b in once], float).reshape(-1, 4), least)
        return Ratio(float(rows[:, 0].sum() / rows[:, 1].sum()), 0.0, math.inf, 1) if once else UNKNOWN
    value = sum(a for _, a, _, _, _ in found) / sum(b for _, _, b, _, _ in found)
    variances = [(seeds, float(np.var(a - value * b))) for seeds, _, _, a, b in found]
    total = sum(variance for _, variance in variances)
    freedom = total**2 / sum(variance**2 / (seeds - 1) for seeds, variance in variances) if total else 1.0
    # Rates that were moved away from the middle may have come to nothing.
    least_rate = 1e-3 * value
    logs = np.log(np.maximum(np.maximum(ours, 0) / np.maximum(theirs, 1e-12), least_rate))
    middle = math.log(value)
    return ratio((middle, middle + _student(freedom) * (logs - middle)), sum(seeds for seeds, *_ in found))


def _rates(sums: Numbers, least: float) -> Numbers:
    """Of rows of our count and time and theirs: both rates, with `least` added to both counts over the mean time."""
    a, a_over, b, b_over = (sums[:, column] for column in range(4))
    added = 2 * least / (a_over + b_over)
    return np.stack([a / a_over + added, b / b_over + added], axis=1)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Median of one figure over the seeds, and a 95 % bootstrap interval of it; figures above 0 keep it there."""
    numbers = np.asarray(values, float)
    middle = float(np.median(numbers))
    if len(numbers) < 2 or numbers.min() == numbers.max():
        return {"median": middle, "lo": float(numbers.min()), "hi": float(numbers.max())}
    positive = bool(numbers.min() > 0)
    scale = np.log(numbers) if positive else numbers
    medians = np.median(scale[drawn(len(scale))], axis=1)
    lo, hi = np.quantile(_stretched(float(np.median(scale)), medians, len(scale)), _SHARES)
    if positive:
        return {"median": middle, "lo": math.exp(lo), "hi": math.exp(hi)}
    least = 0.0 if numbers.min() >= 0 else -math.inf
    return {"median": middle, "lo": max(float(lo), least), "hi": float(hi)}


def over_seeds(figures: Sequence[Mapping[str, Any]], spread: Callable[[Sequence[float]], Any]) -> dict[str, Any]:
    """The keys of the first of nested figures; each number as `spread` over the seeds, None where no seed has one."""
    merged: dict[str, Any] = {}
    for name, value in figures[0].items():
        every = [each.get(name) for each in figures]
        if isinstance(value, dict):
            merged[name] = over_seeds([each for each in every if isinstance(each, dict)], spread)
        elif not isinstance(value, list):
            known = [each for each in every if each is not None]
            merged[name] = spread(known) if known else None
    return merged


def standing(ratios: Mapping[str, Mapping[str, Ratio]], values: Mapping[str, float]) -> tuple[str, list[str]]:
    """The side with the greatest value, and those that it is not surely ahead of.

    `ratios[a][b]` is a's figure over b's, where more is better.
    """
    best = max(values, key=lambda name: values[name])
    others = [name for name in values if name != best]
    return best, [name for name in others if ratios[best][name].outcome is not Outcome.MORE]


def first_ahead(levels: Sequence[float], ahead: Sequence[bool]) -> float:
    """The least level from which on one side is ahead at every one; infinity where it is not ahead at the last."""
    first = math.inf
    for level, is_ahead in zip(reversed(levels), reversed(ahead), strict=True):
        if not is_ahead:
            break
        first = level
    return first


def crossover(levels: Sequence[float], draws: Sequence[tuple[float, Numbers]], seeds: int) -> dict[str, float | None]:
    """`value`, `lo` and `hi` of the level from which on one side stays ahead; None for none in this range.

    `draws` are of the logarithm of its ratio to the other at each level; `share` is of the draws that have a crossover,
    None where a level has one `seeds`, which says nothing of chance.
    """
    if not levels:
        return {"value": None, "lo": None, "hi": None, "share": 0.0}
    value = first_ahead(levels, [middle > 0 for middle, _ in draws])
    if seeds < 2:
        return {"value": _finite(value), "lo": None, "hi": None, "share": None}
    firsts = np.array(
        [first_ahead(levels, row) for row in (np.stack([found for _, found in draws], axis=1) > 0).tolist()]
    )
    lo, hi = np.quantile(firsts, _SHARES, method="nearest")
    return {
        "value": _finite(value),
        "lo": _finite(float(lo)),
        "hi": _finite(float(hi)),
        "share": float(np.isfinite(firsts).mean()),
    }


def unbeaten(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point (more is better both ways) whether no other is at least as good in both and better in one."""
    return [not any(other[0] >= one[0] and other[1] >= one[1] and other != one for other in points) for one in points]


def _stretched(middle: float, found: Numbers, seeds: int) -> Numbers:
    return found if seeds < 2 else middle + stretch(seeds) * (found - middle)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
