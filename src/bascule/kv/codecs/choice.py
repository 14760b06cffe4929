"""Which codecs a worker allows: what `auto` chooses from, what each costs here, and whose KV it then shares."""

from __future__ import annotations

import time

import numpy as np

from bascule.kv.codecs.base import EXACT, Codec
from bascule.kv.codecs.floats import FORMS
from bascule.types import CodecCost

AUTO = "auto"
AUTOMATIC = (EXACT, "int8", "int4")
"""What `auto` chooses from; fp8 loses more for hardly fewer bytes (docs/adr/0015)."""
_TRIAL_BLOCKS = 16


def names_of(codec: str) -> tuple[str, ...]:
    """The codecs that `codec` allows, which is one of them or `auto`; `none` is always among them."""
    return AUTOMATIC if codec == AUTO else (EXACT,) if codec == EXACT else (EXACT, codec)


def fingerprint_with(fingerprint: str, stored: str, pushed: str = EXACT) -> str:
    """What identifies a model's KV where blocks may have been through `stored` in a tier, or `pushed` in a handoff.

    A lossy block must never pass as an exact one. So whoever allows a lossy codec gives its KV another fingerprint,
    the exact blocks included: what such a worker keeps, hands over and finds is of workers that allow the same. The
    two are told apart, because a tier's reader drops what it does not allow itself.
    """
    suffixes = [("", stored), ("push-", pushed)]
    return fingerprint + "".join(f"+{kind}{codec}" for kind, codec in suffixes if codec != EXACT)


def measured(codec: Codec) -> CodecCost:
    """What a codec does here, by numbers such as KV has. Takes the time to code some blocks three times."""
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
