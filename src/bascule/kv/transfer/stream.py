"""A connection that is waited for with a bound and never blocks otherwise, so that any thread can end it."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
from time import monotonic

from bascule.kv.transfer.frames import Buffers

DRAIN_SECONDS = 2.0
"""How long a refused peer may take to stop: what it still sends is thrown away, so that it can read the refusal."""
_SCRATCH_BYTES = 1 << 20
_SIOCOUTQNSD = 0x894B
"""Linux's name for the bytes of a TCP socket that have not been sent even once."""


class Stream:
    """A connected stream socket (not owned)."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection

    def peer(self) -> str:
        """The other end's address; raises OSError once it is gone."""
        return "{}:{}".format(*self._connection.getpeername()[:2])

    def wait(self, events: int, seconds: float | None, *files: int) -> int:
        """Wait for poll `events`, or until one of `files` is readable; returns the events that came.

        Raises TimeoutError after `seconds` (None: never).
        """
        poller = select.poll()
        poller.register(self._connection, events)
        for file in files:
            poller.register(file, select.POLLIN)
        ready = dict(poller.poll(None if seconds is None else seconds * 1000))
        if not ready:
            raise TimeoutError(f"nothing moved for {seconds:g} s")
        return ready.get(self._connection.fileno(), 0)

    def read(self, count: int, seconds: float) -> bytes:
        """`count` bytes, or none where the peer has ended; raises ConnectionError if it ends in the middle.

        Raises TimeoutError if not all have come after `seconds`, however it is that they come.
        """
        data = bytearray(count)
        memory = Buffers([memoryview(data)])
        deadline = monotonic() + seconds
        while memory.left:
            try:
                self.wait(select.POLLIN, max(0.0, deadline - monotonic()))
                self.receive_some(memory)
            except TimeoutError:
                raise TimeoutError(f"{count - memory.left} of {count} bytes came within {seconds:.3g} s") from None
            except ConnectionError:
                if memory.left == count:
                    return b""
                raise
        return bytes(data)

    def receive_some(self, memory: Buffers) -> bool:
        """Receive what is there, without blocking; False if nothing is. Raises ConnectionError at the peer's end."""
        try:
            received = self._connection.recvmsg_into(memory.pending())[0]
        except BlockingIOError:
            return False
        if received == 0:
            raise ConnectionError("the peer closed the connection")
        memory.advance(received)
        return True

    def send_some(self, memory: Buffers) -> bool:
        """Send what the connection takes, without blocking; False if it takes nothing."""
        try:
            memory.advance(self._connection.sendmsg(memory.pending()))
        except BlockingIOError:
            return False
        return True

    def has_unsent(self) -> bool:
        """Whether the kernel still holds bytes that it has not handed to the network."""
        return bool(struct.unpack("i", fcntl.ioctl(self._connection, _SIOCOUTQNSD, bytes(4)))[0])

    def write(self, memory: Buffers, seconds: float) -> None:
        """Send all; raises TimeoutError if nothing moves for `seconds`."""
        while memory.left:
            self.wait(select.POLLOUT, seconds)
            self.send_some(memory)

    def drain(self) -> None:
        """Say no more, and throw away what still comes until the peer ends, for a bounded time."""
        self._connection.shutdown(socket.SHUT_WR)
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        deadline = monotonic() + DRAIN_SECONDS
        with contextlib.suppress(OSError):
            while (left := deadline - monotonic()) > 0:
                self.wait(select.POLLIN, left)
                self.receive_some(Buffers([scratch]))

    def shut_down(self, direction: int = socket.SHUT_RDWR) -> None:
        """End the connection (in one `direction`) and wake whoever waits for it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(direction)
