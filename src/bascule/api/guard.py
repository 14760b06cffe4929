"""Lets in only those who bring a key, where keys are asked for."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from blake3 import blake3
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bascule.api.errors import error_response
from bascule.errors import RequestError

_OPEN = frozenset({"/health", "/ready"})
"""What probes ask, who have no keys; the answers tell nothing of requests or of the model."""


class Unauthorized(RequestError):
    """401: no key, or one that is not known."""

    status = 401
    kind = "invalid_request_error"


class KeyGuard:
    """ASGI layer: a request goes on if it brings one of `keys` as `Authorization: Bearer KEY`, or asks for a probe."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], what: str) -> None:
        """`what` they are keys of, in words."""
        self._app = app
        self._what = what
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN and not self._known(Headers(scope=scope)):
            error = Unauthorized(
                f"{self._what} asks for a key: send one that it knows as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )
            await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        """As quick for a key that is nearly right as for any other: digests are compared, with all keys, whole."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip().encode("latin-1"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return blake3(key).digest()
