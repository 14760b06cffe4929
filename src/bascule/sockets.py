"""Message sockets as every process of ours sets them up: bounded messages and queues, sends that never wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq

from bascule.keys import ClusterKey
from bascule.wire import MAX_MESSAGE, WireError

log = logging.getLogger(__name__)

Apply = Callable[[list[bytes]], None]

ZAP_DOMAIN = b"bascule"

MOST_WAITING = 1 << 14
"""Messages that wait at one end of a connection for an end that does not read; further ones are not sent."""
_BURST = 64
"""Messages applied before the event loop has its turn again."""


class MessageSocket:
    """A zmq socket in the running event loop.

    pyzmq's own asyncio sockets make a future, a callback and several system calls of each message; here the loop
    watches the socket's descriptor, and all messages that have come are taken at once.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        linger_ms: int,
        identity: str | None = None,
        key: ClusterKey | None = None,
    ) -> None:
        """A socket of `kind`; under `identity`, if given, a ROUTER at the other end knows it.

        With a `key` all is encrypted, and both ends must have it; a ROUTER needs a `door.Doorkeeper` in its context,
        and lets nobody in without.
        """
        socket = self._socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, linger_ms)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        socket.setsockopt(zmq.SNDHWM, MOST_WAITING)
        socket.setsockopt(zmq.RCVHWM, MOST_WAITING)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if identity is not None:
            socket.setsockopt(zmq.ROUTING_ID, identity.encode())
        if key is not None:
            _lock(socket, key, listens=kind == zmq.ROUTER)
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._loop = asyncio.get_running_loop()
        self._apply: Apply | None = None
        self._looking = False
        """A look at the socket is due in the loop's next turn."""
        self._overfull = False
        """The latest message was one too many."""
        self._taken = 0
        """Messages so far: before that many, none can be too many, but a connection may be refused, which who connects
        tells."""

    def bind(self, address: str) -> str:
        """Listen; returns the address, with the port that was chosen. Raises zmq.ZMQError."""
        self._socket.bind(address)
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, address: str) -> None:
        self._socket.connect(address)

    def monitored(self, events: int) -> str:
        """Where news of this socket's connections can be had from now on."""
        address = f"inproc://news-of-{id(self)}"
        self._socket.monitor(address, events)
        return address

    def post(self, frames: Sequence[bytes], on_failure: Callable[[], None] | None = None) -> None:
        """Queue a message without waiting; `on_failure` is called later if the other end is known not to be there, or
        to have stopped reading long ago."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("a message was not sent: %s", error)
            if isinstance(error, zmq.Again) and self._taken >= MOST_WAITING and not self._overfull:
                self._overfull = True
                log.warning("%d messages wait for a process that does not read; further ones are lost", MOST_WAITING)
            if on_failure is not None:
                self._loop.call_soon(on_failure)
        else:
            self._overfull = False
            self._taken += 1
            self._look_later()

    async def deliver(self, apply: Apply) -> None:
        """Hand every message's frames to `apply` until cancelled.

        What cannot be read or applied is logged and dropped: one bad message must not end the conversation.
        """
        self._apply = apply
        self._loop.add_reader(self._descriptor, self._look)
        try:
            self._look()
            await self._loop.create_future()
        finally:
            self._stop()

    def close(self) -> None:
        self._stop()
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._socket.close()

    def _stop(self) -> None:
        if self._apply is not None:
            self._apply = None
            self._loop.remove_reader(self._descriptor)

    def _look_later(self) -> None:
        """The descriptor tells of news once, and a send may have taken them in passing."""
        if self._apply is None or self._looking:
            return
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Apply the messages that are here."""
        self._looking = False
        for _ in range(_BURST):
            if self._apply is None:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            _apply_one(self._apply, frames)
        self._look_later()


def _lock(socket: zmq.Socket[bytes], key: ClusterKey, listens: bool) -> None:
    if listens:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, key.server_secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, key.server_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, key.client_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, key.client_secret)


def _apply_one(apply: Apply, frames: list[bytes]) -> None:
    try:
        apply(frames)
    except (WireError, UnicodeDecodeError) as error:
        log.warning("dropped a message: %s", error)
    except Exception:
        log.exception("a message could not be applied")
