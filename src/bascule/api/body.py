"""Reads a request's body: bounded, alone and together with all others, valid UTF-8, strict JSON, an object."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import msgspec
from starlette.requests import Request

from bascule.api.context import WHOLE
from bascule.api.errors import ClientGone, SlowBody
from bascule.api.fields import type_name
from bascule.errors import InvalidRequest, Overloaded, TooLarge

BODY_SECONDS = 20.0
"""A body that takes longer to arrive is given up, so that it holds neither its connection nor a stop of the server."""
MOST_BYTES = 256 << 20
"""Of all bodies that are being read or checked; twice the limit of one body, if that is more."""
SMALL_BYTES = 64 << 10
"""A body of no more still finds room, in the last eighth, when larger ones do not."""
_AGAIN_S = 1.0


class Bodies:
    """What the bodies hold that are being read or checked at a time: bounded, or many clients that send large ones
    slowly would fill this process's memory."""

    def __init__(self, limit: int) -> None:
        """`limit` is one body's (bytes)."""
        self.held = 0
        self._most = max(MOST_BYTES, 2 * limit)

    def add(self, more: int, size: int) -> None:
        """Count `more` bytes of a body that has `size` then; raises Overloaded where there is no room for them."""
        if self.held + more > (self._most if size <= SMALL_BYTES else self._most - self._most // 8):
            raise Overloaded(
                "The bodies of other requests fill the memory that there is for them; send the request again in a "
                "second.",
                retry_after=_AGAIN_S,
                code="too_many_bodies",
            )
        self.held += more


class Share:
    """One body's part of what is held, until `release`."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._size = 0

    def add(self, more: int) -> None:
        """Raises Overloaded."""
        self._bodies.add(more, self._size + more)
        self._size += more

    def release(self) -> None:
        """The body is not held any more. May be called again."""
        self._bodies.held -= self._size
        self._size = 0


async def read_object(
    request: Request, limit: int, share: Share | None = None, *, empty: bool = False
) -> dict[str, object]:
    """The JSON object in the body of at most `limit` bytes; one without fields for no body, if it may be `empty`.

    What is read counts in `share`; without, `limit` is small. Raises TooLarge as soon as that is known, Overloaded,
    InvalidRequest for anything but a JSON object, SlowBody, and ClientGone.
    """
    try:
        async with nullcontext() if request.scope.get(WHOLE) else asyncio.timeout(BODY_SECONDS):
            body = await _read(request, limit, share)
    except TimeoutError:
        raise SlowBody(f"The body did not arrive within {BODY_SECONDS:g} s; send it whole.", code="timeout") from None
    return {} if empty and not body else _decode(body)


async def _read(request: Request, limit: int, share: Share | None) -> bytearray:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        if len(body) + len(part) > limit:
            raise _too_large(limit)
        if share is not None:
            share.add(len(part))
        body += part
        if not message.get("more_body", False):
            return body


def _decode(body: bytearray) -> dict[str, object]:
    if not body:
        raise InvalidRequest("The body is empty; send a JSON object.", code="invalid_json")
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise _malformed("it is not valid UTF-8") from error
    except msgspec.DecodeError as error:
        raise _malformed(str(error)) from error
    except RecursionError as error:
        raise _malformed("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {type_name(value)}.", code="invalid_type")
    return value


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The body cannot be read as JSON: {why}.", code="invalid_json")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is larger than {limit} bytes, this server's limit (--max-body).", code="body_too_large")
