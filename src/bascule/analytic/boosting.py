"""Growing the trees of `trees`: gradient boosting on relative errors, deterministic, with numpy alone."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.analytic.physics import Array
from bascule.analytic.trees import Bins, Tree, leaf_of

_NEAR = 0.15
"""Errors (logarithms) above this pull no harder than this."""
_BINS = 32


class Growth(Struct, frozen=True, kw_only=True):
    """How many trees are grown, how deep, and how carefully."""

    trees: int = 200
    depth: int = 5
    rate: float = 0.1
    """The part of what a leaf would say that is taken."""
    least: float = 4.0
    """Weight of the rows that a leaf must have."""
    ridge: float = 3.0
    """Weight of rows of no error that are added to each leaf."""
    share: float = 0.5
    """Of the features that each tree may ask, drawn by `seed`."""
    seed: int = 0


def find_edges(values: Array) -> list[list[float]]:
    """Where each feature is cut into at most `_BINS` bins: halfway between values that occur."""
    edges = []
    for column in values.T:
        known = np.unique(column[~np.isnan(column)])
        middles = (known[1:] + known[:-1]) / 2
        if len(middles) >= _BINS:
            middles = middles[np.linspace(0, len(middles) - 1, _BINS - 1).round().astype(int)]
        edges.append(sorted({float(f"{middle:.6g}") for middle in middles}))
    return edges


def grow(bins: Bins, errors: Array, weights: Array, growth: Growth) -> list[Tree]:
    """Trees whose sum comes near `errors`, the logarithms by which answers are too small."""
    random = np.random.default_rng(growth.seed)
    left = errors.copy()
    trees = []
    for _ in range(growth.trees):
        asked = np.sort(random.permutation(bins.shape[1])[: max(1, round(growth.share * bins.shape[1]))])
        tree = _one(bins, left, weights, asked, growth)
        trees.append(tree)
        left -= np.array(tree.leaf)[leaf_of(tree, bins)] / 1000
    return trees


def _one(bins: Bins, left: Array, weights: Array, asked: NDArray[np.int64], growth: Growth) -> Tree:
    inner = 2**growth.depth - 1
    feature, edge, missing = [0] * inner, [_BINS] * inner, [0] * inner
    node = np.zeros(len(left), dtype=np.int64)
    slope = np.clip(left, -_NEAR, _NEAR) * weights
    for index in range(inner):
        rows = np.flatnonzero(node == index)
        found = _split(bins, slope, weights, rows, asked, growth)
        if found is not None:
            feature[index], edge[index], missing[index] = found
        value = bins[rows, feature[index]]
        node[rows] = 2 * index + 1 + np.where(value < 0, missing[index], value > edge[index])
    leaves = [_say(left[node == inner + leaf], weights[node == inner + leaf], growth) for leaf in range(inner + 1)]
    return Tree(feature, edge, missing, leaves)


def _split(
    bins: Bins, slope: Array, weights: Array, rows: NDArray[np.int64], asked: NDArray[np.int64], growth: Growth
) -> tuple[int, int, int] | None:
    """The feature, its last bin on the left and where missing values go that explain most of the slopes of `rows`."""
    many = _BINS + 1
    flat = (bins[np.ix_(rows, asked)] + 1 + many * np.arange(len(asked))).ravel()
    sums = [
        np.bincount(flat, np.repeat(values[rows], len(asked)), len(asked) * many).reshape(len(asked), many)
        for values in (slope, weights)
    ]
    whole_pull, whole = (each.sum(axis=1, keepdims=True) for each in sums)
    best, found = 1e-9, None
    for missing_right in (0, 1):
        pull, weight = (np.cumsum(each[:, 1:-1], axis=1) + (1 - missing_right) * each[:, :1] for each in sums)
        gain = pull**2 / (weight + growth.ridge) + (whole_pull - pull) ** 2 / (whole - weight + growth.ridge)
        gain -= whole_pull**2 / (whole + growth.ridge)
        gain[(weight < growth.least) | (whole - weight < growth.least)] = 0.0
        at = int(np.argmax(gain))
        if gain.flat[at] > best:
            best = float(gain.flat[at])
            found = (int(asked[at // gain.shape[1]]), at % gain.shape[1], missing_right)
    return found


def _say(left: Array, weights: Array, growth: Growth) -> int:
    """What brings the mean relative error down most, drawn towards none, times the rate; in thousandths.

    An answer that is e times too long errs by 1.7 of the truth, one that is e times too short by 0.6. So it is the
    median of what is left with each row weighted by `exp(-left)`.
    """
    if not len(left):
        return 0
    order = np.argsort(left, kind="stable")
    counted = (weights * np.exp(-np.clip(left, -1.0, 1.0)))[order]
    summed = np.cumsum(counted)
    median = float(left[order][np.searchsorted(summed, summed[-1] / 2)])
    weight = float(summed[-1])
    return round(1000 * growth.rate * median * weight / (weight + growth.ridge))
