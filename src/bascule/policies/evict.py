"""In what order blocks are evicted: least recently used first, those used again apart from those used once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar

PROTECTED_SHARE = 0.2
"""Of all blocks, how many may be protected: measured (docs/adr/0016)."""


class Stored(Protocol):
    """A block of a tier."""

    @property
    def used_ns(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def again(self) -> bool:
        """It has been used again since it was stored."""
        ...


AnyStored = TypeVar("AnyStored", bound=Stored)


def first_to_go(blocks: Iterable[AnyStored], protected: int) -> tuple[list[AnyStored], list[AnyStored]]:
    """The blocks of a tier, the least recently used and so next to be evicted first; apart from them, to be evicted
    last, the `protected` bytes of those used again that were used latest.

    So a scan of any length leaves those alone. The beginning of a prefix stays longer than its end as long as it is
    told to have been used later, and as often.
    """
    others: list[AnyStored] = []
    spared: list[AnyStored] = []
    for block in sorted(blocks, key=attrgetter("used_ns"), reverse=True):
        protected -= block.size * block.again
        spare = block.again and protected >= 0
        (spared if spare else others).append(block)
    return others[::-1], spared[::-1]


_AWAY, _ON_PROBATION, _PROTECTED = range(3)


class EvictionOrder:
    """Those of the blocks 0 to `capacity - 1` that may be evicted because nobody holds them, the next to go first.

    A segmented LRU. A block that was used once is on probation, one that was used again is protected; of more than
    `share` of all blocks, the longest unused go back on probation, as if they had just been used. Both are one ring of
    links, so that going back is the border's move and not theirs:

        ends -> on probation ... -> border -> protected ... -> ends
                next to go      used once                 used again

    So a scan of any length passes through probation and leaves the protected alone. Each block costs O(1).

    The end of a prefix goes before its beginning, because whoever uses the end uses the beginning too: that was used at
    least as often and as lately, and runs are offered from their end on. Nothing else is known of prefixes here.
    """

    def __init__(self, capacity: int, share: float = PROTECTED_SHARE) -> None:
        self._bound = int(share * capacity)
        self._border, self._ends = capacity, capacity + 1
        self._after = [0] * capacity + [self._ends, self._border]
        self._before = list(self._after)
        self._where = bytearray(capacity)
        self._again = bytearray(capacity)
        """1 for each block that was used again since it came into the cache, also while it is held."""
        self._count = 0
        self._protected = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return self._where[block] != _AWAY

    def __iter__(self) -> Iterator[int]:
        """The next to go first."""
        return (block for block in self._ring() if block != self._border)

    def use(self, blocks: Iterable[int]) -> None:
        """These cached blocks are used again; they are not to be evicted until they are offered again."""
        again, where = self._again, self._where
        for block in blocks:
            again[block] = 1
            if where[block] != _AWAY:
                self._take_out(block)

    def offer(self, run: Sequence[int]) -> None:
        """Nobody holds these blocks of one prefix any more, named from its end to its beginning.

        What comes before a block that was used again was so too, be it in another block that held the same.
        """
        again = self._again
        once = next((index for index, block in enumerate(run) if again[block]), len(run))
        self._append(run[:once], self._border, _ON_PROBATION)
        if once < len(run):
            self._append(run[once:], self._ends, _PROTECTED)
            self._protected += len(run) - once
            if self._protected > self._bound:
                self._move_border(self._protected - self._bound)

    def pop(self, count: int) -> list[int]:
        """Evict `count` blocks, or all if there are fewer; that they were used is forgotten."""
        gone: list[int] = []
        for _ in range(min(count, self._count)):
            block = self._after[self._ends]
            if block == self._border:
                block = self._after[block]
            self._take_out(block)
            self._again[block] = 0
            gone.append(block)
        return gone

    def _take_out(self, block: int) -> None:
        before, after = self._before[block], self._after[block]
        self._after[before] = after
        self._before[after] = before
        self._protected -= self._where[block] == _PROTECTED
        self._where[block] = _AWAY
        self._count -= 1

    def _append(self, run: Sequence[int], end: int, segment: int) -> None:
        """Link `run` in before `end`."""
        before, after, where = self._before, self._after, self._where
        last = before[end]
        for block in run:
            after[last], before[block], where[block] = block, last, segment
            last = block
        after[last] = end
        before[end] = last
        self._count += len(run)

    def _move_border(self, count: int) -> None:
        """Put the `count` longest unused of the protected back on probation."""
        before, after, where, border = self._before, self._after, self._where, self._border
        last = border
        for _ in range(count):
            last = after[last]
            where[last] = _ON_PROBATION
        left, right = before[border], after[border]
        after[left], before[right] = right, left
        right = after[last]
        after[last] = before[right] = border
        before[border], after[border] = last, right
        self._protected -= count

    def _ring(self) -> Iterator[int]:
        """Everything between the ends; it ends even where links are wrong."""
        here = self._ends
        for _ in self._after:
            here = self._after[here]
            if here == self._ends:
                return
            yield here

    def check_integrity(self, findable: Iterable[int]) -> Iterator[str]:
        """Every line names a lie. `findable` are all cached blocks, those that are held included."""
        segment, found = _ON_PROBATION, 0
        for here in self._ring():
            if self._before[self._after[here]] != here or self._after[self._before[here]] != here:
                yield f"what is next to {here} in the order of eviction does not say so"
            if here == self._border:
                segment = _PROTECTED
                continue
            found += 1
            if self._where[here] != segment:
                yield f"block {here} is evicted in segment {segment}, but counts as in {self._where[here]}"
        protected, offered = self._where.count(_PROTECTED), len(self._where) - self._where.count(_AWAY)
        if (found, offered, protected) != (self._count, self._count, self._protected) or protected > self._bound:
            yield (
                f"{found} blocks are in the order of eviction, {offered} say so and {self._count} are counted; "
                f"{protected} are protected, {self._protected} are counted, {self._bound} may be"
            )
        forgotten = bytearray(self._again)
        for block in findable:
            forgotten[block] = 0
        if 1 in forgotten:
            yield f"block {forgotten.index(1)} counts as used again, but is not cached"
