"""In which form blocks lie in the tiers: as they are, or made smaller by a codec.

Who allows a lossy codec has KV with another fingerprint (`codecs.choice.fingerprint_with`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bascule.kv.codecs import codec_named
from bascule.kv.codecs.base import EXACT, Bytes, CannotDecode, CannotEncode
from bascule.kv.codecs.choice import AUTO, measured, names_of
from bascule.kv.store.record import InvalidRecord, Payload
from bascule.policies.codec import Crossing, fastest_codec
from bascule.types import CodecCost, KVLayout


class Forms:
    """Encodes blocks for a tier and decodes what comes from it. Stateless after construction."""

    def __init__(self, codec: str, layout: KVLayout) -> None:
        """`codec` by name, or `auto`, for which each is measured here. Raises ConfigError if it cannot be used."""
        self._exact = codec_named(EXACT, layout)
        self._codecs = {name: codec_named(name, layout) for name in names_of(codec)}
        self._layout = layout
        self.least_bytes = min(each.record_bytes for each in self._codecs.values())
        """Of a block in the smallest form that is used."""
        self._costs: Sequence[CodecCost] = ()
        self._chosen = self._codecs.get(codec, self._exact)
        if codec == AUTO:
            self._costs = [measured(each) for each in self._codecs.values()]

    def encode(self, blocks: Bytes, bytes_per_s: float) -> tuple[str, Bytes]:
        """Records, [n, bytes], of `blocks`, [planes, n, plane_block_bytes], for a tier that gives so many bytes of
        records a second, and the codec's name.

        What the codec has no code for stays as it is.
        """
        codec = self._chosen
        if self._costs:
            size = blocks.shape[1] * self._layout.block_bytes
            codec = self._codecs[fastest_codec(self._costs, Crossing(size, size), bytes_per_s).name]
        try:
            return codec.name, codec.encode(blocks)
        except CannotEncode:
            return EXACT, self._exact.encode(blocks)

    def decode(self, payload: Payload, out: Bytes) -> None:
        """Write a block to `out`, [planes, 1, plane_block_bytes]; raises InvalidRecord, leaving it undefined."""
        codec = self._codecs.get(payload.codec)
        if codec is None:
            raise InvalidRecord("codec")
        data = np.frombuffer(payload.data, np.uint8)
        if data.size != codec.record_bytes:
            raise InvalidRecord("layout")
        try:
            codec.decode(data[None], out)
        except CannotDecode:
            raise InvalidRecord("codec") from None
