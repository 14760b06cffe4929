"""How the bytes of a TCP connection look: in clear, or sealed, so that nobody on the way can read or change them.

A sealed connection begins with a `SEAL` header in clear, which the receiver answers with a salt. From the ticket's
secret, the cluster's key and what both have drawn, each direction gets a key that no other connection has. From then on
all is records of AES-256-GCM, whose nonces count them: a record that was changed, left out, repeated or moved, or comes
from another connection or from the other end, does not open.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from bascule.kv.transfer.frames import Buffers, Header, Kind, Malformed

SALT_BYTES = 16
TAG_BYTES = 16
_KEY_BYTES = 32
_NONCE_BYTES = 12
_PURPOSE = b"bascule kv over tcp 1"
_BATCH_BYTES = 256 << 10
"""Sealed at a time: stays in the processor's cache, and the library keeps all other Python threads waiting meanwhile,
some tens of microseconds."""

Settle = Callable[[], None]
"""Puts what was received where it belongs; raises Forged, and what is there then is worth nothing."""


class Forged(Malformed):
    """Bytes that the other end of a sealed connection has not sent, or not now."""

    def __init__(self) -> None:
        super().__init__("what came is not what the other end has sealed, or was sealed with other keys")


class Form(Protocol):
    """One end of a connection. Calls come in the order of the bytes, from one thread at a time in each direction."""

    extra: int
    """Bytes by which a header or an answer grows."""

    def wrap(self, word: bytes) -> bytes:
        """A header or an answer, to be sent."""
        ...

    def unwrap(self, data: bytes) -> bytes:
        """A header or an answer that was received; raises Forged."""
        ...

    def outgoing(self, header: bytes, payload: Iterable[memoryview]) -> Iterator[Buffers]:
        """A frame, in parts; each is to be sent before the next is asked for."""
        ...

    def incoming(self, payload: list[memoryview]) -> Iterator[tuple[Buffers, Settle | None]]:
        """Where a frame's payload is to be received, part by part, and what to do then, before the next is asked for
        (None: nothing)."""
        ...


class Clear:
    """As it is: from memory and into memory without a copy."""

    extra = 0

    def wrap(self, word: bytes) -> bytes:
        return word

    def unwrap(self, data: bytes) -> bytes:
        return data

    def outgoing(self, header: bytes, payload: Iterable[memoryview]) -> Iterator[Buffers]:
        yield Buffers([memoryview(header), *payload])

    def incoming(self, payload: list[memoryview]) -> Iterator[tuple[Buffers, Settle | None]]:
        yield Buffers(payload), None


CLEAR: Form = Clear()


class Sealed:
    """Records, each of up to a batch's bytes that lie together, opened straight into the memory they are for."""

    extra = TAG_BYTES

    def __init__(self, ours: bytes, theirs: bytes) -> None:
        """The keys of what this end sends and of what it takes, of 32 bytes each and used by no other connection."""
        self._ours, self._theirs = _Way(ours), _Way(theirs)

    def wrap(self, word: bytes) -> bytes:
        return self._ours.cipher.encrypt(self._ours.nonce(), word, None)

    def unwrap(self, data: bytes) -> bytes:
        try:
            return self._theirs.cipher.decrypt(self._theirs.nonce(), data, None)
        except InvalidTag:
            raise Forged from None

    def outgoing(self, header: bytes, payload: Iterable[memoryview]) -> Iterator[Buffers]:
        head = [memoryview(self.wrap(header))]
        for batch in _batches(payload):
            room = self._ours.room(batch)
            for piece, record in _records(batch, room):
                self._ours.cipher.encrypt_into(self._ours.nonce(), piece, None, record)
            yield Buffers([*head, room])
            head = []
        if head:
            yield Buffers(head)

    def incoming(self, payload: list[memoryview]) -> Iterator[tuple[Buffers, Settle | None]]:
        for batch in _batches(payload):
            room = self._theirs.room(batch)
            yield Buffers([room]), partial(self._open, batch, room)

    def _open(self, batch: list[memoryview], room: memoryview) -> None:
        try:
            for piece, record in _records(batch, room):
                self._theirs.cipher.decrypt_into(self._theirs.nonce(), record, None, piece)
        except InvalidTag:
            raise Forged from None


class _Way:
    """One direction of a connection: its cipher, how many records have gone, and memory for a batch of them."""

    def __init__(self, key: bytes) -> None:
        self.cipher = AESGCM(key)
        self._count = 0
        self._memory = bytearray()

    def nonce(self) -> bytes:
        """The next record's, never the same again."""
        self._count += 1
        return self._count.to_bytes(_NONCE_BYTES, "big")

    def room(self, batch: list[memoryview]) -> memoryview:
        """For a batch's records, until the next call."""
        size = sum(piece.nbytes + TAG_BYTES for piece in batch)
        if size > len(self._memory):
            self._memory = bytearray(size)
        return memoryview(self._memory)[:size]


def _batches(views: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes in groups of at most a batch; no piece of them reaches over the end of a view."""
    batch: list[memoryview] = []
    left = _BATCH_BYTES
    for view in views:
        while view.nbytes:
            piece, view = view[:left], view[left:]
            batch.append(piece)
            left -= piece.nbytes
            if not left:
                yield batch
                batch, left = [], _BATCH_BYTES
    if batch:
        yield batch


def _records(batch: list[memoryview], room: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    """Each piece with its record's place in `room`."""
    for piece in batch:
        size = piece.nbytes + TAG_BYTES
        yield piece, room[:size]
        room = room[size:]


def hello(ticket: bytes, layout: bytes) -> Header:
    """What a sender begins a sealed connection with."""
    return Header(Kind.SEAL, ticket, secrets.token_bytes(SALT_BYTES), layout)


def seals(cluster: bytes, secret: bytes, said: Header, salt: bytes) -> tuple[Sealed, Sealed]:
    """The sender's end and the receiver's, after `said` (see `hello`) was answered with `salt`.

    The same keys come out only where all four are the same, and each end draws for each connection what only it draws
    (in `said`, or as `salt`): so no end uses a key twice, whatever the other does.
    """
    expand = HKDF(SHA256(), 2 * _KEY_BYTES, salt, _PURPOSE + said.pack())
    keys = expand.derive(cluster + secret)
    pushes, answers = keys[:_KEY_BYTES], keys[_KEY_BYTES:]
    return Sealed(pushes, answers), Sealed(answers, pushes)
