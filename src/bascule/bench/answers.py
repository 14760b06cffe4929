"""A streamed completion as it comes in: when tokens came, how many, and how surely that is known."""

from __future__ import annotations

import math
from enum import StrEnum
from itertools import pairwise
from typing import Any

import httptools
import msgspec
from msgspec import Struct

from bascule.router.attached.exchange import Events

_MOST_TOLD = 300


class Counting(StrEnum):
    """What tokens were counted by, the surest first. All but the last are exact."""

    TOKEN_IDS = "token_ids"
    """Every chunk names its token ids (`return_token_ids`)."""
    RUNNING_USAGE = "running_usage"
    """Every chunk counts the tokens so far (`continuous_usage_stats`)."""
    LOGPROBS = "logprobs"
    """Every chunk has a log probability for each token."""
    FINAL_USAGE = "final_usage"
    """Only the last chunk counts: how many there were is known, how many came when is not."""
    CHUNKS = "chunks"
    """One for each chunk with text: a guess."""


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Logprobs(Struct):
    tokens: list[Any] | None = None


class _Choice(Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class BadAnswer(Exception):
    """An answer that is no stream of a completion, or is cut off."""


class Answer:
    """One response. `take` what was read and when; an arrival with several tokens is one arrival."""

    def __init__(self) -> None:
        self.status = 0
        self.request = ""
        """Its X-Request-Id."""
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.arrivals: list[float] = []
        self.finish = ""
        self.retry_after = math.nan
        self.prompt_tokens = 0
        self.cached = 0
        self.complete = False
        """The response has ended as HTTP has it."""
        self._parser = httptools.HttpResponseParser(self)
        self._events = Events()
        self._body: list[bytes] = []
        self._refusal = b""
        self._done = False
        self._usage = 0
        self._by: dict[Counting, int] = {}

    def take(self, data: bytes, now: float) -> None:
        """Raises BadAnswer, httptools.HttpParserError, msgspec.DecodeError."""
        before = self._came
        try:
            self._parser.feed_data(data)
        finally:
            # Not in `on_body`: the parser hides what is raised there.
            body, self._body = b"".join(self._body), []
            self._take_body(body)
        if self._came > before:
            self.arrivals.append(now)

    def check(self) -> None:
        """Raises BadAnswer unless all of it has come."""
        if self.status != 200:
            raise BadAnswer(f"status {self.status}: {_message(self._refusal)}")
        if not self._done:
            raise BadAnswer("the stream ended without [DONE]")
        if self.tokens and self._usage and len(self.tokens) != self._usage:
            raise BadAnswer(f"{len(self.tokens)} token ids came, and the usage counts {self._usage} tokens")
        if not self.arrivals:
            raise BadAnswer("no tokens came")

    @property
    def counted_by(self) -> Counting:
        exact = next((way for way in Counting if way in self._by), Counting.CHUNKS)
        if self._usage and (exact is Counting.CHUNKS or self._by[exact] != self._usage):
            return Counting.FINAL_USAGE
        return exact

    @property
    def count(self) -> int:
        """Output tokens."""
        way = self.counted_by
        return self._usage if way is Counting.FINAL_USAGE else self._by.get(way, 0)

    @property
    def gaps(self) -> tuple[float, ...]:
        return tuple(later - earlier for earlier, later in pairwise(self.arrivals))

    @property
    def _came(self) -> int:
        """Tokens so far, or signs of them."""
        return max(self._by.values(), default=0)

    # What httptools calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self.request = value.decode("latin-1")
        elif name.lower() == b"retry-after" and value.isdigit():
            self.retry_after = float(value)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.complete = True

    def _take_body(self, body: bytes) -> None:
        if self.status != 200:
            self._refusal += body[: max(0, 4096 - len(self._refusal))]
            return
        for event in self._events.feed(body):
            if event == b"[DONE]":
                self._done = True
            else:
                self._take_chunk(_decode(event))

    def _take_chunk(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            raise BadAnswer(f"the stream ended with an error: {_words(chunk.error)}")
        running = None
        if usage := chunk.usage:
            self.prompt_tokens = usage.prompt_tokens or self.prompt_tokens
            details = usage.prompt_tokens_details
            self.cached = (details.cached_tokens if details else None) or self.cached
            running = usage.completion_tokens
            self._usage = running or self._usage
        for choice in chunk.choices:
            if choice.text:
                self.texts.append(choice.text)
                self._add(Counting.CHUNKS, 1)
            if choice.token_ids:
                self.tokens += choice.token_ids
                self._add(Counting.TOKEN_IDS, len(choice.token_ids))
            if choice.logprobs is not None and choice.logprobs.tokens:
                self._add(Counting.LOGPROBS, len(choice.logprobs.tokens))
            if running is not None:
                self._by[Counting.RUNNING_USAGE] = running
            self.finish = choice.finish_reason or self.finish

    def _add(self, way: Counting, count: int) -> None:
        self._by[way] = self._by.get(way, 0) + count


def _message(body: bytes) -> str:
    """OpenAI's message in an error's body, or the beginning of what came instead."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _words(body.decode(errors="replace")) or "(nothing)"
    return _words(fields.get("error", fields) if isinstance(fields, dict) else fields)


def _words(error: object) -> str:
    if isinstance(error, dict):
        error = error.get("message", error)
    line = " ".join(str(error).split())
    return line if len(line) <= _MOST_TOLD else f"{line[:_MOST_TOLD]} ..."
