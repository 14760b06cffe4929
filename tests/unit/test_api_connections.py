"""What clients send besides the requests that most send: offers of other protocols, early bytes, what is not HTTP."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator

import pytest
from api_rig import WAIT, ApiRig, Pause, says

from bascule.api import connection
from bascule.types import FinishReason

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
BODY = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": 3}).encode()
INNER = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def rig() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


@pytest.fixture
def client(rig: ApiRig) -> Iterator[socket.socket]:
    """A connection that the server has taken."""
    with connected(rig) as client:
        yield client


def connected(rig: ApiRig) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT)
    rig.wait_for(lambda: bool(rig.server._server.server_state.connections))
    return client


def post(body: bytes = BODY, extra: bytes = b"") -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n"
    return head % (len(body), extra) + body


def all_of(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    answer = b""
    while part := client.recv(1 << 16):
        answer += part
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def served(rig: ApiRig) -> connection.Connection:
    """The server's side of the only connection."""
    (found,) = rig.server._server.server_state.connections
    assert isinstance(found, connection.Connection)
    return found


def error_of(answer: bytes) -> dict[str, str]:
    """The error in an answer that is one in OpenAI's shape."""
    head, body = answer.split(b"\r\n\r\n", 1)
    assert b"content-type: application/json" in head.lower() and b"x-request-id: " in head.lower()
    return json.loads(body)["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("offer", [OFFER, b"Connection: upgrade\r\nUpgrade: websocket\r\n"])
@pytest.mark.parametrize("apart", [False, True])
def test_offers_to_speak_another_protocol_are_ignored(
    offer: bytes, apart: bool, rig: ApiRig, client: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    whole = post(extra=offer)
    if apart:
        client.sendall(whole[: -len(BODY)])
        rig.wait_for(lambda: served(rig)._in_body)
        client.sendall(whole[-len(BODY) :] + LAST)
    else:
        client.sendall(whole + whole + LAST)
    answer = all_of(client)
    assert statuses(answer) == [200] * (1 if apart else 2) + [404] and b'"text":"abc"' in answer
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("last", [(b"HTTP/1.1", b"HTTP/1.0"), (b"Upgrade, ", b"Upgrade, close, ")])
def test_an_offer_with_the_last_request_of_a_connection_is_ignored_too(
    last: tuple[bytes, bytes], client: socket.socket
) -> None:
    client.sendall(post(extra=OFFER).replace(*last))
    answer = all_of(client)
    assert statuses(answer) == [200] and b'"text":"abc"' in answer


def test_chunks_behind_an_offer_are_a_body(rig: ApiRig, client: socket.socket) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + OFFER + b"\r\n"
    client.sendall(head)
    rig.wait_for(lambda: served(rig)._in_body)
    client.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + LAST)
    answer = all_of(client)
    assert statuses(answer) == [200, 404] and b'"text":"abc"' in answer


def test_a_body_behind_an_offer_is_never_a_request(rig: ApiRig, client: socket.socket) -> None:
    whole = post(INNER, OFFER)
    client.sendall(whole[: -len(INNER)])
    rig.wait_for(lambda: served(rig)._in_body)
    client.sendall(INNER + LAST)
    assert statuses(all_of(client)) == [400, 404]


def asked(rig: ApiRig, client: socket.socket) -> Pause:
    """A request that is under way, and not answered before what is returned is over."""
    pause = Pause()
    rig.backend.script = lambda request: [pause, *says("late", finish=FinishReason.LENGTH)]
    client.sendall(post())
    assert rig.backend.started.wait(WAIT)
    return pause


@pytest.mark.parametrize("early", [b"\r\n", b"GET /health HTTP/1.1\r\n"])
def test_what_comes_early_costs_no_answer(
    early: bytes, rig: ApiRig, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may send an empty line behind its body, or begin its next request, while the answer is made."""
    pause = asked(rig, client)
    monkeypatch.setattr(connection, "HEAD_S", 0.0)
    client.sendall(early)
    rig.wait_for(lambda: served(rig)._head == len(early))
    assert served(rig)._head_due is None
    monkeypatch.setattr(connection, "HEAD_S", WAIT)
    pause.over.set()
    client.sendall(b"Host: x\r\n\r\n" + LAST if early.strip() else LAST)
    answer = all_of(client)
    assert statuses(answer) == [200, 200, 404] if early.strip() else [200, 404]


def test_a_head_that_began_early_is_bounded_from_the_end_of_the_answer_on(
    rig: ApiRig, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = asked(rig, client)
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    client.sendall(b"GET /health HT")
    rig.wait_for(lambda: served(rig)._in_head)
    pause.over.set()
    assert statuses(all_of(client)) == [200]


def test_a_client_that_takes_a_little_now_and_then_is_not_cut_off(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it in the server shrinks, though not as far as more may be written."""
    monkeypatch.setattr(connection, "STALLED_S", 0.01)
    left, looks = [50], []
    check = connection.Connection._check_reading

    def taken(self: connection.GatheringTransport) -> int:
        left[0] -= left[0] > 0
        return left[0]

    def checked(self: connection.Connection, waiting: int) -> None:
        looks.append(waiting)
        check(self, waiting)

    monkeypatch.setattr(connection.GatheringTransport, "get_write_buffer_size", taken, raising=False)
    monkeypatch.setattr(connection.Connection, "_check_reading", checked)
    with connected(rig) as client:
        rig.loop.call_soon_threadsafe(served(rig).pause_writing)
        assert client.recv(1) == b""  # in the end, when nothing is taken any more
    assert looks == sorted(looks, reverse=True) and len(looks) > 20


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n" + INNER, "CONNECT"),
        (post(extra=b"Content-Length: 5\r\n"), "Content-Length"),
        (post(extra=b"Transfer-Encoding: chunked\r\n"), "Transfer-Encoding"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk size"),
        (b"GET /health HTTP/1.1\r\nX: a\0b\r\n\r\n", "header value"),
        (b"GET nowhere HTTP/1.1\r\nHost: x\r\n\r\n", "URL|url|target"),
        (b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", "target"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1"),
    ],
)
def test_what_is_not_http_is_answered_with_what_is_wrong(sent: bytes, said: str, client: socket.socket) -> None:
    client.sendall(sent)
    answer = all_of(client)
    assert statuses(answer) == [400]
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert any(word in error["message"] for word in said.split("|")), error


def test_what_is_refused_has_the_id_that_the_client_gave(client: socket.socket) -> None:
    client.sendall(b"GET /health HTTP/1.1\r\nX-Request-Id: mine\r\nA: b\r\nX: a\0b\r\n\r\n")
    assert b"\r\nX-Request-Id: mine\r\n" in all_of(client)


@pytest.mark.parametrize(
    ("behind", "answered"),
    [
        (b"nonsense\r\n\r\n", [200, 400]),
        (INNER + b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", [200, 200, 400]),
    ],
    ids=["head", "chunk"],
)
def test_what_is_not_http_is_answered_after_the_requests_before_it(
    behind: bytes, answered: list[int], rig: ApiRig, client: socket.socket
) -> None:
    pause = Pause()
    rig.backend.script = lambda request: [pause, *says("late", finish=FinishReason.LENGTH)]
    client.sendall(post() + behind)
    rig.wait_for(lambda: bool(rig.backend.requests) and served(rig)._refusal is not None)
    pause.over.set()
    answer = all_of(client)
    assert statuses(answer) == answered and b'"text":"late"' in answer
