"""A response as server-sent events: opened once the first token is there, ended by [DONE] or by an error event."""

from __future__ import annotations

import asyncio

from starlette.types import Send

from bascule.api.errors import error_body
from bascule.api.forms import DONE
from bascule.errors import RequestError

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

LAST_WORDS_TIMEOUT = 1.0
"""Seconds that an error event may take to be written to a client that reads slowly."""


class EventStream:
    """One streamed response. Several tasks may write; a write is never torn apart."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.opened = False
        """The status line has gone out: an error can only be an event from now on."""

    async def open(self, headers: dict[str, str]) -> None:
        fields = [*_HEADERS, *((name.lower().encode(), value.encode("latin-1")) for name, value in headers.items())]
        self.opened = True
        await self._send({"type": "http.response.start", "status": 200, "headers": fields})

    async def write(self, events: bytes) -> None:
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def done(self) -> None:
        """The answer is complete."""
        await self._send({"type": "http.response.body", "body": DONE})

    async def fail(self, error: RequestError) -> None:
        """End with an error event and without [DONE], which stands for a complete answer."""
        body = b"data: " + error_body(error) + b"\n\n"
        try:
            async with asyncio.timeout(LAST_WORDS_TIMEOUT):
                await self._send({"type": "http.response.body", "body": body})
        except TimeoutError:
            return
