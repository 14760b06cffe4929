"""Messages between workers: one listening socket, and one connection to each peer that was ever addressed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

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
        self._connections: dict[str, MessageSocket] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._peers: dict[WorkerId, PeerAddress] = {}
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
        connection = self._connections.get(peer.address)
        if connection is None:
            self._forget_earlier(peer)
            connection = MessageSocket(self._context, zmq.DEALER, linger_ms=0, identity=self._epoch, key=self._key)
            try:
                connection.connect(peer.address)
            except zmq.ZMQError as error:
                connection.close()
                log.warning("peer %s cannot be at %r: %s", peer.worker, peer.address[:200], error.strerror)
                return
            self._connections[peer.address] = connection
            self._peers[peer.worker] = peer
            answers = connection.deliver(lambda frames: self._handler(peer.epoch, from_peer(frames[-1])))
            self._readers[peer.address] = asyncio.create_task(answers)
        connection.post([encode(message)])

    def answer(self, epoch: Epoch, message: PeerMessage) -> None:
        """Send to a peer that has connected to us."""
        self._listener.post([epoch.encode(), encode(message)])

    def forget(self, peer: PeerAddress) -> None:
        """Close the connection to a peer that does not answer; a later send connects anew."""
        if (connection := self._connections.pop(peer.address, None)) is not None:
            self._readers.pop(peer.address).cancel()
            connection.close()

    def _forget_earlier(self, peer: PeerAddress) -> None:
        """A new incarnation listens elsewhere; nobody answers at the old address any more."""
        earlier = self._peers.get(peer.worker)
        if earlier is not None and earlier.epoch != peer.epoch:
            self.forget(earlier)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.cancel()
        for connection in self._connections.values():
            connection.close()
        self._listener.close()
        self._door.close()


def _drop(sender: Epoch, message: PeerMessage) -> None:
    """Nobody serves yet."""
