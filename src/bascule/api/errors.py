"""Errors as clients see them: every exception becomes OpenAI's JSON shape with the right status and headers."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from bascule.errors import Overloaded, RequestError

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away; it is never seen by anybody, but it says what happened."""


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


def error_body(error: RequestError) -> bytes:
    """`error` as the JSON object that OpenAI's clients read: `{"error": {message, type, param, code}}`."""
    fields = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """The HTTP answer for `error`; an `Overloaded` tells when to come back (whole seconds, at least one)."""
    headers = dict(headers or {})
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Response(error_body(error), status_code=error.status, headers=headers, media_type="application/json")


def http_error_response(method: str, path: str, error: HTTPException) -> Response:
    """The answer where routing itself failed: unknown path, wrong method."""
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.NOT_FOUND:
        refusal = RequestError(
            f"There is nothing at {path}; see GET /v1/models for what is served.", code="unknown_url"
        )
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers.get("Allow", "another method")
        refusal = RequestError(f"{path} does not answer {method}; use {allowed}.", code="method_not_allowed")
    else:
        refusal = RequestError(error.detail)
    refusal.status = error.status_code
    refusal.kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return error_response(refusal, headers)


def internal_error(request_id: str) -> RequestError:
    """What a client is told of a bug: nothing of our insides, but how to find them in the log."""
    return RequestError(
        f"The server failed in an unexpected way. Its log has the details under request id {request_id}.",
        code="internal_error",
    )
