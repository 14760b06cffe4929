"""A sum of small decision trees: what corrects physics where measurements differ from it always in the same way."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.analytic.physics import Array

Bins = NDArray[np.int64]
"""[rows, features]: each value's bin; -1 for one that is not known."""


class Tree(Struct, frozen=True, array_like=True):
    """A complete binary tree: node i goes on to 2i + 1 or 2i + 2; the leaves are the nodes below the last row."""

    feature: list[int]
    edge: list[int]
    """A value goes right whose bin is above this one."""
    missing_right: list[int]
    """1 where a value that is not known goes right."""
    leaf: list[int]
    """Thousandths of a logarithm."""

    @property
    def depth(self) -> int:
        return len(self.leaf).bit_length() - 1


def bins_of(values: Array, edges: list[list[float]]) -> Bins:
    """The bins of `values` (rows, features; NaN: not known): how many of its feature's edges each is above."""
    bins = np.empty(values.shape, dtype=np.int64)
    for column, cuts in enumerate(edges):
        bins[:, column] = np.searchsorted(np.array(cuts), values[:, column], side="left")
    bins[np.isnan(values)] = -1
    return bins


def tree_sum(trees: list[Tree], bins: Bins) -> Array:
    """What the trees say together of each row, a logarithm."""
    total = np.zeros(len(bins))
    for tree in trees:
        total += np.array(tree.leaf)[leaf_of(tree, bins)]
    return total / 1000


def leaf_of(tree: Tree, bins: Bins) -> NDArray[np.int64]:
    """The leaf, counted from the left, that each row reaches."""
    feature, edge, missing = (np.array(part) for part in (tree.feature, tree.edge, tree.missing_right))
    flat, width = bins.ravel(), bins.shape[1]
    row = np.arange(len(bins)) * width
    node = np.zeros(len(bins), dtype=np.int64)
    for _ in range(tree.depth):
        value = flat[row + feature[node]]
        right = np.where(value < 0, missing[node], value > edge[node])
        node = 2 * node + 1 + right
    return node - len(tree.feature)
