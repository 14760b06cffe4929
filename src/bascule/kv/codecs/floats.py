"""The numbers KV is made of, between their bits and float32, in whole arrays at a time."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bascule.kv.codecs.base import Bits

Floats = NDArray[np.float32]


class FloatForm(Protocol):
    """One dtype of KV. Not finite numbers are recognised by their bits; they are never loaded or stored."""

    bits: np.dtype[np.unsignedinteger]
    """Unsigned integers of its width."""
    sign: int
    """The sign's bit."""
    limit: int
    """Bits of the smallest magnitude that codecs refuse: infinity, or 2**126 where there is so much room that sums and
    roundings could reach infinity."""
    tiny: int
    """Bits of the smallest magnitude that codecs tell from zero: 2**-100 where there is less, so that float32 holds its
    inverse."""

    def load(self, bits: Bits, out: Floats) -> None:
        """Write the numbers of `bits` to `out`, both of one shape; exact."""
        ...

    def store(self, numbers: Floats, out: Bits) -> None:
        """Write the bits of the nearest numbers to `out`, half way goes away from zero; `numbers` are lost."""
        ...


class Float32:
    """IEEE 754 binary32."""

    bits = np.dtype(np.uint32)
    sign = 1 << 31
    limit = (126 + 127) << 23
    tiny = (127 - 100) << 23

    def load(self, bits: Bits, out: Floats) -> None:
        """See `FloatForm.load`."""
        np.copyto(out.view(np.uint32), bits)

    def store(self, numbers: Floats, out: Bits) -> None:
        """See `FloatForm.store`."""
        np.copyto(out, numbers.view(np.uint32))


class BFloat16:
    """The upper half of a binary32."""

    bits = np.dtype(np.uint16)
    sign = 1 << 15
    limit = (126 + 127) << 7
    tiny = (127 - 100) << 7

    def load(self, bits: Bits, out: Floats) -> None:
        """See `FloatForm.load`."""
        wide = out.view(np.uint32)
        np.copyto(wide, bits)
        np.left_shift(wide, 16, out=wide)

    def store(self, numbers: Floats, out: Bits) -> None:
        """See `FloatForm.store`."""
        wide = numbers.view(np.uint32)
        np.add(wide, 0x8000, out=wide)
        np.right_shift(wide, 16, out=wide)
        np.copyto(out, wide, casting="unsafe")


class Float16:
    """IEEE 754 binary16. Magnitudes over 65504 are stored as 65504.

    By integers, for numpy converts one number at a time: a binary16's exponent and fraction, moved 13 bits up, are a
    binary32's whose exponent counts from 127 instead of 15, and a product by 2**112 makes up for that. Subnormal
    numbers come out right too.

        binary16                  s eeeee ffffffffff
        binary32    s 000eeeee ffffffffff0000000000000
    """

    bits = np.dtype(np.uint16)
    sign = 1 << 15
    limit = 0x7C00
    tiny = 1

    def load(self, bits: Bits, out: Floats) -> None:
        """See `FloatForm.load`."""
        wide = out.view(np.int32)
        np.copyto(wide, bits.view(np.int16))
        np.left_shift(wide, 13, out=wide)
        np.bitwise_and(wide, -0x70002000, out=wide)  # the sign's copies between it and the exponent
        np.multiply(out, np.float32(2.0**112), out=out)

    def store(self, numbers: Floats, out: Bits) -> None:
        """See `FloatForm.store`."""
        np.clip(numbers, np.float32(-65504), np.float32(65504), out=numbers)
        np.multiply(numbers, np.float32(2.0**-112), out=numbers)
        wide = numbers.view(np.uint32)
        signs = np.right_shift(wide, 16).astype(np.uint16)
        np.bitwise_and(signs, self.sign, out=signs)
        np.add(wide, 0x1000, out=wide)
        np.right_shift(wide, 13, out=wide)
        np.copyto(out, wide, casting="unsafe")
        np.bitwise_and(out, self.sign - 1, out=out)
        np.bitwise_or(out, signs, out=out)


FORMS: dict[str, FloatForm] = {"float32": Float32(), "bfloat16": BFloat16(), "float16": Float16()}
"""By the names that layouts use."""


def magnitudes(form: FloatForm, bits: Bits) -> Bits:
    """The bits without their sign; like the magnitudes themselves, they are in order."""
    return np.bitwise_and(bits, form.bits.type(form.sign - 1))


def loaded(form: FloatForm, bits: Bits) -> Floats:
    """The numbers of `bits` in a new array."""
    numbers = np.empty(bits.shape, np.float32)
    form.load(bits, numbers)
    return numbers
