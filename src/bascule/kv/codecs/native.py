"""`int8` and `int4` of bfloat16, compiled: what `grouped.py` computes, bit for bit, several times as fast."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from bascule import native
from bascule.kv.codecs.base import Bits, Bytes
from bascule.kv.codecs.grouped import Grouping, Int4Planes, Int8Planes
from bascule.kv.codecs.lossy import Flags, PlaneCoder
from bascule.native import NativeUnavailable

_SOURCES = [Path(__file__).with_name("grouped.c")]
_FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-ffp-contract=off", "-fno-math-errno")
_NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
_MOST_GROUPS = 4096
"""Of a block; their bounds lie on the stack."""


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("planes", "blocks", "rows", "columns", "down")),
        *((name, ctypes.c_int64) for name in ("bits_plane", "bits_block", "record_plane", "record_block")),
    )


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled functions; raises NativeUnavailable."""
    return native.load(_SOURCES, _FLAGS, _NEEDED, "KV is coded by numpy instead")


def compiled(plain: Int8Planes | Int4Planes, grouping: Grouping) -> PlaneCoder:
    """The same coder of bfloat16 with compiled code, where there can be such; else `plain` itself."""
    if grouping.groups > _MOST_GROUPS:
        return plain
    try:
        return NativePlanes(plain, grouping, load())
    except NativeUnavailable:
        return plain


class NativePlanes:
    """Implements `PlaneCoder` as `plain` does. Lets other threads run meanwhile."""

    def __init__(self, plain: Int8Planes | Int4Planes, grouping: Grouping, library: ctypes.CDLL) -> None:
        self.record_bytes = plain.record_bytes
        self._grouping = grouping
        names = ("encode8", "decode8") if isinstance(plain, Int8Planes) else ("encode4", "decode4")
        self._encode, self._decode = (getattr(library, name) for name in names)
        for call in (self._encode, self._decode):
            call.argtypes = [ctypes.POINTER(_Shape), *4 * [ctypes.c_void_p]]
            call.restype = None

    def encode(self, bits: Bits, records: Bytes) -> Flags:
        """See `PlaneCoder.encode`."""
        return self._run(self._encode, bits, records)

    def decode(self, records: Bytes, bits: Bits) -> Flags:
        """See `PlaneCoder.decode`."""
        return self._run(self._decode, bits, records)

    def _run(self, call: ctypes._NamedFuncPointer, bits: Bits, records: Bytes) -> Flags:
        grouping, (planes, blocks, numbers) = self._grouping, bits.shape
        expected = ((planes, blocks, grouping.rows * grouping.columns), (planes, blocks, self.record_bytes))
        if (bits.shape, records.shape) != expected or bits.dtype != np.uint16 or records.dtype != np.uint8:
            raise ValueError(f"{bits.dtype} {bits.shape} and {records.dtype} {records.shape} are not {expected}")
        if bits.strides[2] != bits.itemsize or records.strides[2] != records.itemsize:
            raise ValueError("the numbers of a block, and the bytes of a record, lie in one piece")
        bad, scratch = np.empty((planes, blocks), np.bool_), np.empty(numbers, np.uint8)
        shape = _Shape(
            *(planes, blocks, grouping.rows, grouping.columns, grouping.down),
            *(*bits.strides[:2], *records.strides[:2]),
        )
        call(ctypes.byref(shape), bits.ctypes.data, records.ctypes.data, bad.ctypes.data, scratch.ctypes.data)
        return bad
