"""`int8` and `int4`: numbers as equal steps within groups. Keys per channel, values per token.

Keys have channels that are large, or far from zero, in all tokens alike; steps that fit them would be coarse for all
others. So a group of keys is one channel over the tokens of a block, and a group of values one head of a token (Liu et
al., KIVI, 2024, have the observation; groups and codes here are our own). Where a block has too few tokens for that to
pay, keys are grouped as values are.

    record of a block in a plane:  the groups' bounds, in the block's own dtype | codes

Bounds are numbers of the group, kept exactly, and decode to themselves: so coding twice loses no more than once.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from bascule.kv.codecs.base import Bits, Bytes
from bascule.kv.codecs.floats import FloatForm, Floats, loaded, magnitudes
from bascule.kv.codecs.lossy import Flags
from bascule.types import KVLayout

CHANNEL_TOKENS = 8
"""Blocks of fewer tokens have their keys grouped as their values."""

_TOP8, _TOP4 = 127, 15


class Grouping(Struct, frozen=True):
    """The numbers of a block in a plane as `rows` of `columns`, each row a group, or with `down` each column."""

    rows: int
    columns: int
    down: bool

    @property
    def groups(self) -> int:
        return self.columns if self.down else self.rows

    @property
    def axis(self) -> int:
        """The axis of [planes, n, rows, columns] that runs within a group."""
        return 2 if self.down else 3


def of_keys(layout: KVLayout) -> Grouping:
    """By channel over a block's tokens, if there are enough of these."""
    if layout.block_size < CHANNEL_TOKENS:
        return of_values(layout)
    return Grouping(layout.block_size, layout.kv_heads * layout.head_dim, down=True)


def of_values(layout: KVLayout) -> Grouping:
    """By token and head."""
    return Grouping(layout.block_size * layout.kv_heads, layout.head_dim, down=False)


class Int8Planes:
    """Implements `PlaneCoder`: a group's bound is its largest magnitude, a code stands for code / 127 of it."""

    def __init__(self, form: FloatForm, grouping: Grouping) -> None:
        self._form, self._grouping = form, grouping
        self._head = grouping.groups * form.bits.itemsize
        self.record_bytes = self._head + grouping.rows * grouping.columns

    def encode(self, bits: Bits, records: Bytes) -> Flags:
        """See `PlaneCoder.encode`."""
        cells = _cells(bits, self._grouping)
        bound = magnitudes(self._form, cells).max(axis=self._grouping.axis, keepdims=True)
        bad: Flags = _flat(bound).max(axis=-1) >= self._form.limit
        bound[bound < self._form.tiny] = 0
        bound[bad] = 0
        records[..., : self._head] = _flat(bound).view(np.uint8)
        numbers = loaded(self._form, cells)
        numbers *= _inverse(loaded(self._form, bound), _TOP8)
        np.rint(numbers, out=numbers)
        np.copyto(records[..., self._head :].view(np.int8), _flat(numbers), casting="unsafe")
        return bad

    def decode(self, records: Bytes, bits: Bits) -> Flags:
        """See `PlaneCoder.decode`."""
        bound = records[..., : self._head].view(self._form.bits)
        bad: Flags = bound.max(axis=-1) >= self._form.limit
        numbers = np.empty(bits.shape, np.float32)
        np.copyto(numbers, records[..., self._head :].view(np.int8))
        numbers *= np.float32(1 / _TOP8)
        cells = _cells(numbers, self._grouping)
        cells *= _bounds(self._form, bound, bad, self._grouping)
        self._form.store(numbers, bits)
        return bad


class Int4Planes:
    """Implements `PlaneCoder`: a group's bounds are its least and greatest number, with 16 codes from one to the other.

    Codes of the first half of a plane's numbers are the low halves of bytes, those of the second half the high ones.
    """

    def __init__(self, form: FloatForm, grouping: Grouping) -> None:
        """Raises ValueError for an odd count of numbers."""
        numbers = grouping.rows * grouping.columns
        if numbers % 2:
            raise ValueError(f"two codes go to a byte, and {numbers} numbers of a block in one plane are odd")
        self._form, self._grouping = form, grouping
        self._ends = grouping.groups * form.bits.itemsize
        self._half = numbers // 2
        self.record_bytes = 2 * self._ends + self._half

    def encode(self, bits: Bits, records: Bytes) -> Flags:
        """See `PlaneCoder.encode`."""
        axis = self._grouping.axis
        numbers = loaded(self._form, bits)
        cells = _cells(numbers, self._grouping)
        low, high = cells.min(axis=axis, keepdims=True), cells.max(axis=axis, keepdims=True)
        limit = loaded(self._form, np.array([self._form.limit], self._form.bits))
        bad: Flags = ~(_flat(np.maximum(-low, high)).max(axis=-1) < limit)  # so that NaN is bad
        low[bad] = high[bad] = 0
        low += 0  # of two zeros the one without a sign
        high += 0
        np.copyto(high, low, where=high - low < 2.0**-100)
        step = _inverse(high - low, _TOP4)
        cells -= low
        cells *= step
        np.rint(numbers, out=numbers)
        codes = np.empty(bits.shape, np.uint8)
        np.copyto(codes, numbers, casting="unsafe")
        for place, bound in enumerate((low, high)):
            stored = np.empty(bound.shape, self._form.bits)
            self._form.store(bound, stored)
            records[..., place * self._ends : (place + 1) * self._ends] = _flat(stored).view(np.uint8)
        upper = np.left_shift(codes[..., self._half :], 4)
        np.bitwise_or(codes[..., : self._half], upper, out=records[..., 2 * self._ends :])
        return bad

    def decode(self, records: Bytes, bits: Bits) -> Flags:
        """See `PlaneCoder.decode`."""
        bounds = records[..., : 2 * self._ends].view(self._form.bits)
        bad: Flags = magnitudes(self._form, bounds).max(axis=-1) >= self._form.limit
        low, high = (_bounds(self._form, half, bad, self._grouping) for half in np.split(bounds, 2, axis=-1))
        packed = records[..., 2 * self._ends :]
        numbers = np.empty(bits.shape, np.float32)
        np.copyto(numbers[..., : self._half], packed & 15)
        np.copyto(numbers[..., self._half :], packed >> 4)
        cells = _cells(numbers, self._grouping)
        # The first code gives `low`. Steps are a trifle long, so that the last one, cut off, gives `high` exactly too.
        cells *= (high - low) * np.float32((1 + 2.0**-21) / _TOP4)
        cells += low
        np.minimum(cells, high, out=cells)
        self._form.store(numbers, bits)
        return bad


def _cells(numbers: Bits, grouping: Grouping) -> Bits:
    """A view of [planes, n, numbers] as [planes, n, rows, columns]."""
    return numbers.reshape(*numbers.shape[:2], grouping.rows, grouping.columns)


def _flat(cells: Bits) -> Bits:
    """[planes, n, rows, columns] as [planes, n, numbers], in one piece."""
    return np.ascontiguousarray(cells).reshape(*cells.shape[:2], -1)


def _inverse(width: Floats, top: int) -> Floats:
    """`top` over `width`, 0 where there is none."""
    return np.divide(np.float32(top), width, out=np.zeros_like(width), where=width > 0)


def _bounds(form: FloatForm, stored: Bits, bad: Flags, grouping: Grouping) -> Floats:
    """Bounds from a record as [planes, n, rows, columns] with 1 for the axis within a group; 0 in bad blocks."""
    numbers = loaded(form, np.where(bad[..., None], form.bits.type(0), stored))
    shape = (1, grouping.groups) if grouping.down else (grouping.groups, 1)
    return numbers.reshape(*numbers.shape[:2], *shape)
