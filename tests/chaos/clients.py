"""Clients of all manners, and what became of each request: its exact tokens, an explicit error, or a violation."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httptools

from bascule.types import SamplingParams
from chaos.truth import true_tokens

PATIENCE_S = 30.0
"""The limit of a request that is in no hurry."""
GRACE_S = 5.0
"""Behind its limit a request may still take this long to have ended; then it hangs."""
AFTERMATH_S = 0.5
"""How long a fault may take to be felt."""
CONTEXT, VOCAB = 8192, 49152
"""Of smollm2, whose tokenizer the router uses."""

_MANNERS = {"plain": 84, "vanishes": 4, "reads slowly": 4, "half a body": 4, "hurried": 4}
_PREFIXES = 12


@dataclass
class Asked:
    """One request, made of the run's seed and its number alone."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    stream: bool
    manner: str
    limit_s: float
    leaves_after_s: float
    """Of those that vanish."""
    half: float
    """Share of the body that is sent by those that send no more."""


def asked(seed: int, number: int) -> Asked:
    draw = Random(f"request {seed} {number}")
    shared = Random(f"prefix {seed} {draw.randrange(_PREFIXES)}")
    prefix = [shared.randrange(VOCAB) for _ in range(shared.choice((0, 16, 40, 64, 150, 300, 500)))]
    prompt = [*prefix, *(draw.randrange(VOCAB) for _ in range(draw.randint(1, 80)))]
    [manner] = draw.choices(list(_MANNERS), list(_MANNERS.values()))
    greedy, long = draw.random() < 0.6, draw.random() < 0.5
    return Asked(
        id=f"chaos-{seed}-{number}",
        prompt=prompt,
        sampling=SamplingParams(
            max_tokens=draw.randint(40, 160) if long else draw.randint(1, 40),
            temperature=0.0 if greedy else draw.choice((0.7, 1.0, 1.3)),
            seed=draw.getrandbits(63),
        ),
        stream=draw.random() < 0.75,
        manner=manner,
        limit_s=draw.uniform(0.02, 1.0) if manner == "hurried" else PATIENCE_S,
        leaves_after_s=draw.uniform(0.0, 1.0),
        half=draw.random(),
    )


@dataclass
class Mark:
    """A fault that may touch a stream."""

    at: float
    tell: Callable[[float], None]
    """Takes the longest wait for tokens that began before the fault's aftermath was over. The tokens that come first
    may have been sent before the fault."""
    longest: float = 0.0

    def over(self, now: float) -> bool:
        if ended := now > self.at + AFTERMATH_S:
            self.tell(self.longest)
        return ended


@dataclass(eq=False)
class Ended:
    """What came back of a request."""

    asked: Asked
    started: float
    verdict: str = ""
    """exact, error, left (its client went away), or: wrong, cut, hung."""
    seconds: float = 0.0
    status: int = 0
    route: str = ""
    error: str = ""
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    last_at: float = 0.0
    """When tokens came last."""
    marks: list[Mark] = field(default_factory=list)

    def came(self, tokens: list[int]) -> None:
        self.tokens += tokens
        now = time.monotonic()
        for mark in self.marks:
            mark.longest = max(mark.longest, now - max(self.last_at, mark.at))
        self.last_at = now
        self.marks = [mark for mark in self.marks if not mark.over(now)]

    def explain(self) -> dict[str, Any]:
        """All that is needed to look into it."""
        asked = self.asked
        true = true_tokens(CONTEXT, VOCAB, asked.prompt, asked.sampling)
        differs = next((at for at, pair in enumerate(zip(self.tokens, true, strict=False)) if pair[0] != pair[1]), None)
        said = {"id": asked.id, "verdict": self.verdict, "status": self.status, "error": self.error}
        said |= {"route": self.route, "began": round(self.started, 3), "seconds": round(self.seconds, 3)}
        said |= {"manner": asked.manner, "stream": asked.stream, "temperature": asked.sampling.temperature}
        said |= {"prompt_tokens": len(asked.prompt), "max_tokens": asked.sampling.max_tokens}
        return said | {"got": len(self.tokens), "differs_at": differs}


class _Answer:
    """Parses one response; events of a stream are read as they come."""

    def __init__(self, ended: Ended) -> None:
        self._ended = ended
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self.over = False

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-bascule-route":
            self._ended.route = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body
        if self._ended.asked.stream and self._parser.get_status_code() == 200:
            *events, self._body = self._body.split(b"\n\n")
            for event in events:
                self._event(event.removeprefix(b"data: "))

    def on_message_complete(self) -> None:
        self.over = True
        self._ended.status = self._parser.get_status_code()
        if self._body:
            self._whole(json.loads(self._body))

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._ended.complete = True
        else:
            self._whole(json.loads(data))

    def _whole(self, content: dict[str, Any]) -> None:
        if "error" in content:
            self._ended.error = content["error"]["message"] or "an error without a message"
            return
        for choice in content["choices"]:
            self._ended.came(choice["token_ids"])
        if not self._ended.asked.stream:
            self._ended.complete = True


class Clients:
    """A closed loop: each client sends its next request when its last has ended. Numbers say which."""

    def __init__(self, seed: int, host: str, port: int, model: str) -> None:
        self.under_way: set[Ended] = set()
        self.ended: list[Ended] = []
        self.stopping = False
        self._seed, self._host, self._port, self._model = seed, host, port, model
        self._next = 0

    async def run(self, count: int) -> None:
        await asyncio.gather(*(self._client() for _ in range(count)))

    async def arrive(self, rate: float) -> None:
        """An open loop: each client sends one request and comes when it likes, `rate` a second (Poisson)."""
        draw, due = Random(f"arrivals {self._seed}"), time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not self.stopping:
                due += draw.expovariate(rate)
                await asyncio.sleep(due - time.monotonic())
                group.create_task(self._next_one())

    async def capacity(self, count: int, seconds: float) -> float:
        """Answers per second to so many clients in a closed loop, without the first and last moments."""
        loop = asyncio.create_task(self.run(count))
        await asyncio.sleep(seconds / 4)
        before = len(self.ended)
        await asyncio.sleep(seconds)
        answered = len(self.ended) - before
        self.stopping = True
        await loop
        self.stopping = False
        return answered / seconds

    async def _client(self) -> None:
        while not self.stopping:
            await self._next_one()

    async def _next_one(self) -> None:
        self._next += 1
        await self.ask(asked(self._seed, self._next))

    async def ask(self, asked: Asked) -> Ended:
        ended = Ended(asked, time.monotonic())
        self.under_way.add(ended)
        patience = asked.limit_s + GRACE_S
        try:
            async with asyncio.timeout(patience):
                await self._converse(ended)
        except TimeoutError:
            ended.verdict = "hung"
        except (OSError, EOFError, httptools.HttpParserError, ValueError, KeyError) as error:
            ended.verdict, ended.error = "cut", f"{type(error).__name__}: {error}"
        ended.seconds = time.monotonic() - ended.started
        if ended.tokens:
            for mark in ended.marks:
                mark.tell(mark.longest)
        _judge(ended)
        if ended.verdict in ("exact", "left"):  # nobody looks into it any more, and there are many
            ended.asked.prompt, ended.tokens = [], []
        self.under_way.discard(ended)
        self.ended.append(ended)
        return ended

    async def _converse(self, ended: Ended) -> None:
        asked = ended.asked
        head, body = self._request(asked)
        connection = socket.socket()
        connection.setblocking(False)
        if asked.manner == "reads slowly":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(connection, (self._host, self._port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
        try:
            if asked.manner == "half a body":
                writer.write(head + body[: int(asked.half * len(body))])
                await asyncio.sleep(asked.leaves_after_s)
                return
            writer.write(head + body)
            if asked.manner == "vanishes":
                try:
                    async with asyncio.timeout(asked.leaves_after_s):
                        await self._read(reader, ended)
                except TimeoutError:
                    return
            else:
                await self._read(reader, ended)
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, ended: Ended) -> None:
        answer, slow = _Answer(ended), ended.asked.manner == "reads slowly"
        while not answer.over:
            data = await reader.read(512 if slow else 1 << 16)
            if not data:
                raise EOFError("the server closed the connection in the middle of its answer")
            answer.feed(data)
            if slow:
                await asyncio.sleep(0.01)

    def _request(self, asked: Asked) -> tuple[bytes, bytes]:
        body = {"model": self._model, "prompt": asked.prompt, "stream": asked.stream, "return_token_ids": True}
        body |= {"max_tokens": asked.sampling.max_tokens, "temperature": asked.sampling.temperature}
        body |= {"seed": asked.sampling.seed, "ignore_eos": True}
        content = json.dumps(body).encode()
        head = [
            *("POST /v1/completions HTTP/1.1", f"Host: {self._host}:{self._port}", "Content-Type: application/json"),
            *(
                f"X-Request-Id: {asked.id}",
                f"X-Request-Timeout: {asked.limit_s:.3f}",
                f"Content-Length: {len(content)}",
            ),
        ]
        return "\r\n".join([*head, "Connection: close", "", ""]).encode(), content


def _judge(ended: Ended) -> None:
    """What it came to; wrong tokens are the worst of all, however it ended."""
    asked = ended.asked
    true = true_tokens(CONTEXT, VOCAB, asked.prompt, asked.sampling)
    if ended.tokens != true[: len(ended.tokens)]:
        ended.verdict = "wrong"
    elif ended.verdict:
        return
    elif ended.error:
        ended.verdict = "error"
    elif ended.complete:
        ended.verdict = "exact" if ended.tokens == true else "wrong"
    elif asked.manner in ("vanishes", "half a body"):
        ended.verdict = "left"
    else:
        ended.verdict, ended.error = "cut", "the answer ended without [DONE] and without an error"
