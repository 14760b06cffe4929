"""Recounts the prefix index, a little at a time, while nothing changes it.

What does not add up, or is not what a worker says that it has, is a violation.
"""

from __future__ import annotations

from collections.abc import Mapping

from bascule.kv.prefix_index import SHARDS, PrefixIndex, Recount


class IndexAudit:
    """One for an index. `step` is called while there is nothing else to do."""

    def __init__(self, index: PrefixIndex) -> None:
        self.violations: list[str] = []
        """What the last whole round has found; must be empty."""
        self._index = index
        self._begin()

    def _begin(self) -> None:
        self._recount = Recount()
        self._next = 0
        self._as_of = self._index.changes

    def step(self, most: int, digests: Mapping[int, bytes]) -> bool:
        """Look at about `most` blocks more; True when that ends a round, after which there is none until the index has
        changed. What changes in the middle of one begins it anew.

        `digests` are what workers say, by row, of the blocks that they have on the device; others are not compared.
        """
        if self._as_of != self._index.changes:
            self._begin()
        seen = 0
        while self._next < SHARDS:
            if seen > most:
                return False
            seen += 1 + self._index.recount(self._next, self._recount)
            self._next += 1
        if self._next > SHARDS:
            return False
        self._next += 1
        self.violations = self._index.wrong(self._recount) + [
            f"row {row} has other blocks in the index than its worker says"
            for row, told in digests.items()
            if self._index.digest(row, self._recount) != told
        ]
        return True
