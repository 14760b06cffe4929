"""How blocks look on a TCP connection: fixed headers of 64 bytes, payloads that lie in the arenas themselves, replies.

A frame is a header and, for a write, `planes x count x plane_block_bytes` bytes, plane after plane; or, if the header
names a lossy codec, `count` records of it. The receiver answers an announcement and a flush; it answers anything else
only to refuse it, and then closes the connection. A connection that begins with `SEAL` carries all this in records that
nobody else can read (`sealing.py`).
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum

import msgspec
from blake3 import blake3
from msgspec import Struct

from bascule.kv.arena import Arena
from bascule.kv.codecs import NAMES
from bascule.kv.codecs.base import EXACT
from bascule.types import KVLayout, TicketId

_MAGIC = b"bKV1"
_HEADER = struct.Struct("!4sBB2x16s16s16sII")
_REPLY = struct.Struct("!4sB3x")
HEADER_BYTES = _HEADER.size
REPLY_BYTES = _REPLY.size
_MOST_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 1024)


class Kind(IntEnum):
    ANNOUNCE = 1
    WRITE = 2
    FLUSH = 3
    SEAL = 4


class Verdict(IntEnum):
    """A receiver's answer; all but the first are refusals."""

    DONE = 0
    MALFORMED = 1
    UNKNOWN_TICKET = 2
    WRONG_SECRET = 3
    OTHER_LAYOUT = 4
    OUTSIDE_GRANT = 5
    REVOKED = 6
    CODEC_NOT_ALLOWED = 7
    MALFORMED_RECORDS = 8
    NOT_SEALED = 9
    NO_KEY = 10
    FORGED = 11

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")

    @property
    def remedy(self) -> str:
        """What whoever is refused so may do."""
        if self in (Verdict.NOT_SEALED, Verdict.NO_KEY):
            return "give all workers the same --cluster-key-file"
        return "prepare the handoff again"


class Malformed(ValueError):
    """Bytes that are not of this protocol."""


class Header(Struct, frozen=True):
    """`key` and `layout` are digests (`ticket_key`, `layout_digest`); a write covers `count` blocks from `first` on, in
    the form of `codec`, which travels as its place in `codecs.NAMES`. `SEAL`, which goes in clear, has in the secret's
    place what the sender has drawn."""

    kind: Kind
    key: bytes
    secret: bytes
    layout: bytes
    first: int = 0
    count: int = 0
    codec: str = EXACT

    def pack(self) -> bytes:
        codec = NAMES.index(self.codec)
        return _HEADER.pack(_MAGIC, self.kind, codec, self.key, self.secret, self.layout, self.first, self.count)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Raises Malformed."""
        magic, kind, codec, key, secret, layout, first, count = _HEADER.unpack(data)
        if (
            magic != _MAGIC
            or kind not in Kind.__members__.values()
            or codec >= (len(NAMES) if kind == Kind.WRITE else 1)
        ):
            raise Malformed(f"no frame begins with {data[:6]!r}")
        return cls(Kind(kind), key, secret, layout, first, count, NAMES[codec])


def pack_reply(verdict: Verdict) -> bytes:
    return _REPLY.pack(_MAGIC, verdict)


def unpack_reply(data: bytes) -> Verdict:
    """Raises Malformed."""
    magic, verdict = _REPLY.unpack(data)
    if magic != _MAGIC or verdict not in Verdict.__members__.values():
        raise Malformed(f"no reply reads {data!r}")
    return Verdict(verdict)


def ticket_key(ticket: TicketId) -> bytes:
    """16 bytes that stand for a ticket of any length."""
    return blake3(ticket.encode()).digest(16)


def layout_digest(layout: KVLayout) -> bytes:
    """16 bytes, equal for equal layouts."""
    return blake3(msgspec.json.encode(layout)).digest(16)


class Buffers:
    """Memory to send from or receive into with scatter-gather calls that may do only a part each time."""

    def __init__(self, views: list[memoryview]) -> None:
        self._views = views
        self._next = 0
        self.left = sum(view.nbytes for view in views)

    def pending(self) -> list[memoryview]:
        """The next buffers, as many as one call takes."""
        return self._views[self._next : self._next + _MOST_BUFFERS]

    def advance(self, count: int) -> None:
        """`count` bytes of `pending` are done."""
        self.left -= count
        while self._next < len(self._views) and count >= self._views[self._next].nbytes:
            count -= self._views[self._next].nbytes
            self._next += 1
        if count:
            self._views[self._next] = self._views[self._next][count:]


def payload(arena: Arena, first: int, count: int) -> list[memoryview]:
    """The memory of `count` blocks from `first` on: one view per plane, in place."""
    return [plane.reshape(-1).data for plane in arena.bytes[:, first : first + count]]
