"""A client's connection: uvicorn's, but what is written in one turn of the event loop leaves in one piece, and a client
that takes nothing for long is let go."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any, cast

import httptools
from starlette.datastructures import Headers
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bascule.api.context import REQUEST_ID, WHOLE, request_id_of
from bascule.api.errors import error_body
from bascule.errors import InvalidRequest, RequestError, Unavailable
from bascule.machine import open_files_allowed

log = logging.getLogger(__name__)

MOST_HEAD = 64 << 10
"""Bytes of a request's first line and headers, and of what comes between or behind the parts of a body."""
HEAD_S = 30.0
"""How long the first line and headers may take to come, from the connection or from the first byte of them on, or from
the end of the answer before them."""
STALLED_S = 60.0
"""How often to look whether a client took something of what waits for it; if not, it is cut off, and what it asked for
is cancelled."""
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
    _in_head = False
    _in_body = False
    _owed = 0
    """Requests whose headers are complete and whose answers are not."""
    _refusal: RequestError | None = None
    """Why nothing more is read; the last answer, once those before it have ended."""
    _head_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None
    """Cuts a client off whose request was answered before all of it was there, unless the rest comes soon."""

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if not self._in_body and not self._owed:
            self._await_head()
        self._head += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._refuse(_malformed(error))
        else:
            if self._head > MOST_HEAD:
                self._refuse(_HeadersTooLarge())

    def _parse(self, data: bytes) -> None:
        """Offers to speak another protocol are ignored (RFC 9110, 7.8): a parser takes all that comes behind one for
        that protocol, so a new one reads the request's head again, without the offer."""
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
            if (method := self.parser.get_method()) == b"CONNECT":
                self._refuse(InvalidRequest("This server is no proxy; send it no CONNECT.", code="invalid_http"))
                return
            line = b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())
            fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            self.parser.feed_data(b"".join((line, *fields, b"\r\n")))

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:
            super().on_header(name, value)

    def _await_head(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._in_head, self._in_body, self._head = False, True, 0
        self._owed += 1
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body, self._head = False, 0
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        super().on_message_complete()
        cast(dict[str, object], self.cycle.scope)[WHOLE] = True

    def on_response_complete(self) -> None:
        self._owed -= 1
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif self._in_body and self.cycle.response_complete:
            self._lingering = self.loop.call_later(LINGER_S, self.transport.abort)
        elif self._in_head and not self._owed:
            self._await_head()

    def _refuse(self, error: RequestError) -> None:
        """Answer with `error` as soon as all that was asked before is answered, then close; read nothing more."""
        if self.transport.is_closing():
            return
        self._refusal = error
        if self._in_body:  # the request at fault was handed on
            self._in_body = False
            if self.pipeline:
                self.pipeline.popleft()
            elif self.cycle.response_started:
                self.transport.close()
                return
            self._owed -= 1
        if not self._owed:
            self.transport.write(_last_words(error, Headers(raw=self.headers)))
            self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, GatheringTransport(transport, self.loop))
        if len(self.connections) > (most := most_clients()):
            say_too_many(self.loop.time(), most)
            self.transport.write(_last_words(_TooMany(), Headers()))
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
        self._await_reading()

    def _await_reading(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._reading_due = self.loop.call_later(STALLED_S, self._check_reading, waiting)

    def _check_reading(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() < waiting:
            self._await_reading()
        else:
            self.transport.abort()

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


class _HeadersTooLarge(RequestError):
    """431: the first line and headers are over the limit."""

    status = 431
    kind = "invalid_request_error"

    def __init__(self) -> None:
        super().__init__(
            f"The request line and its headers have more than {MOST_HEAD} bytes; send fewer or shorter ones.",
            code="headers_too_large",
        )


class _TooMany(Unavailable):
    def __init__(self) -> None:
        super().__init__(
            "Too many clients are connected to this server; try again in a few seconds.", code="too_many_connections"
        )


def _malformed(error: httptools.HttpParserError) -> InvalidRequest:
    """What the parser says is wrong; a failure of ours, while it parsed, is one of reading the target."""
    ours = isinstance(error, httptools.HttpParserCallbackError)
    why = "its target is no path" if ours else str(error) or "it cannot be parsed"
    return InvalidRequest(
        f"The request is not valid HTTP/1.1: {why}. Mend the client that sent it.", code="invalid_http"
    )


def _last_words(error: RequestError, asked: Headers) -> bytes:
    """A whole response that the application has no part in; `asked` are the headers of the request, as far as known."""
    body = error_body(error)
    status, phrase = error.status, HTTPStatus(error.status).phrase
    head = (
        f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n{REQUEST_ID}: {request_id_of(asked)}\r\n\r\n"
    )
    return head.encode() + body


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
