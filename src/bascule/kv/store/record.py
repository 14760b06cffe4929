"""A stored block as bytes that say what they are: whose KV, of which tokens, in which codec, and a checksum over all.

    magic 4 | version 2 | codec length 2 | tokens 4 | payload length 8 | block hash 16 | fingerprint digest 16
    codec | token ids, 4 bytes each | payload | xxh3_128 of everything before, 16

Numbers are little-endian. The checksum finds accidents, not forgers: a tier's operator is trusted.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence

import xxhash
from blake3 import blake3
from msgspec import Struct

from bascule.errors import BasculeError
from bascule.kv.store.base import Blob
from bascule.types import BlockHash

_MAGIC = b"BKVR"
_VERSION = 1
_HASH_BYTES = 16
_CHECKSUM_BYTES = 16
_HEADER = struct.Struct(f"<4sHHIQ{_HASH_BYTES}s16s")


class InvalidRecord(BasculeError):
    """Bytes that are not the block asked for; `reason` is one word: `format`, `version`, `length`, `checksum`, `name`,
    `fingerprint` or `tokens`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not a valid record of this block: {reason}")
        self.reason = reason


class Payload(Struct, frozen=True):
    """A block's KV, encoded by `codec` (whether that codec is known is the caller's question)."""

    codec: str
    data: Blob


def pack(name: BlockHash, fingerprint: str, tokens: Sequence[int], payload: Payload) -> bytes:
    """The record of the block `name` of the model with `fingerprint`, which holds the KV of `tokens` (its own ids).

    Raises ValueError if `name` is not 16 bytes, OverflowError for a token id that has no room in four.
    """
    if len(name) != _HASH_BYTES:
        raise ValueError(f"a block's hash has {_HASH_BYTES} bytes, not {len(name)}")
    codec = payload.codec.encode()
    data = memoryview(payload.data).cast("B")
    header = _HEADER.pack(_MAGIC, _VERSION, len(codec), len(tokens), len(data), name, _digest(fingerprint))
    pieces: list[Blob] = [header, codec, _little_endian(tokens), data]
    checksum = xxhash.xxh3_128()
    for piece in pieces:
        checksum.update(piece)
    return b"".join([*pieces, checksum.digest()])


def unpack(name: BlockHash, fingerprint: str, tokens: Sequence[int], data: Blob) -> Payload:
    """What `pack` was given; `Payload.data` is a view into `data`.

    Raises InvalidRecord for anything else, a block of the same hash but other tokens included.
    """
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size + _CHECKSUM_BYTES:
        raise InvalidRecord("length")
    magic, version, codec_bytes, count, payload_bytes, stored_name, digest = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise InvalidRecord("format")
    if version != _VERSION:
        raise InvalidRecord("version")
    codec_end = _HEADER.size + codec_bytes
    tokens_end = codec_end + 4 * count
    payload_end = tokens_end + payload_bytes
    if payload_end + _CHECKSUM_BYTES != len(view):
        raise InvalidRecord("length")
    if xxhash.xxh3_128_digest(view[:payload_end]) != view[payload_end:]:
        raise InvalidRecord("checksum")
    if stored_name != name:
        raise InvalidRecord("name")
    if digest != _digest(fingerprint):
        raise InvalidRecord("fingerprint")
    if view[codec_end:tokens_end] != _little_endian(tokens):
        raise InvalidRecord("tokens")
    try:
        codec = str(view[_HEADER.size : codec_end], "utf-8")
    except UnicodeDecodeError:
        raise InvalidRecord("format") from None
    return Payload(codec, view[tokens_end:payload_end])


def _digest(fingerprint: str) -> bytes:
    return blake3(fingerprint.encode()).digest(16)


def _little_endian(tokens: Sequence[int]) -> bytes:
    numbers = array("I", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
