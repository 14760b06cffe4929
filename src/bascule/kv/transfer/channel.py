"""Small messages, and one file descriptor, between the two ends of a shared-memory transfer over a local socket."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec import Struct

from bascule import wire
from bascule.kv.transfer.frames import Buffers, Malformed
from bascule.kv.transfer.stream import Stream
from bascule.types import KVLayout, TicketId

_PREFIX_BYTES = 4
_MOST_BYTES = 16 << 20


class Announce(Struct, frozen=True, tag="announce"):
    """First word of a sender."""

    ticket: TicketId
    secret: bytes
    layout: KVLayout


class Welcome(Struct, frozen=True, tag="welcome"):
    """The arena's size and the granted blocks; the arena's memory comes along as a file descriptor."""

    num_blocks: int
    blocks: tuple[int, ...]


class Refused(Struct, frozen=True, tag="refused"):
    reason: str


class Flush(Struct, frozen=True, tag="flush"):
    """Asks whether what was written still counts."""


class Flushed(Struct, frozen=True, tag="flushed"):
    pass


class Closing(Struct, frozen=True, tag="closing"):
    """Last word of a sender: it has stopped writing for good."""


Message = Announce | Welcome | Refused | Flush | Flushed | Closing
_decoder = msgspec.msgpack.Decoder(Message)


def decode(data: bytes) -> Message:
    """Raises Malformed."""
    try:
        message: Message = wire.decode(_decoder, data)
    except wire.WireError as error:
        raise Malformed(str(error)) from error
    return message


class Channel:
    """Messages over a connected local socket, each behind its length. Waits are bounded by the caller."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = Stream(connection)
        self._passed: list[int] = []

    def send(self, message: Message, seconds: float, fd: int | None = None) -> None:
        data = msgspec.msgpack.encode(message)
        prefix = len(data).to_bytes(_PREFIX_BYTES, "little")
        if fd is not None:
            socket.send_fds(self._connection, [prefix], [fd])
            prefix = b""
        self._stream.write(Buffers([memoryview(prefix + data)]), seconds)

    def receive(self, seconds: float) -> Message | None:
        """The next message; None where the peer has ended. Raises TimeoutError, ConnectionError or Malformed."""
        self._stream.wait(select.POLLIN, seconds)
        prefix, passed, _, _ = socket.recv_fds(self._connection, _PREFIX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        self._passed.extend(passed)
        if not prefix:
            return None
        prefix += self._stream.read(_PREFIX_BYTES - len(prefix), seconds)
        size = int.from_bytes(prefix, "little")
        if size > _MOST_BYTES:
            raise Malformed(f"a message of {size} bytes")
        return decode(self._stream.read(size, seconds))

    def take_fd(self) -> int:
        """The file descriptor that came with what was received; the caller owns it. Raises Malformed if none came."""
        if not self._passed:
            raise Malformed("no memory came along")
        return self._passed.pop()

    def fileno(self) -> int:
        return self._connection.fileno()

    def interrupt(self) -> None:
        """Wake whoever waits to receive; sending still works."""
        self._stream.shut_down(socket.SHUT_RD)

    def close(self) -> None:
        self._connection.close()
        while self._passed:
            os.close(self._passed.pop())


@contextmanager
def peer_process(connection: socket.socket) -> Iterator[int]:
    """A pidfd of the process at the other end (readable once it is gone). Raises OSError if it cannot be seen."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process = os.pidfd_open(int.from_bytes(credentials[:4], "little"))
    try:
        yield process
    finally:
        os.close(process)
