"""Errors as clients see them: every exception becomes OpenAI's JSON shape with the right status and headers."""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from bascule.errors import NotFound, Overloaded, RequestError

MAX_MESSAGE = 1000
"""Characters of an error message; a client's own words in it may be long."""

MAX_RETRY_AFTER = 3600
"""Seconds; a prediction far out is no reason to keep a client away for longer."""


class SlowBody(RequestError):
    """408: the body did not arrive in time."""

    status = 408
    kind = "invalid_request_error"


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


class MethodNotAllowed(RequestError):
    """405: the path exists, the method does not."""

    status = 405
    kind = "invalid_request_error"


def error_body(error: RequestError) -> bytes:
    """`error` as the JSON object that OpenAI's clients read: `{"error": {message, type, param, code}}`."""
    message = error.message if len(error.message) <= MAX_MESSAGE else error.message[:MAX_MESSAGE] + " ..."
    fields = {"message": message, "type": error.kind, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """The HTTP answer for `error`; an `Overloaded` tells when to come back (whole seconds, at least one)."""
    headers = dict(headers or {})
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(math.ceil(min(max(1.0, error.retry_after), MAX_RETRY_AFTER)))
    return Response(error_body(error), status_code=error.status, headers=headers, media_type="application/json")


def let_go(error: BaseException) -> None:
    """Forget where an error came from that has been answered, or is not to be.

    Its traceback holds the frames, they hold the request, and that holds the error: a circle of a hundred objects,
    prompt and connection among them. Under overload the collector would find twenty thousand of them every few
    seconds, and everything waits up to 0.1 s meanwhile.
    """
    error.__traceback__ = error.__context__ = None


def unknown_path(path: str) -> Response:
    """The answer where nothing is served at `path`."""
    where = "GET /v1/models says what is served; /admin/ is on a port of its own, which the server's log names"
    return error_response(NotFound(f"There is nothing at {path} here; {where}.", code="unknown_url"))


def wrong_method(method: str, path: str, allowed: str) -> Response:
    """The answer where `path` is served, but only by the methods in `allowed`."""
    error = MethodNotAllowed(f"{path} does not answer {method}; use {allowed}.", code="method_not_allowed")
    return error_response(error, {"Allow": allowed})


def internal_error(request_id: str) -> RequestError:
    """What a client is told of a bug: nothing of our insides, but how to find them in the log."""
    return RequestError(
        f"The server failed in an unexpected way. Its log has the details under request id {request_id}.",
        code="internal_error",
    )
