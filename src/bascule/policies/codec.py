"""Which codec brings KV over a link soonest, by measured rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from bascule.types import CodecCost


class Crossing(Struct, frozen=True):
    """KV that is to cross a link: `size` bytes before they are encoded, which is done in chunks of `chunk` bytes."""

    size: int
    chunk: int


def crossing_seconds(cost: CodecCost, crossing: Crossing, link_bytes_per_s: float) -> float:
    """Predicted seconds from the first byte encoded to the last one decoded.

    Encoding, sending and decoding work on different chunks at the same time: the first chunk goes through all three,
    and the others follow at the pace of the slowest.
    """
    if crossing.size <= 0:
        return 0.0
    stages = (
        crossing.size / cost.encode_bytes_per_s,
        crossing.size / cost.ratio / link_bytes_per_s,
        crossing.size / cost.decode_bytes_per_s,
    )
    chunks = max(1, math.ceil(crossing.size / crossing.chunk))
    return sum(stages) / chunks + max(stages) * (chunks - 1) / chunks


def fastest_codec(codecs: Sequence[CodecCost], crossing: Crossing, link_bytes_per_s: float) -> CodecCost:
    """The codec that takes the least time; of equals, the one that makes KV least small, `none` before all.

    A slower link never gets a codec that makes KV less small. So a codec is passed over if another one has a better
    ratio and is at least as quick in its slower direction, though filling the pipeline with the first chunk may take it
    less; without that, two codecs can take turns more than once as links get slower. What is given up is at most the
    time to encode and decode one chunk. Raises ValueError if there are no codecs or the link has no bandwidth.
    """
    if not codecs:
        raise ValueError("there are no codecs to choose from")
    if not link_bytes_per_s > 0:
        raise ValueError(f"a link moves more than {link_bytes_per_s} bytes/s")
    kept: list[CodecCost] = []
    for cost in sorted(codecs, key=lambda cost: (-cost.ratio, -_pace(cost), -_faster(cost), cost.name != "none")):
        if not kept or _pace(cost) > _pace(kept[-1]):
            kept.append(cost)
    return min(reversed(kept), key=lambda cost: crossing_seconds(cost, crossing, link_bytes_per_s))


def _pace(cost: CodecCost) -> float:
    """Bytes a second of its slower direction."""
    return min(cost.encode_bytes_per_s, cost.decode_bytes_per_s)


def _faster(cost: CodecCost) -> float:
    """The same of its faster one."""
    return max(cost.encode_bytes_per_s, cost.decode_bytes_per_s)
