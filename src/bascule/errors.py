"""Every error a user can meet, each saying what is wrong and what to do."""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoders of JSON and MessagePack raise for bytes that are not what was expected."""


def short(text: bytes | str) -> str:
    """A stranger's words in a message of ours: one line, not too long."""
    words = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in words[:1000]).split())
    return line if len(line) <= 300 else line[:300] + " ..."


class BasculeError(Exception):
    """Base of all errors with a message for a person."""


class ConfigError(BasculeError):
    """A flag, file or machine that cannot work as asked; found at start."""


class ModelError(BasculeError):
    """A model that cannot be found, read or run."""


class RegistrationRefused(BasculeError):
    """The router does not take this worker; the message names both sides."""


class RequestError(BasculeError):
    """A request that ends with an HTTP error of OpenAI's shape.

    `status` is the HTTP status, `kind` OpenAI's `type`, `param` the field at fault, `code` OpenAI's `code`.
    """

    status = 500
    kind = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """400: the request is malformed or out of range."""

    status = 400
    kind = "invalid_request_error"


class NotFound(RequestError):
    """404: unknown model, worker or path."""

    status = 404
    kind = "invalid_request_error"


class Conflict(RequestError):
    """409: what is asked does not go with what is there."""

    status = 409
    kind = "invalid_request_error"


class TooLarge(RequestError):
    """413: the body is over the limit."""

    status = 413
    kind = "invalid_request_error"


class Overloaded(RequestError):
    """429: the queue is full; `retry_after` in seconds."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float, code: str | None = "overloaded") -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Unavailable(RequestError):
    """503: no worker can take the request now."""

    status = 503
    kind = "server_error"


class DeadlineExceeded(RequestError):
    """504: the request's deadline passed."""

    status = 504
    kind = "server_error"


class WorkerFailure(RequestError):
    """500: a worker failed the request and no other could take over."""

    status = 500
    kind = "server_error"
