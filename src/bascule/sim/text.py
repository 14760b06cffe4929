"""Tokens of which nobody knows the ids: how many there are, and the names of their blocks, as traces tell them.

The engine and the router ask for a prompt's length, for its blocks' names and for the ids of single blocks. A million
ids that are all 0 would be a waste of memory and of time, so here they are not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import overload

from bascule.kv.hashing import HASH_BYTES, BlockHasher
from bascule.types import BlockHash, Salt

_SHORT = 1024
"""Slices up to here, single blocks above all, are tuples that all texts share."""
_OWN = 1 << 100
"""Names from here on are nobody else's."""


class Text(Sequence[int]):
    """`length` tokens, all 0, whose first full blocks have `names`. Grows like a list and adds up like a tuple."""

    __slots__ = ("length", "names")

    def __init__(self, length: int, names: Sequence[BlockHash] = ()) -> None:
        self.length = length
        self.names = names

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        """A slice has no names."""
        if isinstance(index, int):
            return 0
        length = len(range(*index.indices(self.length)))
        return _zeros(length) if length <= _SHORT else Text(length)

    def __iter__(self) -> Iterator[int]:
        return repeat(0, self.length)

    def __add__(self, more: Sequence[int]) -> Text:
        return Text(self.length + len(more), self.names)

    def append(self, token: int) -> None:
        self.length += 1

    def extend(self, tokens: Sequence[int]) -> None:
        self.length += len(tokens)


class Namer(BlockHasher):
    """Names the blocks of a `Text` as it says; those behind them, and all of other tokens, by their hashes."""

    def chain(self, tokens: Sequence[int], behind: BlockHash | Salt = b"") -> list[BlockHash]:
        """As of `BlockHasher`."""
        if not isinstance(tokens, Text) or not tokens.names:
            return super().chain(tokens, behind)
        full = len(tokens) // self.block_size
        names = list(tokens.names[:full])
        if full > len(names):
            names += super().chain(tokens[len(names) * self.block_size : full * self.block_size], names[-1])
        return names


def named(number: int) -> BlockHash:
    """The name of a block that a trace gives a number."""
    return BlockHash(number.to_bytes(HASH_BYTES, "little"))


def own_name(number: int) -> BlockHash:
    """The same, of a block that no trace gives a number and no other prompt has."""
    return named(_OWN + number)


@lru_cache(_SHORT)
def _zeros(length: int) -> tuple[int, ...]:
    return (0,) * length
