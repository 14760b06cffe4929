"""A client that costs little: ordinary sockets, requests made up beforehand, answers scanned and not parsed."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import cast

from bascule.errors import BasculeError

PROMPT = "Explain in a few words why a bridge that opens needs a counterweight."
"""A short prompt, followed by a number, so that no two are alike."""

_DONE = b"data: [DONE]\n\n"
_CHUNK = b'data: {"id"'
_FIRST = b'"choices":[{'
_WAIT_S = 30.0


class BadAnswer(BasculeError):
    """The server did not answer as asked for."""


@dataclass(frozen=True)
class Target:
    """Where requests go, and what they ask for."""

    host: str
    port: int
    model: str

    def request(self, number: int, max_tokens: int) -> bytes:
        """One streamed completion, with its usage at the end."""
        body = json.dumps(
            {
                "model": self.model,
                "prompt": f"{PROMPT} ({number})",
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


@dataclass
class Counts:
    """What came back. Tokens are those that the usage of complete answers tells."""

    requests: int = 0
    tokens: int = 0
    chunks: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of the client itself."""


def first_token_seconds(target: Target, requests: int, max_tokens: int) -> list[float]:
    """From sending a request to its first token, one request after the other on one connection; raises BadAnswer."""
    seconds = []
    with socket.create_connection((target.host, target.port), timeout=_WAIT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(requests):
            request = target.request(number, max_tokens)
            answer, first = b"", None
            sent = time.perf_counter()
            connection.sendall(request)
            while _DONE not in answer:
                piece = connection.recv(1 << 16)
                now = time.perf_counter()
                answer += piece
                if not piece or not answer.startswith(b"HTTP/1.1 200"):
                    raise BadAnswer(f"the server answered {answer[:400]!r}")
                if first is None and _FIRST in answer:
                    first = now - sent
                    seconds.append(first)
            # The end of the chunked body may come on its own.
            while not answer.endswith(b"0\r\n\r\n"):
                answer += connection.recv(1 << 16)
            _check(answer, max_tokens)
    return seconds


async def stream_many(target: Target, concurrency: int, max_tokens: int, seconds: float) -> Counts:
    """Keep `concurrency` streams going for about that long, each connection beginning anew when its stream ends."""
    loop = asyncio.get_running_loop()
    counts = Counts()
    end = time.perf_counter() + seconds
    cpu, started = _cpu_seconds(), time.perf_counter()
    streams = [_Stream(target, index, max_tokens, end, counts) for index in range(concurrency)]
    for stream in streams:
        await loop.create_connection(partial(_itself, stream), target.host, target.port)
    async with asyncio.timeout(seconds + _WAIT_S):
        await asyncio.gather(*(stream.over for stream in streams))
    counts.wall_s = time.perf_counter() - started
    counts.cpu_s = _cpu_seconds() - cpu
    return counts


class _Stream(asyncio.Protocol):
    """One connection: the next request as soon as an answer is complete, until the time is up."""

    def __init__(self, target: Target, index: int, max_tokens: int, end: float, counts: Counts) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._target = target
        self._number = index << 20
        self._max_tokens = max_tokens
        self._end = end
        self._counts = counts
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self._next()

    def data_received(self, data: bytes) -> None:
        self._counts.chunks += data.count(_CHUNK)
        tail = self._tail + data
        if tail.endswith(b"0\r\n\r\n"):
            try:
                _check(tail, self._max_tokens)
            except BadAnswer as error:
                self.over.set_exception(error)
                self._transport.abort()
                return
            self._counts.chunks -= 1  # the usage
            self._counts.requests += 1
            self._counts.tokens += self._max_tokens
            self._tail = b""
            self._next()
        else:
            # What tells whether an answer is complete stands at its end.
            self._tail = tail[-2048:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(BadAnswer(f"the server closed a stream: {error}; its last words {self._tail!r}"))

    def _next(self) -> None:
        if time.perf_counter() >= self._end:
            self.over.set_result(None)
            self._transport.close()
            return
        self._number += 1
        self._transport.write(self._target.request(self._number, self._max_tokens))


def _itself(stream: _Stream) -> _Stream:
    return stream


def _check(answer: bytes, max_tokens: int) -> None:
    """An answer's end must say that it is complete and has as many tokens as were asked for."""
    if _DONE not in answer or b'"completion_tokens":%d,' % max_tokens not in answer:
        raise BadAnswer(f"an answer of {max_tokens} tokens ended with {answer[-2048:]!r}")


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
