"""Gaps between tokens, counted by length: of millions nobody keeps each."""

from __future__ import annotations

import math

import numpy as np

_SHORTEST_S, _LONGEST_S = 1e-5, 1e4
_FINENESS = 0.01
"""Relative width of a class."""
_CLASSES = math.ceil(math.log(_LONGEST_S / _SHORTEST_S) / math.log1p(_FINENESS))


class GapCounts:
    """How many gaps there were of each length, to one part in a hundred."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._counts = np.zeros(_CLASSES + 1, np.int64)

    def add(self, seconds: float, count: int = 1) -> None:
        self.longest = max(self.longest, seconds)
        place = math.log(max(seconds, _SHORTEST_S) / _SHORTEST_S) / math.log1p(_FINENESS)
        self._counts[min(int(place), _CLASSES)] += count

    def quantile(self, share: float) -> float:
        """NaN of nothing."""
        total = int(self._counts.sum())
        if not total:
            return math.nan
        place = int(np.searchsorted(np.cumsum(self._counts), share * total))
        middle: float = _SHORTEST_S * (1 + _FINENESS) ** (min(place, _CLASSES) + 0.5)
        return min(middle, self.longest)
