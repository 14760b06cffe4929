"""A client's connection: uvicorn's, but what is written in one turn of the event loop leaves in one piece, and a client
that takes nothing for long is let go."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bascule.machine import open_files_allowed

log = logging.getLogger(__name__)

MOST_HEAD = 64 << 10
"""Bytes of a request's first line and headers, and of what comes between or behind the parts of a body."""
HEAD_S = 30.0
"""How long the first line and headers may take to come, from the connection or from the first byte of them on."""
STALLED_S = 60.0
"""How long a client may take nothing of what waits for it; then it is cut off, and what it asked for is cancelled."""
LINGER_S = 5.0
"""How long the rest of a body may take, and is thrown away, that was answered before it was there: to close at once
would reset the connection, and the answer might be lost with it."""
_OWN_FILES = 128
"""Of the open files allowed here that clients may not have; workers, logs and stores need some."""
_SAY_S = 60.0


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP over a gathering transport, with bounds on what is not of a body and on waiting for clients.
    Trailers are dropped.

    Status line, first chunk, usage and end of a stream are writes of their own; each would be a system call, a packet
    and a wake-up of the client.
    """

    _head = 0
    """Bytes that came since the last request was complete, or its headers, or since the last bytes of its body."""
    _in_body = False
    _head_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None
    """Cuts a client off whose request was answered before all of it was there, unless the rest comes soon."""

    def data_received(self, data: bytes) -> None:
        if not self._in_body and not self._head:
            self._await_head()
        self._head += len(data)
        super().data_received(data)
        if self._head > MOST_HEAD and not self.transport.is_closing():
            if not self._in_body:  # else an answer may have begun
                self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:
            super().on_header(name, value)

    def _await_head(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_headers_complete(self) -> None:
        self._in_body, self._head = True, 0
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._head = False, 0
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        early = self._in_body and self.cycle is not None and self.cycle.response_complete
        if early and not self.transport.is_closing():
            self._lingering = self.loop.call_later(LINGER_S, self.transport.abort)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, GatheringTransport(transport, self.loop))
        if len(self.connections) > (most := most_clients()):
            say_too_many(self.loop.time(), most)
            self.transport.write(_TOO_MANY)
            self.transport.close()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for due in (self._head_due, self._reading_due, self._lingering):
            if due is not None:
                due.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None


_said_at = -_SAY_S


def most_clients() -> int:
    """Connections at a time; more would leave this process none to its workers."""
    return max(open_files_allowed() - _OWN_FILES, 1)


def say_too_many(now: float, most: int) -> None:
    """Once a minute: whoever opens them all can do so without end."""
    global _said_at
    if now - _said_at >= _SAY_S:
        _said_at = now
        log.warning("%d clients are connected; more are refused until some leave (ulimit -n allows more)", most)


def _last_words(status: bytes, kind: bytes, code: bytes, message: bytes) -> bytes:
    body = b'{"error":{"message":"%b","type":"%b","param":null,"code":"%b"}}' % (message, kind, code)
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


_TOO_LARGE = _last_words(
    b"431 Request Header Fields Too Large",
    b"invalid_request_error",
    b"headers_too_large",
    b"The request line and its headers have more than %d bytes; send fewer or shorter ones." % MOST_HEAD,
)
_TOO_MANY = _last_words(
    b"503 Service Unavailable",
    b"server_error",
    b"too_many_connections",
    b"Too many clients are connected to this server; try again in a few seconds.",
)


class GatheringTransport:
    """Passes on what was written since the event loop's last turn; all but `write` and `close` is the transport's."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Close once all that was written has left."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
