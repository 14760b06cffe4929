"""Listening and stopping: ports, connections, the soft stop and the hard one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from api_rig import HOLD, WAIT, ApiRig, Pause, says

from bascule.api import connection
from bascule.api.calls import Calls
from bascule.api.server import HttpServer
from bascule.errors import ConfigError
from bascule.types import FinishReason


@pytest.fixture
def rig() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig
    rig.assert_nothing_runs()


class Client(threading.Thread):
    """A completion asked for in a thread of its own."""

    def __init__(self, rig: ApiRig, **fields: object) -> None:
        super().__init__()
        self._rig = rig
        self._fields = fields
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        body = {"model": "tiny", "prompt": "abc", **self._fields}
        with httpx.Client(timeout=WAIT) as client:
            self.response = client.post(f"{self._rig.server.url}/v1/completions", json=body)

    def answer(self) -> httpx.Response:
        self.join(WAIT)
        assert self.response is not None
        return self.response


def accepts(rig: ApiRig) -> bool:
    try:
        socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT).close()
    except ConnectionRefusedError:
        return False
    return True


def test_port_zero_is_a_free_port_and_the_url_names_it(rig: ApiRig) -> None:
    assert rig.server.port > 0
    assert rig.server.url == f"http://127.0.0.1:{rig.server.port}"
    assert httpx.get(f"{rig.server.url}/health").status_code == 200


def test_a_port_in_use_is_named_with_what_to_do(rig: ApiRig) -> None:
    with pytest.raises(ConfigError, match=rf"port {rig.server.port} .* in use.*--port"):
        rig.call(HttpServer.start(lambda *_: None, Calls(), "127.0.0.1", rig.server.port))


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host"])
def test_an_address_of_another_machine_is_refused(rig: ApiRig, host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        rig.call(HttpServer.start(lambda *_: None, Calls(), host, 0))


def test_small_writes_leave_at_once(rig: ApiRig) -> None:
    """Nagle's algorithm is off on every connection, or a stream's chunks wait for acknowledgements."""
    with socket.create_connection(("127.0.0.1", rig.server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16)
        (served,) = rig.server._server.server_state.connections
        assert served.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_soft_stop_lets_calls_finish(rig: ApiRig) -> None:
    pause = Pause()
    head, *rest = says("late", finish=FinishReason.LENGTH)
    rig.backend.script = lambda request: [head, pause, *rest]
    client = Client(rig)
    assert rig.backend.started.wait(WAIT)
    stopping = asyncio.run_coroutine_threadsafe(rig.server.stop(grace=WAIT), rig.loop)
    rig.wait_for(lambda: not accepts(rig))
    pause.over.set()
    assert client.answer().json()["choices"][0]["text"] == "late"
    stopping.result(WAIT)


def test_the_hard_stop_ends_calls_with_an_error(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [*says("ab", finish=FinishReason.LENGTH)[:1], HOLD]
    whole, stream = Client(rig), Client(rig, stream=True, max_tokens=5)
    rig.wait_for(lambda: len(rig.backend.generations) == 2)
    rig.call(rig.server.stop())
    assert whole.answer().status_code == 503
    assert whole.answer().json()["error"]["code"] == "stopping"
    last = stream.answer().text.rstrip().rsplit("data: ", 1)[1]
    assert json.loads(last)["error"]["code"] == "stopping"


def test_a_second_stop_cuts_the_first_ones_grace_short(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [HOLD]
    client = Client(rig)
    assert rig.backend.started.wait(WAIT)
    soft = asyncio.run_coroutine_threadsafe(rig.server.stop(grace=10 * WAIT), rig.loop)
    rig.wait_for(lambda: not accepts(rig))
    rig.call(rig.server.stop())
    soft.result(WAIT)
    assert client.answer().status_code == 503


def test_the_hard_stop_does_not_wait_for_a_request_that_never_ends(rig: ApiRig) -> None:
    with socket.create_connection(("127.0.0.1", rig.server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        rig.call(rig.server.stop())


@pytest.mark.parametrize("begun", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_a_client_that_does_not_finish_its_headers_is_cut_off(
    begun: bytes, rig: ApiRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    with socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT) as client:
        client.sendall(begun)
        assert client.recv(1) == b""


def test_what_is_answered_before_its_body_was_there_is_the_last_of_its_connection(
    rig: ApiRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.3)
    for head in (b"GET /health", b"POST /nowhere", b"GET /v1/models"):
        with socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT) as client:
            client.sendall(head + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answer = b""
            while part := client.recv(1 << 16):
                answer += part
            assert answer.startswith(b"HTTP/1.1 ") and answer.count(b"HTTP/1.1 ") == 1
            with contextlib.suppress(ConnectionError):
                while True:  # cut off in the end, though it goes on sending
                    client.sendall(b"x")
                    time.sleep(0.02)


def test_a_client_that_sends_all_of_too_large_a_body_still_hears_why(
    rig: ApiRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LINGER_S", WAIT)
    with socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 40000000\r\n\r\n")
        client.sendall(b"x" * 40_000_000)
        assert client.recv(12) == b"HTTP/1.1 413"


def test_clients_beyond_what_open_files_allow_are_told_so(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "most_clients", lambda: 2)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", rig.server.port), WAIT)) for _ in range(3)]
        answer = held[2].recv(1 << 12)
        assert answer.startswith(b"HTTP/1.1 503") and b"too_many_connections" in answer
    rig.wait_for(lambda: b" 200 " in asked(rig.server.port))


def asked(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return client.recv(1 << 12)


def test_a_client_that_takes_nothing_is_cut_off_and_its_request_cancelled(
    rig: ApiRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALLED_S", 0.3)
    rig.backend.script = lambda request: says("x" * 12_000_000, finish=FinishReason.LENGTH, size=200_000)
    body = json.dumps({"model": "tiny", "prompt": "abc", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT) as client:
        client.sendall(head + body)
        assert client.recv(12) == b"HTTP/1.1 200"
        rig.wait_for(lambda: rig.backend.generations[0].ended.is_set())


def test_a_client_that_is_slow_but_reads_gets_everything(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: the time in which nothing is taken is counted anew whenever something was."""
    monkeypatch.setattr(connection, "STALLED_S", 10.0)
    pause, resume = connection.Connection.pause_writing, connection.Connection.resume_writing
    due, over = [], []

    def pausing(self: connection.Connection) -> None:
        pause(self)
        due.append(self._reading_due)

    def resuming(self: connection.Connection) -> None:
        resume(self)
        over.append(due[-1].cancelled() and self._reading_due is None)

    monkeypatch.setattr(connection.Connection, "pause_writing", pausing)
    monkeypatch.setattr(connection.Connection, "resume_writing", resuming)
    rig.backend.script = lambda _: says("x" * 4_000_000, size=100)
    with rig.http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": "abc", "stream": True}) as answer:
        lines = 0
        for line in answer.iter_lines():
            lines += line.startswith("data: ")
            if lines == 1:
                rig.wait_for(lambda: due)  # there is no more room on the way
            if lines % 4000 == 0:
                time.sleep(0.05)
    assert lines > 40_000
    assert over and all(over)
