"""Runs the applications on their ports, and stops them, softly or at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from bascule.api.calls import Calls
from bascule.api.connection import Connection
from bascule.api.handshakes import TlsListener
from bascule.errors import ConfigError

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients' pools keep theirs, so that none is closed in use."""

STOP_MARGIN = 2.0
"""Seconds that ended calls may take to say so to their clients before their connections are cut."""


class HttpServer:
    """One application on one port, in the running event loop.

    server = await HttpServer.start(app, calls, "127.0.0.1", 0)
    ... server.url ...
    await server.stop(grace=30.0)
    """

    def __init__(self, server: _Server, listener: socket.socket, scheme: str, host: str, calls: Calls) -> None:
        """Use `start`."""
        self._server = server
        self._calls = calls
        self._serving = asyncio.create_task(server.serve(sockets=[listener]))
        self.port: int = listener.getsockname()[1]
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @classmethod
    async def start(
        cls, app: ASGIApp, calls: Calls, host: str, port: int, tls: ssl.SSLContext | None = None
    ) -> HttpServer:
        """Listen on `host` and `port` (0: a free one), with TLS if given; returns once connections are answered.

        `calls` are those of `app`. Raises ConfigError where it cannot listen there.
        """
        listener = await _listen(host, port)
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        config.load()
        config.ssl = tls
        server = cls(_Server(config), listener, "http" if tls is None else "https", host, calls)
        await server._server.listening.wait()
        return server

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        await asyncio.shield(self._serving)

    async def stop(self, grace: float = 0.0) -> None:
        """Take no more connections, give the calls under way `grace` seconds, then end them with an error.

        May be called again, with less grace, while an earlier call waits.
        """
        self._server.should_exit = True
        if grace > 0:
            await asyncio.wait((self._serving,), timeout=grace)
        if not self._serving.done():
            self._calls.abort()
            await asyncio.wait((self._serving,), timeout=STOP_MARGIN)
        if not self._serving.done():
            self._server.cut()
        await self._serving


class _Server(uvicorn.Server):
    """uvicorn that leaves signals alone, says when it listens, and bounds TLS handshakes."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._tls: TlsListener | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the business of whoever runs the process."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.config.ssl is None or sockets is None:
            await super().startup(sockets)
        else:
            self.servers: list[asyncio.Server] = []
            connections = self.server_state.connections
            self._tls = TlsListener(sockets[0], self.config.ssl, self._connection, lambda: len(connections))
            self.started = True
        self.listening.set()

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is not None:
            await self._tls.close()
        await super().shutdown(sockets)

    def cut(self) -> None:
        """Close every connection as it is."""
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def check_port(host: str, port: int) -> None:
    """Raises ConfigError where nobody could listen there now, as `HttpServer.start` does."""
    (await _listen(host, port)).close()


async def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; its protocol number is TCP's, without which asyncio would leave Nagle's algorithm on."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(
            f"cannot listen on {host}: {error.strerror}; give --host an address of this machine"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(_cannot_listen(host, port, error)) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use; stop what listens there, or choose another with --port (0: a free one)"
        )
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges; choose one from 1024 on with --port"
    return f"cannot listen on {host} port {port}: {error.strerror}; give --host an address of this machine"
