"""The way through blocks that lossy codecs share: keys and values apart, in pieces that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bascule.kv.codecs.base import Bits, Bytes, CannotDecode, CannotEncode, check_blocks, check_records
from bascule.kv.codecs.floats import FORMS, FloatForm
from bascule.types import KVLayout

PIECE_NUMBERS = 1 << 16
"""Numbers coded at a time: 256 KiB of float32, which a second-level cache holds beside what they come from."""

Flags = NDArray[np.bool_]


class PlaneCoder(Protocol):
    """Codes blocks within planes of one kind: the keys of layers, or their values."""

    record_bytes: int
    """Bytes of one encoded block in one plane."""

    def encode(self, bits: Bits, records: Bytes) -> Flags:
        """Code `bits`, [planes, n, numbers], into `records`, [planes, n, record_bytes].

        Returns which it has no codes for, [planes, n]; their records mean nothing.
        """
        ...

    def decode(self, records: Bytes, bits: Bits) -> Flags:
        """The other way; returns which records no encoder writes."""
        ...


class LossyCodec:
    """Implements `Codec` for layouts of floats.

    A record is, layer after layer, the code of the layer's keys and the code of its values.
    """

    def __init__(self, name: str, layout: KVLayout, keys: PlaneCoder, values: PlaneCoder) -> None:
        self.name = name
        self.layout = layout
        self._keys, self._values = keys, values
        self._form: FloatForm = FORMS[layout.dtype]
        self._layer_bytes = keys.record_bytes + values.record_bytes
        self.record_bytes = layout.layers * self._layer_bytes

    def encode(self, blocks: Bytes) -> Bytes:
        """See `Codec.encode`."""
        records = np.empty((check_blocks(self.layout, blocks), self.record_bytes), np.uint8)
        bad = self._each(blocks, records, lambda coder, bits, part: coder.encode(bits, part))
        if bad is not None:
            raise CannotEncode(
                f"the {bad} are not finite or too large for the codec {self.name} ({self.layout.dtype}); "
                "this KV can only be kept by the codec none"
            )
        return records

    def decode(self, records: Bytes, out: Bytes) -> None:
        """See `Codec.decode`."""
        check_records(self, records, out)
        bad = self._each(out, records, lambda coder, bits, part: coder.decode(part, bits))
        if bad is not None:
            raise CannotDecode(f"the bytes for the {bad} are not of the codec {self.name}")

    def _each(self, blocks: Bytes, records: Bytes, work: Callable[[PlaneCoder, Bits, Bytes], Flags]) -> str | None:
        """Do `work` on every piece of `blocks` and `records`; says which plane and block it flags first, if any."""
        layers = records.reshape(len(records), self.layout.layers, self._layer_bytes).transpose(1, 0, 2)
        bits, split = blocks.view(self._form.bits), self._keys.record_bytes
        for kind, coder, part in (
            (0, self._keys, layers[..., :split]),
            (1, self._values, layers[..., split:]),
        ):
            plane = bits[kind::2]
            for piece in _pieces(self.layout.layers, blocks.shape[1], plane.shape[2]):
                with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is flagged
                    flags = work(coder, plane[piece], part[piece])
                if flags.any():
                    layer, block = np.argwhere(flags)[0] + [axis.start for axis in piece]
                    return f"{('keys', 'values')[kind]} of layer {layer} in block {block} of {blocks.shape[1]}"
        return None


def _pieces(layers: int, n: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Cut [layers, n] into parts of about PIECE_NUMBERS numbers; where there are few blocks, of many layers."""
    wide = max(1, min(n, PIECE_NUMBERS // numbers))
    high = max(1, PIECE_NUMBERS // (numbers * wide))
    for layer in range(0, layers, high):
        for block in range(0, n, wide):
            yield slice(layer, min(layer + high, layers)), slice(block, min(block + wide, n))
