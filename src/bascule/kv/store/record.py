"""A stored block as bytes that say what they are: whose KV, of which tokens, in which codec, and a checksum over all.

    magic 4 | version 2 | codec length 2 | tokens 4 | payload length 8
    block hash 16 | digest of the model's fingerprint 16 | digest of the tenant's salt 16
    codec | token ids, 4 bytes each | payload | xxh3_128 of everything before, 16

Numbers are little-endian. The checksum finds accidents, not forgers: a tier's operator is trusted.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from functools import cache

import xxhash
from blake3 import blake3
from msgspec import Struct

from bascule.errors import BasculeError
from bascule.kv.store.base import Blob
from bascule.types import BlockHash, Salt

_MAGIC = b"BKVR"
_VERSION = 2
_FIRST_VERSION = 2
"""Whose records are called like their blocks."""
_HASH_BYTES = 16
_CHECKSUM_BYTES = 16
_HEADER = struct.Struct(f"<4sHHIQ{_HASH_BYTES}s16s16s")
HEAD_BYTES = 256
"""The beginning of a record that `label` needs, codec included."""
_LONGEST_CODEC = HEAD_BYTES - _HEADER.size


class InvalidRecord(BasculeError):
    """Bytes that are not the block asked for; `reason` is one word: `format`, `version`, `length`, `checksum`, `name`,
    `fingerprint`, `tenant` or `tokens`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not a valid record of this block: {reason}")
        self.reason = reason


class Payload(Struct, frozen=True):
    """A block's KV, encoded by `codec` (whether that codec is known is the caller's question)."""

    codec: str
    data: Blob


class Label(Struct, frozen=True):
    """What a record says of itself; `model` and `tenant` are digests: `model_digest`, `tenant_digest`."""

    name: BlockHash
    model: bytes
    tenant: bytes
    codec: str
    tokens: int


def name_in_tiers(name: BlockHash) -> BlockHash:
    """What a block is called in the tiers; the inverse is the same.

    Each version of records has names of its own. So releases that share a place, as they do while one takes the other's
    turn, neither meet nor drop each other's blocks, and make room for both.
    """
    if not (mask := _mask(_VERSION)):
        return name
    return BlockHash((int.from_bytes(name, "big") ^ mask).to_bytes(_HASH_BYTES, "big"))


@cache
def _mask(version: int) -> int:
    if version == _FIRST_VERSION:
        return 0
    digest = blake3(str(version).encode(), derive_key_context="bascule 1 names of a version of records")
    return int.from_bytes(digest.digest(_HASH_BYTES), "big")


def pack(name: BlockHash, fingerprint: str, tokens: Sequence[int], payload: Payload, salt: Salt = b"") -> bytes:
    """The record of the block `name` of the model with `fingerprint`, which holds the KV of `tokens` (its own ids) for
    those who have `salt`.

    Raises ValueError if `name` is not 16 bytes or the codec's is too long, OverflowError for a token id that has no
    room in four.
    """
    if len(name) != _HASH_BYTES:
        raise ValueError(f"a block's hash has {_HASH_BYTES} bytes, not {len(name)}")
    codec = payload.codec.encode()
    if len(codec) > _LONGEST_CODEC:
        raise ValueError(f"a codec's name has at most {_LONGEST_CODEC} bytes, not {len(codec)}")
    data = memoryview(payload.data).cast("B")
    model, tenant = model_digest(fingerprint), tenant_digest(salt)
    header = _HEADER.pack(_MAGIC, _VERSION, len(codec), len(tokens), len(data), name, model, tenant)
    pieces: list[Blob] = [header, codec, _little_endian(tokens), data]
    checksum = xxhash.xxh3_128()
    for piece in pieces:
        checksum.update(piece)
    return b"".join([*pieces, checksum.digest()])


def unpack(name: BlockHash, fingerprint: str, tokens: Sequence[int], data: Blob, salt: Salt = b"") -> Payload:
    """What `pack` was given; `Payload.data` is a view into `data`.

    Raises InvalidRecord for anything else, a block of the same hash but other tokens or another tenant's included.
    """
    view = memoryview(data).cast("B")
    parts = _check(name, view)
    if parts.model != model_digest(fingerprint):
        raise InvalidRecord("fingerprint")
    if parts.tenant != tenant_digest(salt):
        raise InvalidRecord("tenant")
    if view[parts.codec_end : parts.tokens_end] != _little_endian(tokens):
        raise InvalidRecord("tokens")
    return _payload(view, parts)


def payload_of(name: BlockHash, data: Blob) -> Payload:
    """What a record carries, whosever it is; raises InvalidRecord like `inspect`."""
    view = memoryview(data).cast("B")
    parts = _check(name, view)
    return _payload(view, parts)


def inspect(name: BlockHash, data: Blob) -> Label:
    """What a record says of itself, after all the checks that need neither the model nor the tokens.

    Raises InvalidRecord for what is not a whole record of the block `name`.
    """
    view = memoryview(data).cast("B")
    return _label(view, _check(name, view))


def label(head: Blob, size: int) -> Label:
    """What a record of `size` bytes says of itself in its first `HEAD_BYTES`, unchecked but for its form and length.

    Raises InvalidRecord for what does not even look like a record.
    """
    view = memoryview(head).cast("B")
    return _label(view, _measure(view, size))


def model_digest(fingerprint: str) -> bytes:
    """What stands in a record for the model's fingerprint."""
    return blake3(fingerprint.encode(errors="surrogateescape")).digest(16)


def tenant_digest(salt: Salt) -> bytes:
    """What stands in a record for a tenant's salt, which does not follow from it; zeros where all may share a block."""
    return blake3(salt, derive_key_context="bascule 1 tenant of a block").digest(16) if salt else bytes(16)


class _Parts(Struct, frozen=True):
    """What is read from a header, and where the parts behind it end."""

    name: bytes
    model: bytes
    tenant: bytes
    codec_end: int
    tokens_end: int
    payload_end: int


def _measure(head: memoryview, size: int) -> _Parts:
    """The parts of a record of `size` bytes; raises InvalidRecord if they do not add up to that."""
    if size < _HEADER.size + _CHECKSUM_BYTES or len(head) < min(size, HEAD_BYTES):
        raise InvalidRecord("length")
    magic, version, codec_bytes, count, payload_bytes, name, model, tenant = _HEADER.unpack_from(head)
    if magic != _MAGIC:
        raise InvalidRecord("format")
    if version != _VERSION:
        raise InvalidRecord("version")
    codec_end = _HEADER.size + codec_bytes
    tokens_end = codec_end + 4 * count
    payload_end = tokens_end + payload_bytes
    if payload_end + _CHECKSUM_BYTES != size:
        raise InvalidRecord("length")
    if codec_bytes > _LONGEST_CODEC:
        raise InvalidRecord("format")
    return _Parts(name, model, tenant, codec_end, tokens_end, payload_end)


def _check(name: BlockHash, view: memoryview) -> _Parts:
    """The parts of a record that is whole and of this name; raises InvalidRecord."""
    parts = _measure(view, len(view))
    if xxhash.xxh3_128_digest(view[: parts.payload_end]) != view[parts.payload_end :]:
        raise InvalidRecord("checksum")
    if parts.name != name:
        raise InvalidRecord("name")
    return parts


def _payload(view: memoryview, parts: _Parts) -> Payload:
    return Payload(_codec(view, parts), view[parts.tokens_end : parts.payload_end])


def _codec(head: memoryview, parts: _Parts) -> str:
    try:
        return str(head[_HEADER.size : parts.codec_end], "utf-8")
    except UnicodeDecodeError:
        raise InvalidRecord("format") from None


def _label(head: memoryview, parts: _Parts) -> Label:
    tokens = (parts.tokens_end - parts.codec_end) // 4
    return Label(BlockHash(parts.name), parts.model, parts.tenant, _codec(head, parts), tokens)


def _little_endian(tokens: Sequence[int]) -> bytes:
    numbers = array("I", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
