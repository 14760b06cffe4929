"""One completion over HTTP: what is sent to an attached server, and its answer event by event."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Any

import httpx
import msgspec
from msgspec import UNSET, Struct, UnsetType

from bascule.config import MOST_TIMEOUT_S
from bascule.errors import UNREADABLE, short
from bascule.types import Salt, SamplingParams

MAX_EVENT = 16 << 20
"""Bytes of one event; the first may repeat a long prompt's token ids."""

MAX_ANSWER = 1 << 20
"""Bytes of an answer that is no completion: a list of models, a health check's page."""

REST_S = 1.0
MAX_REST_S = 30.0
"""Seconds that a server which answers 429 or 5xx is left alone: by default, and at most."""

_MAX_ERROR = 64 << 10
_ERROR_S = 5.0
_LAST_WORDS_S = 1.0
_LEAST_TIMEOUT_S = 0.001
_PLAIN = {"Accept-Encoding": "identity"}
_JSON = {"Content-Type": "application/json", "Accept": "text/event-stream", **_PLAIN}


class Trouble(Exception):
    """An attached server did not do what was asked; the message says what it did instead."""

    def __init__(
        self, message: str, *, retryable: bool = True, doubt: bool = False, rest_s: float = 0.0, unfit: str = ""
    ) -> None:
        """`doubt`: the server has to prove again that it can be used. `rest_s`: for how long to leave it alone (s).
        `unfit`: the request's parameter that it does not know, where nothing else is the matter."""
        super().__init__(message)
        self.message = message
        self.retryable = retryable
        self.doubt = doubt
        self.rest_s = rest_s
        self.unfit = unfit


def trouble_of(error: Exception) -> Trouble:
    """What asking a server raised, which may be anything: a header of its answer can make the HTTP client fail."""
    if isinstance(error, Trouble):
        return error
    why = short(str(error)) or type(error).__name__
    if isinstance(error, (httpx.HTTPError, httpx.StreamError)):
        return Trouble(f"gave no connection or broke it: {why}", doubt=True, rest_s=REST_S)
    return Trouble(f"answered what cannot be read ({type(error).__name__}: {why})", doubt=True, rest_s=REST_S)


class Details(Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: Details | None = None


class Logprobs(Struct, frozen=True):
    """OpenAI's older form; tokens are named `token_id:N` where `return_tokens_as_token_ids` is understood."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(Struct, frozen=True):
    index: int = 0
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Chunk(Struct, frozen=True):
    """One event of a streamed completion, or of what is sent instead of one."""

    choices: list[Choice] | UnsetType = UNSET
    usage: Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(Chunk)


def completion_body(
    model: str,
    prompt: list[int] | str,
    sampling: SamplingParams,
    drawn: int,
    end_tokens: frozenset[int],
    salt: Salt = b"",
) -> bytes:
    """A streamed completion that goes on after `drawn` output tokens, which are part of `prompt`.

    Every parameter is spelt out: servers have defaults of their own, from the model's generation config for example.
    So are the model's end tokens, for the same reason.
    """
    body: dict[str, object] = {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
        "n": 1,
        "max_tokens": sampling.max_tokens - drawn,
        "min_tokens": max(0, sampling.min_tokens - drawn),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": _signed(sampling.seed),
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": sorted(end_tokens),
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if salt:
        body["cache_salt"] = salt.hex()
    return msgspec.json.encode(body)


def _signed(seed: int) -> int:
    """64 bits as a signed number, as PyTorch takes them; -1 is left out, for it means no seed to some servers."""
    signed = seed if seed < 1 << 63 else seed - (1 << 64)
    return signed if signed != -1 else (1 << 63) - 1


async def converse(
    http: httpx.AsyncClient,
    body: bytes,
    name: str,
    on_chunk: Callable[[Chunk], bool],
    timeout_s: float = math.inf,
) -> None:
    """Send a completion and hand each chunk to `on_chunk`, until that returns True or the stream ends.

    `name` is what the server may call the request in its log. In `timeout_s` it need not go on: Bascule does not;
    others, who do not know the header, learn of it when the connection is closed. Cancelling does that. Raises Trouble
    (what `on_chunk` raises included) and httpx.HTTPError.
    """
    headers = {**_JSON, "X-Request-Id": name}
    if timeout_s < math.inf:
        headers["X-Request-Timeout"] = f"{min(max(timeout_s, _LEAST_TIMEOUT_S), MOST_TIMEOUT_S):.3f}"
    async with http.stream("POST", "/v1/completions", content=body, headers=headers) as response:
        if response.status_code != HTTPStatus.OK:
            raise await refusal(response)
        _refuse_encoded(response)
        kind = response.headers.get("content-type", "nothing")
        if not kind.startswith("text/event-stream"):
            raise Trouble(f"answered with {short(kind)} instead of an event stream", doubt=True)
        events = Events()
        async for raw in response.aiter_raw():
            for event in events.feed(raw):
                if event == b"[DONE]" or on_chunk(_decoded(event)):
                    await _last_words(response)
                    return


async def whole(response: httpx.Response) -> bytes:
    """The body of an answer to a GET; raises Trouble for one of more than `MAX_ANSWER` bytes, or a compressed one."""
    _refuse_encoded(response)
    body = bytearray()
    async for raw in response.aiter_raw():
        body += raw
        if len(body) > MAX_ANSWER:
            raise Trouble(f"answered {response.url.path} with more than {MAX_ANSWER} bytes", doubt=True)
    return bytes(body)


def get(http: httpx.AsyncClient, path: str) -> AbstractAsyncContextManager[httpx.Response]:
    """Ask for what `whole` reads."""
    return http.stream("GET", path, headers=_PLAIN)


def _refuse_encoded(response: httpx.Response) -> None:
    encoding = response.headers.get("content-encoding", "") or "identity"
    if encoding.lower() != "identity":
        raise Trouble(
            f"answered {response.url.path} encoded ({short(encoding)}), which it was asked not to do; turn off"
            " compression there and in proxies before it",
            doubt=True,
        )


async def _last_words(response: httpx.Response) -> None:
    """Read to the end, which is here or very near, so that the connection can be used again."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError, httpx.StreamError):
        async with asyncio.timeout(_LAST_WORDS_S):
            async for _ in response.aiter_raw():
                pass


class Events:
    """Takes a stream of server-sent events apart: the data lines, one event each, as all these servers write them."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, raw: bytes) -> list[bytes]:
        """The events that these next bytes complete; raises Trouble for one that is too long."""
        self._rest += raw
        if len(self._rest) > MAX_EVENT:
            raise Trouble(f"sent an event of more than {MAX_EVENT} bytes", doubt=True)
        if b"\n" not in raw:
            return []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def _decoded(event: bytes) -> Chunk:
    try:
        chunk: Chunk = _chunk.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Trouble(f"sent an event that is no chunk of a completion ({error}): {short(event)}", doubt=True) from None
    if chunk.error is not None:
        raise Trouble(f"ended the stream with an error: {short(_message(chunk.error))}")
    if chunk.choices is UNSET:
        raise Trouble(f"sent an event without choices: {short(event)}", doubt=True)
    return chunk


async def refusal(response: httpx.Response) -> Trouble:
    """What a status other than 200 means for the request and for the server."""
    status = response.status_code
    said = f"answered {status}: {short(await _error_text(response))}"
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return Trouble(said, rest_s=_retry_after(response.headers.get("retry-after", "")))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Trouble(said, rest_s=REST_S)
    if status < HTTPStatus.BAD_REQUEST:
        return Trouble(f"answered {status}, which is no answer; give the URL that it leads to", doubt=True)
    mistaken = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND)
    return Trouble(said, retryable=False, doubt=status in mistaken)


async def _error_text(response: httpx.Response) -> str:
    """OpenAI's error message, or the beginning of whatever came instead."""
    body = b""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(_ERROR_S):
            async for raw in response.aiter_raw():
                body += raw
                if len(body) > _MAX_ERROR:
                    break
    try:
        fields = msgspec.json.decode(body)
    except UNREADABLE:
        return short(body) or "(nothing)"
    return _message(fields.get("error", fields)) if isinstance(fields, dict) else short(body)


def _message(error: object) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return str(error)


def _retry_after(value: str) -> float:
    """Seconds; a date, which is allowed too, counts as not given."""
    return min(max(float(value), REST_S), MAX_REST_S) if value.isascii() and value.isdigit() else REST_S
