"""The codec that changes nothing: a record is a block's bytes, plane after plane."""

from __future__ import annotations

import numpy as np

from bascule.kv.codecs.base import EXACT, Bytes, check_blocks, check_records
from bascule.types import KVLayout


class ExactCodec:
    """Implements `Codec` for any layout."""

    name = EXACT

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.record_bytes = layout.block_bytes

    def encode(self, blocks: Bytes) -> Bytes:
        """See `Codec.encode`; nothing is refused."""
        n = check_blocks(self.layout, blocks)
        return np.ascontiguousarray(blocks.transpose(1, 0, 2)).reshape(n, self.record_bytes)

    def decode(self, records: Bytes, out: Bytes) -> None:
        """See `Codec.decode`."""
        n = check_records(self, records, out)
        out[:] = records.reshape(n, self.layout.planes, self.layout.plane_block_bytes).transpose(1, 0, 2)
