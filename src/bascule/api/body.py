"""Reads a request's body: bounded, valid UTF-8, strict JSON, an object."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request

from bascule.api.errors import ClientGone, SlowBody
from bascule.api.fields import type_name
from bascule.errors import InvalidRequest, TooLarge

BODY_SECONDS = 20.0
"""A body that takes longer to arrive is given up, so that it holds neither its connection nor a stop of the server."""


async def read_object(request: Request, limit: int, *, empty: bool = False) -> dict[str, object]:
    """The JSON object in the body of at most `limit` bytes; one without fields for no body, if it may be `empty`.

    Raises TooLarge as soon as that is known, InvalidRequest for anything but a JSON object, SlowBody, and ClientGone.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _read(request, limit)
    except TimeoutError:
        raise SlowBody(f"The body did not arrive within {BODY_SECONDS:g} s; send it whole.", code="timeout") from None
    return {} if empty and not body else _decode(body)


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return bytes(body)


def _decode(body: bytes) -> dict[str, object]:
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
