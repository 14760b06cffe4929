"""Blocks that a placement is about to store: counted as held until the worker says so itself, or time is up."""

from __future__ import annotations

from collections.abc import Iterable

from bascule.types import BlockHash


class Expectations:
    """Which holders are expected to have which blocks. A holder is one bit, as in the prefix index.

    No holder has more expectations than `limit` given with them; the oldest go first.
    """

    def __init__(self, lifetime: float) -> None:
        """`lifetime` is in seconds, from the last time that a block was expected."""
        self.masks: dict[BlockHash, int] = {}
        """The holders expected to have a block; a block that is not here is not expected anywhere."""
        self._lifetime = lifetime
        self._deadlines: dict[int, dict[BlockHash, float]] = {}
        """By holder's bit; within a holder the earliest deadline first."""

    def __len__(self) -> int:
        return sum(map(len, self._deadlines.values()))

    def add(self, bit: int, names: Iterable[BlockHash], now: float, limit: int) -> None:
        """Expect `names` at a holder from `now` (s) on, for a lifetime."""
        deadlines = self._deadlines.setdefault(bit, {})
        for name in names:
            if deadlines.pop(name, None) is None:
                self.masks[name] = self.masks.get(name, 0) | bit
            deadlines[name] = now + self._lifetime
        while len(deadlines) > limit:
            self._drop(bit, next(iter(deadlines)))
        self._forget_if_empty(bit)

    def settle(self, bit: int, names: Iterable[BlockHash]) -> None:
        """The holder itself has spoken about these blocks."""
        if (deadlines := self._deadlines.get(bit)) is not None:
            for name in names:
                if name in deadlines:
                    self._drop(bit, name)
            self._forget_if_empty(bit)

    def expire(self, now: float) -> None:
        """Drop what has not come true in time."""
        for bit, deadlines in list(self._deadlines.items()):
            while deadlines and deadlines[name := next(iter(deadlines))] <= now:
                self._drop(bit, name)
            self._forget_if_empty(bit)

    def clear(self, bit: int) -> None:
        """The holder is gone."""
        for name in list(self._deadlines.get(bit, ())):
            self._drop(bit, name)
        self._forget_if_empty(bit)

    def move(self, old: int, new: int) -> None:
        """The holder goes by another bit from now on."""
        if (deadlines := self._deadlines.pop(old, None)) is not None:
            self._deadlines[new] = deadlines
            for name in deadlines:
                self.masks[name] ^= old | new

    def check_integrity(self) -> list[str]:
        """Every line names an expectation that is on one side only. Empty means clean."""
        named: dict[BlockHash, int] = {}
        for bit, deadlines in self._deadlines.items():
            for name in deadlines:
                named[name] = named.get(name, 0) | bit
        return [
            f"block {name.hex()} is expected at {self.masks.get(name, 0):x}, but {named.get(name, 0):x} expect it"
            for name in named.keys() | self.masks.keys()
            if named.get(name) != self.masks.get(name)
        ]

    def _drop(self, bit: int, name: BlockHash) -> None:
        del self._deadlines[bit][name]
        if rest := self.masks[name] ^ bit:
            self.masks[name] = rest
        else:
            del self.masks[name]

    def _forget_if_empty(self, bit: int) -> None:
        if not self._deadlines.get(bit, True):
            del self._deadlines[bit]
