"""The worker's connection to its router."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from bascule.sockets import MessageSocket
from bascule.types import Epoch
from bascule.wire import RouterMessage, WorkerMessage, encode, from_router


class RouterSocket:
    """Connects under this worker's epoch as address; while the router is away, messages wait here."""

    def __init__(self, router: str, epoch: Epoch) -> None:
        self.context = zmq.Context()
        self._socket = MessageSocket(self.context, zmq.DEALER, linger_ms=500, identity=epoch)
        self._socket.connect(router)

    def send(self, message: WorkerMessage) -> None:
        self._socket.post([encode(message)])

    async def serve(self, handler: Callable[[RouterMessage], None]) -> None:
        """Deliver the router's messages until cancelled."""
        await self._socket.deliver(lambda frames: handler(from_router(frames[-1])))

    def close(self) -> None:
        self._socket.close()
        self.context.destroy(linger=500)
