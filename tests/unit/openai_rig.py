"""A fake OpenAI server in a thread of its own, and answers of servers that differ in how well they count."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fake_server import DONE, STREAM, Body, FakeServer, Part, event, response, tokens_after


def answer(
    body: Body, *, a_chunk: int = 1, ids: bool = True, usage: str = "running", logprobs: bool = True, count: int = 0
) -> list[Part]:
    """`max_tokens` (or `count`) tokens, `a_chunk` at a time; `usage` is `running`, `final` or empty.

    What a client did not ask for is not there.
    """
    prompt = body["prompt"] if isinstance(body["prompt"], list) else list(body["prompt"].encode())
    tokens = tokens_after(prompt, count or body["max_tokens"])
    parts: list[Part] = [STREAM]
    options = body.get("stream_options", {})
    for start in range(0, len(tokens), a_chunk):
        piece = tokens[start : start + a_chunk]
        drawn = start + len(piece)
        finish = None if drawn < len(tokens) else "stop" if count else "length"
        choice: Body = {"index": 0, "text": "".join(map(chr, piece)), "finish_reason": finish}
        if ids and body.get("return_token_ids"):
            choice["token_ids"] = piece
        if logprobs and body.get("logprobs"):
            choice["logprobs"] = {"tokens": list(map(chr, piece)), "token_logprobs": [-0.1] * len(piece)}
        fields: Body = {"choices": [choice]}
        if usage == "running" and options.get("continuous_usage_stats"):
            fields["usage"] = {"prompt_tokens": len(prompt), "completion_tokens": drawn}
        # A pause, so that chunks arrive one by one.
        parts += [event(fields), 0.002]
    if usage and options.get("include_usage"):
        counted = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        parts.append(event({"choices": [], "usage": counted}))
    return [*parts, DONE]


def refusal(status: str, message: str, *headers: str) -> list[Part]:
    return [response(status, b'{"error": {"message": "%s"}}' % message.encode(), *headers)]


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """The server in a thread, for clients that have the event loop of this one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield server
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
