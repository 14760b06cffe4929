"""Accepts a receiver's connections and gives each a thread of its own, so that one that stalls holds up no other."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from functools import partial
from threading import Event, Lock, Thread, current_thread
from time import monotonic

log = logging.getLogger(__name__)

_MOST_CONNECTIONS = 512
_MOST_STRANGERS = 64
"""Connections that have not been admitted yet; with one more, the oldest of them is closed."""
_RETRY_SECONDS = 0.1
_JOIN_SECONDS = 5.0


class Listener:
    """Runs `handle` in a thread for each connection to `listening` (a bound socket, owned from now on).

    `handle` must return soon after its connection is shut down; the connection is closed when it returns or raises.
    Beside the connection it gets what it is to call once the other end has shown that it may be here: a connection
    that has not come so far is closed where too many others come.
    """

    def __init__(
        self, listening: socket.socket, handle: Callable[[socket.socket, Callable[[], None]], None], name: str
    ) -> None:
        self._listening = listening
        self._handle = handle
        self._name = name
        self._lock = Lock()
        self._served: dict[socket.socket, Thread] = {}
        self._strangers: dict[socket.socket, None] = {}
        """Those of them that are not admitted, the oldest first."""
        self._closing = Event()
        listening.listen()
        self._acceptor = Thread(target=self._accept, name=name, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if not self._closing.wait(_RETRY_SECONDS):
                    log.warning("%s cannot accept a connection: %s", self._name, error)
                continue
            thread = Thread(target=self._serve, args=(connection,), name=f"{self._name}-connection", daemon=True)
            with self._lock:
                if self._closing.is_set() or len(self._served) >= _MOST_CONNECTIONS:
                    connection.close()
                    continue
                if len(self._strangers) >= _MOST_STRANGERS:
                    self._turn_out(next(iter(self._strangers)))
                self._served[connection] = thread
                self._strangers[connection] = None
            thread.start()

    def _turn_out(self, stranger: socket.socket) -> None:
        log.info("%s closes a connection over which nobody has been admitted yet, because others come", self._name)
        del self._strangers[stranger]
        with contextlib.suppress(OSError):
            stranger.shutdown(socket.SHUT_RDWR)

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(connection, None)

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._handle(connection, partial(self._admit, connection))
        except OSError as error:
            log.info("%s lost a connection: %s", self._name, error)
        except Exception:
            log.exception("%s dropped a connection", self._name)
        finally:
            with self._lock:
                del self._served[connection]
                self._strangers.pop(connection, None)
            connection.close()

    def close(self) -> None:
        """Accept no more, shut all connections down and wait (seconds at most) for their threads. Idempotent."""
        self._closing.set()
        with self._lock:
            served = dict(self._served)
        for sock in (self._listening, *served):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        deadline = monotonic() + _JOIN_SECONDS
        for thread in (self._acceptor, *served.values()):
            if thread is not current_thread():
                thread.join(max(0.0, deadline - monotonic()))
        self._listening.close()


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to a TCP address (port 0: a free one); raises OSError.

    Its buffers are left to the kernel, which grows them further than it lets a program ask for.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening
