"""Who may connect: the answer to every client's CURVE key, and news of connections that came to nothing."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from bascule.keys import ClusterKey
from bascule.sockets import ZAP_DOMAIN, MessageSocket

log = logging.getLogger(__name__)

_ZAP = "inproc://zeromq.zap.01"
_FAILED = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
_MISMATCH = zmq.Event.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_SAY_AGAIN_S = 10.0
_MOST_NAMELESS = 5
"""Connections turned away in a row that had gone before their address was known; most try again, and are known then."""
_MOST_ACCEPTED = 4096
"""Connections whose addresses are remembered until their handshake is over."""
_BREAKS, _BREAKS_S = 5, 3.0
"""Handshakes in a row that broke off without a reason, over so long, after which a client gives up. Which of the two
ends learns first that they have nothing in common is a race, and the other learns nothing."""


class Doorkeeper:
    """Lets those with the cluster key into the listening sockets of a context, and tells of those it turns away.

    Without a key there is nobody to let in or out, and only what does not fit is told.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey | None) -> None:
        """One for a context, before its sockets listen; in the running event loop."""
        self._context = context
        self._key = key
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[MessageSocket] = []
        if key is not None:
            asked = self._asked = MessageSocket(context, zmq.ROUTER, linger_ms=0)
            asked.bind(_ZAP)
            self._run(asked, self._answer)

    def watch(self, listening: MessageSocket, what: str) -> None:
        """Log who is turned away at a socket, and why; `what` is its name in the log."""
        watch = _Turned(what, self._key is not None)
        self._run(_monitor(self._context, listening, zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | _FAILED), watch.news)

    def _run(self, source: MessageSocket, apply: Callable[[list[bytes]], None]) -> None:
        self._sockets.append(source)
        self._tasks.append(asyncio.create_task(source.deliver(apply)))

    def _answer(self, frames: list[bytes]) -> None:
        """A request of ZAP 1.0: envelope, empty, version, request id, domain, address, identity, mechanism, key."""
        assert self._key is not None
        caller, _, version, request, domain, _, _, mechanism, *credentials = frames
        ours = z85.decode(self._key.client_public)
        known = (version, domain, mechanism, len(credentials)) == (b"1.0", ZAP_DOMAIN, b"CURVE", 1)
        good = known and hmac.compare_digest(credentials[0], ours)
        status = (b"200", b"") if good else (b"400", b"another cluster key")
        self._asked.post([caller, b"", b"1.0", request, *status, b"", b""])

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for source in self._sockets:
            source.close()


class _Turned:
    """Follows a listening socket's connections, and logs those whose handshake failed, at most one line in a while."""

    def __init__(self, what: str, keyed: bool) -> None:
        self._what = what
        self._keyed = keyed
        self._from: dict[int, str] = {}
        """Addresses by descriptor, as news of a failure has none."""
        self._why = ""
        self._nameless = 0
        self._quiet_until = 0.0
        self._untold = 0

    def news(self, frames: list[bytes]) -> None:
        event = _Event.read(frames)
        if event.kind is zmq.Event.ACCEPTED:
            if len(self._from) < _MOST_ACCEPTED:
                self._from[event.value] = _peer_of(event.value, event.endpoint)
        elif event.kind in _FAILED:
            self._why = self._reason(event)
            if event.kind is zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                log.debug("%s: a connection ended before it was let in", self._what)
        elif event.kind is zmq.Event.DISCONNECTED:
            peer, why, self._why = self._from.pop(event.value, ""), self._why, ""
            if why and not peer and self._nameless < _MOST_NAMELESS:
                self._nameless += 1
            elif why:
                self._nameless = 0
                self._tell(peer or "an address that is not known", why)

    def _reason(self, event: _Event) -> str:
        """Empty for one that leaves of itself, as those do who only look whether somebody listens."""
        if event.kind is zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            return ""
        if event.kind is zmq.Event.HANDSHAKE_FAILED_PROTOCOL and event.value == _MISMATCH:
            return "it has no cluster key" if self._keyed else "it has a cluster key, and we none"
        return "it has another cluster key, or is no process of Bascule" if self._keyed else "it is none of Bascule"

    def _tell(self, peer: str, why: str) -> None:
        now = time.monotonic()
        if now < self._quiet_until:
            self._untold += 1
            return
        more = f" ({self._untold} more in the meantime)" if self._untold else ""
        self._quiet_until, self._untold = now + _SAY_AGAIN_S, 0
        log.warning(
            "%s did not let %s in: %s; give all processes the same --cluster-key-file%s", self._what, peer, why, more
        )


class Knock:
    """Follows a connecting socket, and says when it is no use to go on knocking."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], connecting: MessageSocket, address: str, key: ClusterKey | None
    ) -> None:
        """Before `connecting` connects to the router at `address`; in the running event loop."""
        self._address = address
        self._keyed = key is not None
        self._breaks = 0
        self._since = 0.0
        self._inside = self._lost = False
        self.refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why we are not let in, for a person."""
        news = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | _FAILED
        self._source = _monitor(context, connecting, news)
        self._task = asyncio.create_task(self._source.deliver(self._news))

    def _news(self, frames: list[bytes]) -> None:
        event = _Event.read(frames)
        if event.kind is zmq.Event.HANDSHAKE_SUCCEEDED:
            self._breaks = 0
            self._inside = True
            if self._lost:
                log.info("connected to the router at %s again", self._address)
        elif event.kind is zmq.Event.DISCONNECTED:
            if self._inside:
                log.warning(
                    "the connection to the router at %s has broken off; trying on until it is back", self._address
                )
            self._lost, self._inside = self._lost or self._inside, False
        elif event.kind is zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            self._broke_off()
        elif event.kind is zmq.Event.HANDSHAKE_FAILED_PROTOCOL and event.value == _MISMATCH:
            self._refuse("has no cluster key, and we have one" if self._keyed else "asks for a cluster key")
        elif event.kind is zmq.Event.HANDSHAKE_FAILED_AUTH:
            self._refuse("has another cluster key")
        else:
            self._refuse("is no router of Bascule" + (", or has another cluster key" if self._keyed else ""))

    def _broke_off(self) -> None:
        """A router with another key says nothing; nor does one that ends in that moment, or a proxy without one."""
        now = time.monotonic()
        self._since = self._since if self._breaks else now
        self._breaks += 1
        if self._breaks == 1:
            log.warning("the router at %s closed the connection before it let us in; trying again", self._address)
        if self._breaks >= _BREAKS and now - self._since >= _BREAKS_S:
            why = "it has another cluster key, or none" if self._keyed else "it asks for a cluster key, or is no router"
            self._refuse(f"closed the connection {self._breaks} times ({why})")

    def _refuse(self, why: str) -> None:
        if not self.refused.done():
            what = f"the router at {self._address} did not accept our cluster key: it {why}"
            if not self._keyed:
                what = f"the router at {self._address} did not let us in: it {why}"
            self.refused.set_result(f"{what}; give router and workers the same --cluster-key-file")
            log.error("%s", self.refused.result())

    def close(self) -> None:
        self._task.cancel()
        self._source.close()


@dataclass(frozen=True)
class _Event:
    kind: zmq.Event
    value: int
    """A descriptor, an errno or a protocol error."""
    endpoint: str
    """Of the socket that is watched."""

    @classmethod
    def read(cls, frames: list[bytes]) -> _Event:
        message = parse_monitor_message(frames)
        return cls(zmq.Event(message["event"]), int(message["value"]), message["endpoint"].decode())


def _monitor(context: zmq.Context[zmq.Socket[bytes]], watched: MessageSocket, events: int) -> MessageSocket:
    source = MessageSocket(context, zmq.PAIR, linger_ms=0)
    source.connect(watched.monitored(events))
    return source


def _peer_of(descriptor: int, endpoint: str) -> str:
    """Who has connected to `endpoint`; empty where that has gone meanwhile and the descriptor is something else."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if not endpoint.endswith(f":{connection.getsockname()[1]}"):
                return ""
            host, port = connection.getpeername()[:2]
    except (OSError, ValueError, IndexError):
        return ""
    return f"{host}:{port}"
