"""TLS connections count from their first packet on, and their handshakes take no longer than they may."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from api_rig import WAIT, ApiRig

from bascule.api import connection, handshakes
from bascule.api.app import create_app
from bascule.api.calls import Calls
from bascule.api.server import HttpServer
from bascule.api.tls import tls_context
from support.certificates import certify


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    certify(folder, "one", "-nodes")
    return folder / "one.pem"


@pytest.fixture(params=["asyncio", "uvloop"])
def server(request: pytest.FixtureRequest, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """For at most two clients, on either kind of event loop."""
    if request.param == "uvloop":
        monkeypatch.setattr(asyncio, "new_event_loop", uvloop.new_event_loop)
    monkeypatch.setattr(connection, "most_clients", lambda: 2)
    with ApiRig() as rig:
        tls = tls_context(certificate, certificate.with_suffix(".key"))
        server = rig.call(HttpServer.start(create_app(rig.context), Calls(), "127.0.0.1", 0, tls))
        yield server
        rig.call(server.stop())


def silent(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), WAIT)


def is_cut_off(client: socket.socket) -> bool:
    """Waits for it."""
    with contextlib.suppress(ConnectionError):
        return client.recv(1) == b""
    return True


def asked(server: HttpServer, certificate: Path) -> bytes:
    """An answer over TLS; nothing where the connection is not taken."""
    trusting = ssl.create_default_context(cafile=str(certificate))
    with contextlib.suppress(OSError), trusting.wrap_socket(silent(server), server_hostname="127.0.0.1") as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return client.recv(1 << 12)
    return b""


def test_silent_clients_count_before_their_handshakes(server: HttpServer, certificate: Path) -> None:
    first, second = silent(server), silent(server)
    with silent(server) as third:
        assert is_cut_off(third)
    assert asked(server, certificate) == b""
    second.close()
    while not (answer := asked(server, certificate)):  # until the server has seen that it is gone
        pass
    assert answer.startswith(b"HTTP/1.1 200")
    first.close()


def test_a_client_counts_once_its_handshake_is_done(server: HttpServer, certificate: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    with trusting.wrap_socket(silent(server), server_hostname="127.0.0.1") as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"
        (served,) = server._server.server_state.connections
        wire = served.transport.get_extra_info("socket")
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "small writes leave at once"
        while server._server._tls._handshakes:  # for a moment it counts twice
            time.sleep(0.001)
        with silent(server), silent(server) as third:
            assert is_cut_off(third)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1 << 12)


def test_a_stop_waits_for_no_client_that_does_not_close_its_side(server: HttpServer, certificate: Path) -> None:
    """Longer than this test does: the fixture's stop would be late."""
    trusting = ssl.create_default_context(cafile=str(certificate))
    idle = trusting.wrap_socket(silent(server), server_hostname="127.0.0.1")
    idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert idle.recv(12) == b"HTTP/1.1 200"
    server.idle = idle  # type: ignore[attr-defined]


def test_who_does_not_do_the_handshake_is_cut_off(
    server: HttpServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent(server) as stranger:
        stranger.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        while not is_cut_off(stranger):  # after what TLS has to say to that
            pass
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.2)
    with silent(server) as first, silent(server) as second:
        assert is_cut_off(first) and is_cut_off(second)
        while not (answer := asked(server, certificate)):
            pass
        assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("server", ["asyncio"], indirect=True)
def test_connections_are_taken_on_after_one_that_could_not_be(
    server: HttpServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = asyncio.SelectorEventLoop
    accept, failures = kind.sock_accept, [OSError(errno.EPROTO, "gone"), OSError(errno.EMFILE, "too many open files")]

    async def failing(self: asyncio.SelectorEventLoop, listener: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return await accept(self, listener)

    monkeypatch.setattr(handshakes, "_AGAIN_S", 0.0)
    monkeypatch.setattr(kind, "sock_accept", failing)
    assert asked(server, certificate).startswith(b"HTTP/1.1 200"), "the one it waited for already"
    while failures or not (answer := asked(server, certificate)):
        pass
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_stop_does_not_wait_for_handshakes(
    server: HttpServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 10 * WAIT)
    with silent(server) as client:
        assert is_cut_off_by_stop(server, client)


def is_cut_off_by_stop(server: HttpServer, client: socket.socket) -> bool:
    loop = server._serving.get_loop()
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(WAIT)
    return is_cut_off(client)
