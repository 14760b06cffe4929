"""Accepts a receiver's connections and gives each a thread of its own, so that one that stalls holds up no other."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from threading import Event, Lock, Thread, current_thread
from time import monotonic

log = logging.getLogger(__name__)

_MOST_CONNECTIONS = 512
_RETRY_SECONDS = 0.1
_JOIN_SECONDS = 5.0


class Listener:
    """Runs `handle` in a thread for each connection to `listening` (a bound socket, owned from now on).

    `handle` must return soon after its connection is shut down; the connection is closed when it returns or raises.
    """

    def __init__(self, listening: socket.socket, handle: Callable[[socket.socket], None], name: str) -> None:
        self._listening = listening
        self._handle = handle
        self._name = name
        self._lock = Lock()
        self._served: dict[socket.socket, Thread] = {}
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
                self._served[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._handle(connection)
        except OSError as error:
            log.info("%s lost a connection: %s", self._name, error)
        except Exception:
            log.exception("%s dropped a connection", self._name)
        finally:
            with self._lock:
                self._served.pop(connection, None)

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
