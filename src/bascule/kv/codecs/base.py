"""What every codec promises: blocks of KV as smaller records, and honesty about what was lost."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bascule.errors import BasculeError
from bascule.types import KVLayout

Bytes = NDArray[np.uint8]
Bits = NDArray[Any]
"""Numbers of KV as their bit patterns, unsigned integers as wide as the numbers."""

EXACT = "none"
"""The codec that loses nothing."""


class CannotEncode(BasculeError):
    """KV with numbers that the codec has no code for."""


class CannotDecode(BasculeError):
    """Bytes that no encoder of this codec writes."""


class Codec(Protocol):
    """Full blocks of one layout as records of a fixed size. Stateless: any number of threads may use one.

    A record depends on its own block alone. Encoding what a lossy codec has decoded gives the same records again, so
    that a block loses once and not at every hop.
    """

    name: str
    layout: KVLayout
    record_bytes: int
    """Bytes of one encoded block."""

    def encode(self, blocks: Bytes) -> Bytes:
        """Records, [n, record_bytes], of `blocks`, [planes, n, plane_block_bytes] as an arena has them.

        Raises CannotEncode, naming plane and block, where a number is not finite or out of the codec's range, and
        ValueError if `blocks` is not of that shape.
        """
        ...

    def decode(self, records: Bytes, out: Bytes) -> None:
        """Write the blocks of `records`, [n, record_bytes], to `out`, [planes, n, plane_block_bytes].

        All that is written is finite. Raises CannotDecode, and leaves `out` half written, for bytes that no encoder
        writes, though not all such bytes can be told; ValueError if shapes do not fit.
        """
        ...


def check_blocks(layout: KVLayout, blocks: Bytes) -> int:
    """How many blocks `blocks` are; raises ValueError if they are not [planes, n, plane_block_bytes] of uint8."""
    shape = (layout.planes, blocks.shape[1] if blocks.ndim == 3 else -1, layout.plane_block_bytes)
    if blocks.shape != shape or blocks.dtype != np.uint8:
        wanted = f"[{layout.planes}, n, {layout.plane_block_bytes}] of uint8"
        raise ValueError(f"blocks are {wanted}, not {list(blocks.shape)} of {blocks.dtype}")
    return shape[1]


def check_records(codec: Codec, records: Bytes, out: Bytes) -> int:
    """How many records go to `out`; raises ValueError if either has another shape than `Codec.decode` says."""
    shape = (check_blocks(codec.layout, out), codec.record_bytes)
    if records.shape != shape or records.dtype != np.uint8:
        raise ValueError(f"records are {list(shape)} of uint8, not {list(records.shape)} of {records.dtype}")
    return shape[0]
