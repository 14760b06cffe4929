"""The parts of `bench front`: a source whose streams are whole, and a client that notices when they are not."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bascule.bench.front import FrontSettings
from bascule.bench.front_client import BadAnswer, Target, first_token_seconds, stream_many
from bascule.bench.token_source import TokenSource
from bascule.errors import ConfigError
from bascule.types import FinishReason, RequestId, SamplingParams
from bascule.wire import Cancel, Submit


def submission(name: str, max_tokens: int, generated: tuple[int, ...] = ()) -> Submit:
    return Submit(
        request=RequestId(name),
        attempt=0,
        prompt=(1,),
        generated=generated,
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def test_a_step_has_a_token_for_each_stream_until_its_last() -> None:
    source = TokenSource([7, 8, 9])
    source.submit(submission("a", 4))
    source.submit(submission("b", 2))
    steps = [source.step() for _ in range(4)]
    assert [[(item.request, item.position, item.token) for item in step] for step in steps] == [
        [("a", 0, 7), ("b", 0, 7)],
        [("a", 1, 8), ("b", 1, 8)],
        [("a", 2, 9)],
        [("a", 3, 7)],
    ]
    assert [item.finish for step in steps for item in step].count(FinishReason.LENGTH) == 2
    assert source.idle


def test_a_source_goes_on_behind_what_is_known_and_forgets_what_is_cancelled() -> None:
    source = TokenSource([7, 8, 9])
    source.submit(submission("a", 9, generated=(7, 8)))
    assert [item.position for item in source.step()] == [2]
    source.cancel(Cancel(RequestId("a"), 0))
    assert source.idle


def answer(tokens: int, *, done: bool = True) -> bytes:
    chunk = b'data: {"id":"x","choices":[{"text":"a"}],"usage":null}\n\n' * tokens
    usage = b'data: {"id":"x","choices":[],"usage":{"completion_tokens":%d,"total_tokens":9}}\n\n' % tokens
    body = chunk + usage + (b"data: [DONE]\n\n" if done else b"")
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


@contextmanager
def server(reply: bytes) -> Iterator[Target]:
    """Gives the same reply to every request of one connection."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1 << 16):
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield Target("127.0.0.1", listener.getsockname()[1], "tiny")
        thread.join(20)


def test_the_client_counts_what_comes() -> None:
    for seconds in (0.1, 2.0, 10.0):  # which may be over before there is a connection
        with server(answer(3)) as target:
            counts = asyncio.run(stream_many(target, 1, 3, seconds))
        if counts.requests:
            break
    assert counts.requests > 0
    assert counts.tokens == counts.chunks == 3 * counts.requests


def test_the_client_times_the_first_token_of_each_request() -> None:
    with server(answer(2)) as target:
        assert all(0 < seconds < 20 for seconds in first_token_seconds(target, 5, 2))


@pytest.mark.parametrize(
    "reply",
    [answer(2), answer(3, done=False), b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"],
    ids=["a token short", "not done", "an error"],
)
def test_the_client_refuses_an_answer_that_is_not_whole(reply: bytes) -> None:
    with server(reply) as target, pytest.raises(BadAnswer):
        asyncio.run(stream_many(target, 1, 3, 20.0))  # the first answer ends it


def settings(**fields: Any) -> FrontSettings:
    core = min(os.sched_getaffinity(0))
    defaults: dict[str, Any] = dict.fromkeys(
        ("runs", "latency_requests", "concurrency", "stream_tokens", "request_tokens"), 1
    )
    places = {"server_core": core, "client_core": core}
    return FrontSettings(**({"model": "tiny", "seconds": 1.0, "step_s": 0.0} | defaults | places | fields))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("runs", 0, "--runs"), ("seconds", -1.0, "--seconds"), ("step_s", -1.0, "--step"), ("server_core", 9999, "9999")],
)
def test_settings_that_cannot_work_are_refused_by_name(field: str, value: object, named: str) -> None:
    settings()
    with pytest.raises(ConfigError, match=named):
        settings(**{field: value})
