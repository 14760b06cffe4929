"""In which form blocks lie in the tiers: as they are, or made smaller by a codec.

A lossy block must never pass as an exact one. So whoever allows a lossy codec gives its KV another fingerprint
(`fingerprint_with`), the exact blocks included: what such a worker keeps, hands over and finds is of workers that
allow the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from bascule.kv.codecs import codec_named
from bascule.kv.codecs.base import EXACT, Bytes, CannotDecode, CannotEncode, Codec
from bascule.kv.codecs.floats import FORMS
from bascule.kv.store.record import InvalidRecord, Payload
from bascule.policies.codec import Crossing, fastest_codec
from bascule.types import CodecCost, KVLayout, LinkCost

AUTO = "auto"
AUTOMATIC = (EXACT, "int8")
"""What `auto` chooses from; fp8 loses more for hardly fewer bytes (docs/adr/0015)."""
_TRIAL_BLOCKS = 16


def fingerprint_with(fingerprint: str, codec: str) -> str:
    """What identifies a model's KV where blocks may have been through `codec`."""
    return fingerprint if codec == EXACT else f"{fingerprint}+{codec}"


class Forms:
    """Encodes blocks for a tier and decodes what comes from it. Stateless after construction."""

    def __init__(self, codec: str, layout: KVLayout) -> None:
        """`codec` by name, or `auto`, for which each is measured here. Raises ConfigError if it cannot be used."""
        self._exact = codec_named(EXACT, layout)
        names = AUTOMATIC if codec == AUTO else (EXACT, codec)
        self._codecs = {name: codec_named(name, layout) for name in names}
        self._layout = layout
        self.least_bytes = min(each.record_bytes for each in self._codecs.values())
        """Of a block in the smallest form that is used."""
        self._costs: Sequence[CodecCost] = ()
        self._chosen = self._codecs.get(codec, self._exact)
        if codec == AUTO:
            self._costs = [_measured(each) for each in self._codecs.values()]

    def encode(self, blocks: Bytes, tier: LinkCost) -> tuple[str, Bytes]:
        """Records, [n, bytes], of `blocks`, [planes, n, plane_block_bytes], for a tier, and the codec's name.

        What the codec has no code for stays as it is.
        """
        codec = self._chosen
        if self._costs:
            size = blocks.shape[1] * self._layout.block_bytes
            codec = self._codecs[fastest_codec(self._costs, Crossing(size, size), tier.bytes_per_s).name]
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


def _measured(codec: Codec) -> CodecCost:
    """What a codec does here, by numbers such as KV has."""
    layout = codec.layout
    if codec.name == EXACT:
        return CodecCost(name=EXACT)
    form = FORMS[layout.dtype]
    bits = np.empty((layout.planes, _TRIAL_BLOCKS, layout.plane_block_bytes // form.bits.itemsize), form.bits)
    numbers = np.random.default_rng(0).standard_normal(bits.size, np.float32)
    form.store(numbers.reshape(bits.shape), bits)
    blocks, size = bits.view(np.uint8), bits.nbytes
    codec.encode(blocks)
    begun = time.perf_counter()
    records = codec.encode(blocks)
    encoded = time.perf_counter()
    codec.decode(records, blocks)
    decoded = time.perf_counter()
    return CodecCost(
        name=codec.name,
        ratio=layout.block_bytes / codec.record_bytes,
        encode_bytes_per_s=size / max(encoded - begun, 1e-9),
        decode_bytes_per_s=size / max(decoded - encoded, 1e-9),
    )
