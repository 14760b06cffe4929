"""`fp8`: eight-bit floats, e4m3, under one power of two for each block of a plane.

A power of two moves nothing but the exponent, so that eight-bit floats lose as little under it as under any other
factor, and e4m3 spans so much (2**-9 to 448) that a factor for every channel or token gains little; ADR 0015 has the
figures.

    record of a block in a plane:  exponent (int8) | codes (one byte a number, as they lie in the block)
    number = code as e4m3 * 2**exponent
"""

from __future__ import annotations

import numpy as np

from bascule.kv.codecs.base import Bits, Bytes
from bascule.kv.codecs.floats import FloatForm, loaded, magnitudes
from bascule.kv.codecs.lossy import Flags

_TOP_EXPONENT = 118
"""That of numbers just below 2**126; under a higher one, 448 would leave float32."""
_ALIGN = np.float32(2.0**120)
"""An e4m3's exponent counts from 7, a binary32's from 127. Moved 20 bits up, the one is the other over 2**120:

    e4m3                   s eeee fff
    binary32    s 0000eeee fff00000000000000000000
"""


class Fp8Planes:
    """Implements `PlaneCoder` for `numbers` numbers a block."""

    def __init__(self, form: FloatForm, numbers: int) -> None:
        self._form = form
        self.record_bytes = 1 + numbers

    def encode(self, bits: Bits, records: Bytes) -> Flags:
        """See `PlaneCoder.encode`; rounds to nearest, half way to even."""
        largest = magnitudes(self._form, bits).max(axis=-1, initial=0)
        largest[largest < self._form.tiny] = 0
        # The exponent follows from the largest magnitude as e4m3 will have it, so that the decoded block has the same.
        fraction, exponent = np.frexp(loaded(self._form, largest))
        sixteenths = np.rint(fraction * 16)
        bad: Flags = (largest >= self._form.limit) | (np.ldexp(sixteenths, exponent - 4) >= 2.0**126)
        exponent += sixteenths > 14  # 15 would be 480, which e4m3 has no code for
        exponent -= 9
        exponent[bad] = 0
        records[..., 0] = exponent.astype(np.int8).view(np.uint8)
        numbers = loaded(self._form, bits)
        numbers *= np.ldexp(np.float32(1), -exponent)[..., None]
        numbers *= 1 / _ALIGN
        wide = numbers.view(np.uint32)
        odd = np.right_shift(wide, 20)
        odd &= 1
        wide += 0x7FFFF
        wide += odd
        wide >>= 20
        narrow = wide.astype(np.uint16)
        codes = narrow.astype(np.uint8)
        narrow >>= 4
        narrow &= 0x80
        np.bitwise_or(codes, narrow.astype(np.uint8), out=records[..., 1:])
        return bad

    def decode(self, records: Bytes, bits: Bits) -> Flags:
        """See `PlaneCoder.decode`."""
        exponent, codes = records[..., 0].view(np.int8).astype(np.int32), records[..., 1:]
        bad: Flags = (codes & 0x7F).max(axis=-1, initial=0) == 0x7F
        bad |= exponent > _TOP_EXPONENT
        numbers = np.empty(bits.shape, np.float32)
        wide = numbers.view(np.int32)
        np.copyto(wide, codes.view(np.int8))
        wide <<= 20
        wide &= -0x78100000  # the sign's copies between it and the exponent
        numbers *= _ALIGN
        exponent[bad] = 0
        numbers *= np.ldexp(np.float32(1), exponent)[..., None]
        self._form.store(numbers, bits)
        return bad
