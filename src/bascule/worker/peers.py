"""Messages between workers: one listening socket, and one connection to each peer that was ever addressed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from dataclasses import dataclass

import zmq

from bascule.door import Doorkeeper
from bascule.errors import ConfigError
from bascule.keys import ClusterKey
from bascule.peer_wire import PeerMessage, from_peer
from bascule.sockets import MessageSocket
from bascule.types import Epoch, WorkerId
from bascule.wire import PeerAddress, encode

log = logging.getLogger(__name__)

Handler = Callable[[Epoch, PeerMessage], None]

_QUIET_S = 60.0
"""What is under way with a peer sends there every second, but for fetches, and these end without an answer too."""


@dataclass
class _Connection:
    peer: PeerAddress
    socket: MessageSocket
    reader: asyncio.Task[None]
    used: float
    """When something was sent, by the loop's clock."""

    def close(self) -> None:
        self.reader.cancel()
        self.socket.close()


class Peers:
    """Sends to peers by address and answers them by epoch; delivery is not promised, so senders repeat themselves."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        worker: WorkerId,
        epoch: Epoch,
        key: ClusterKey | None = None,
    ) -> None:
        """Listen on a free port of `host` for those with `key`; raises ConfigError when that is not possible."""
        self._context = context
        self._key = key
        self._epoch = epoch
        self._connections: dict[str, _Connection] = {}
        """By address."""
        self._peers: dict[WorkerId, PeerAddress] = {}
        """Who each worker was when we connected."""
        self._door = Doorkeeper(context, key)
        self._listener = MessageSocket(context, zmq.ROUTER, linger_ms=0, key=key)
        self._door.watch(self._listener, "the socket for peers")
        try:
            address = self._listener.bind(f"tcp://{host}:*")
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen for peers on {host}: {error.strerror}; choose another --host") from error
        self.address = PeerAddress(worker, epoch, address)
        self._handler: Handler = _drop

    async def serve(self, handler: Handler) -> None:
        """Deliver messages, answers to ours too, until cancelled."""
        self._handler = handler
        await self._listener.deliver(lambda frames: handler(Epoch(frames[0].decode("ascii")), from_peer(frames[-1])))

    def send(self, peer: PeerAddress, message: PeerMessage) -> None:
        """Send to a peer's listening socket; connects on first use. To an address that is none nothing is sent."""
        connection = self._connections.get(peer.address) or self._connect(peer)
        if connection is not None:
            connection.used = asyncio.get_running_loop().time()
            connection.socket.post([encode(message)])

    def _connect(self, peer: PeerAddress) -> _Connection | None:
        self._forget_earlier(peer)
        socket = MessageSocket(self._context, zmq.DEALER, linger_ms=0, identity=self._epoch, key=self._key)
        try:
            socket.connect(peer.address)
        except zmq.ZMQError as error:
            socket.close()
            log.warning("peer %s cannot be at %r: %s", peer.worker, peer.address[:200], error.strerror)
            return None
        answers = socket.deliver(lambda frames: self._handler(peer.epoch, from_peer(frames[-1])))
        connection = self._connections[peer.address] = _Connection(peer, socket, asyncio.create_task(answers), 0.0)
        self._peers[peer.worker] = peer
        return connection

    def answer(self, epoch: Epoch, message: PeerMessage) -> None:
        """Send to a peer that has connected to us."""
        self._listener.post([epoch.encode(), encode(message)])

    def forget(self, peer: PeerAddress) -> None:
        """Close the connection to a peer that does not answer; a later send connects anew."""
        if (connection := self._connections.pop(peer.address, None)) is not None:
            connection.close()
        if self._peers.get(peer.worker) == peer:
            del self._peers[peer.worker]

    def forget_departed(self, present: Container[WorkerId]) -> None:
        """Close the connections to workers that are not `present`, once nothing is under way there any more."""
        quiet = asyncio.get_running_loop().time() - _QUIET_S
        for connection in list(self._connections.values()):
            if connection.peer.worker not in present and connection.used <= quiet:
                self.forget(connection.peer)

    def _forget_earlier(self, peer: PeerAddress) -> None:
        """A new incarnation listens elsewhere; nobody answers at the old address any more."""
        earlier = self._peers.get(peer.worker)
        if earlier is not None and earlier.epoch != peer.epoch:
            self.forget(earlier)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._listener.close()
        self._door.close()


def _drop(sender: Epoch, message: PeerMessage) -> None:
    """Nobody serves yet."""
