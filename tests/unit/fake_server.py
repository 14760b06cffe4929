"""An OpenAI-compatible server of a page, whose every answer a test may spoil; its tokens are bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

VOCAB = 300
END = 256
CONTEXT = 400

Body = dict[str, Any]
Part = bytes | float | None
"""Bytes to send, seconds to wait, or None: wait until the client is gone."""


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: Iterable[int]) -> str:
    return bytes(token for token in ids if token < END).decode(errors="replace")


def next_token(tokens: list[int]) -> int:
    """A letter that follows from everything before it, so that an output that goes on elsewhere is the same."""
    return 97 + (7 * len(tokens) + sum(tokens)) % 26


def tokens_after(prompt: Iterable[int], count: int) -> list[int]:
    tokens = list(prompt)
    start = len(tokens)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[start:]


def response(status: str, body: bytes, *headers: str, kind: str = "application/json") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(tokens: list[int], drawn: int, prompt: int, finish: str | None = None, **choice: object) -> Body:
    """One chunk; `drawn` counts the output with these tokens."""
    usage = {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
    fields = {"index": 0, "text": decode(tokens), "token_ids": tokens, "finish_reason": finish, "logprobs": None}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [fields | choice], "usage": usage}


def chunks_of(body: Body) -> list[Body]:
    """What a server without faults streams, a token a chunk."""
    prompt = encode(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
    tokens = tokens_after(prompt, body["max_tokens"])
    chunks = []
    for index, token in enumerate(tokens):
        end = token in body["stop_token_ids"] and index >= body["min_tokens"]
        finish = "stop" if end else "length" if index + 1 == len(tokens) else None
        chunks.append(chunk([token], index + 1, len(prompt), finish))
        if end:
            break
    return chunks


def streamed(chunks: Iterable[Body]) -> list[Part]:
    return [STREAM, *(event(one) for one in chunks), DONE]


class FakeServer:
    """Answers as `answer`, `models` and `health` say; knows what it was asked, and how many streams the client left."""

    def __init__(self) -> None:
        self.reset()
        self.bodies: list[Body] = []
        self.heads: list[str] = []
        """Request line and headers of each completion."""
        self.left = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    def reset(self) -> None:
        self.answer: Callable[[Body], Iterable[Part]] = lambda body: streamed(chunks_of(body))
        self.models: bytes = response(
            "200 OK", json.dumps({"object": "list", "data": [{"id": "theirs", "max_model_len": CONTEXT}]}).encode()
        )
        self.health: bytes = response("200 OK", b"")
        self.knows_salts = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; after a stop at the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As a process that is killed: every connection breaks."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1]
                if path == "/health":
                    writer.write(self.health)
                elif path == "/v1/models":
                    writer.write(self.models)
                else:
                    self.heads.append(head)
                    length = int(head.lower().split("content-length:")[1].split()[0])
                    await self._complete(json.loads(await reader.readexactly(length)), reader, writer)
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _complete(self, body: Body, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if body.get("cache_salt") == "":
            writer.write(response("400 Bad Request" if self.knows_salts else "200 OK", b"{}"))
            await writer.drain()
            return
        self.bodies.append(body)
        for part in self.answer(body):
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            elif part is not None:
                await asyncio.sleep(part)
            else:
                await reader.read()
                self.left += 1
