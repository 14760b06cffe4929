"""The worker's connection to its router."""

from __future__ import annotations

from collections.abc import Callable

import zmq
import zmq.asyncio

from bascule.sockets import deliver, open_socket, post
from bascule.types import Epoch
from bascule.wire import RouterMessage, WorkerMessage, encode, from_router


class RouterSocket:
    """Connects under this worker's epoch as address; while the router is away, messages wait here."""

    def __init__(self, router: str, epoch: Epoch) -> None:
        self.context = zmq.asyncio.Context()
        self._socket = open_socket(self.context, zmq.DEALER, linger_ms=500, identity=epoch)
        self._socket.connect(router)

    def send(self, message: WorkerMessage) -> None:
        post(self._socket, [encode(message)])

    async def serve(self, handler: Callable[[RouterMessage], None]) -> None:
        """Deliver the router's messages until cancelled."""
        await deliver(self._socket, lambda frames: handler(from_router(frames[-1])))

    def close(self) -> None:
        self.context.destroy(linger=500)
