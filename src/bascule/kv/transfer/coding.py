"""Smaller forms of blocks on their way over a link: which codec a push gets, and what then has to arrive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from msgspec import structs

from bascule.errors import ConfigError
from bascule.kv.arena import checksums
from bascule.kv.codecs import codec_named
from bascule.kv.codecs.base import EXACT, Bytes, Codec
from bascule.kv.codecs.choice import AUTO, measured, names_of
from bascule.kv.transfer.base import Span
from bascule.policies.codec import Crossing, fastest_codec
from bascule.types import CodecCost, KVLayout

_PIECE_BYTES = 1 << 20
"""KV that is coded at a time: about a millisecond, and as long as a receiver may hold a grant's lock."""


class Coding:
    """The codecs that a worker may push with and takes from others; without any, KV goes as it is. Stateless."""

    def __init__(self, codecs: Sequence[Codec] = (), costs: Sequence[CodecCost] = ()) -> None:
        """`costs`, if given, are what coding takes here, of `none` too, to choose by; else the first codec is used."""
        self.codecs = {codec.name: codec for codec in codecs}
        self._chosen = codecs[0] if codecs else None
        self._costs = costs

    @classmethod
    def of(cls, codec: str, layout: KVLayout) -> Coding:
        """By name, or `auto`, for which codecs are measured here. Raises ConfigError if it cannot be used."""
        try:
            allowed = [codec_named(name, layout) for name in names_of(codec)]
        except ConfigError as error:
            raise ConfigError(f"--transfer-codec: {error}") from error
        lossy = [each for each in allowed if each.name != EXACT]
        return cls(lossy, [_sending(measured(each)) for each in allowed] if codec == AUTO else ())

    def codec_for(self, size: int, link_bytes_per_s: float | None) -> Codec | None:
        """What `size` bytes of KV go through to a link that moves so many bytes a second, if it is known."""
        if not self._costs:
            return self._chosen
        if link_bytes_per_s is None or not size:
            return None
        best = fastest_codec(self._costs, Crossing(size, _PIECE_BYTES), link_bytes_per_s)
        return self.codecs.get(best.name)


def _sending(cost: CodecCost) -> CodecCost:
    """The cost for a sender, which decodes what it has encoded: the checksums are of what arrives."""
    seconds = 1 / cost.encode_bytes_per_s + 1 / cost.decode_bytes_per_s
    return structs.replace(cost, encode_bytes_per_s=1 / seconds if seconds else cost.encode_bytes_per_s)


def blocks_at_a_time(layout: KVLayout) -> int:
    """How many blocks are coded in one go."""
    return max(1, _PIECE_BYTES // layout.block_bytes)


def cut(spans: Iterable[Span], most: int) -> Iterator[Span]:
    """The same blocks in spans of at most `most`."""
    for span in spans:
        for done in range(0, span.count, most):
            yield Span(span.source + done, span.target + done, min(most, span.count - done))


def arriving(codec: Codec, records: Bytes) -> Bytes:
    """The full blocks, [planes, n, plane_block_bytes], that a receiver makes of `records`."""
    layout = codec.layout
    blocks = np.empty((layout.planes, len(records), layout.plane_block_bytes), np.uint8)
    codec.decode(records, blocks)
    return blocks


def arriving_checksums(blocks: Bytes) -> list[bytes]:
    """Of full blocks, as `Arena.checksums` takes them."""
    return checksums(blocks, range(blocks.shape[1]), blocks.shape[2])
