"""The worker's connection to its router."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from bascule.door import Knock
from bascule.errors import RegistrationRefused
from bascule.keys import ClusterKey
from bascule.sockets import MessageSocket
from bascule.types import Epoch
from bascule.wire import RouterMessage, WorkerMessage, encode, from_router


class RouterSocket:
    """Connects under this worker's epoch as address; while the router is away, messages wait here."""

    def __init__(self, router: str, epoch: Epoch, key: ClusterKey | None = None) -> None:
        self.context = zmq.Context()
        self.key = key
        self._socket = MessageSocket(self.context, zmq.DEALER, linger_ms=500, identity=epoch, key=key)
        self._knock = Knock(self.context, self._socket, router, key)
        self._socket.connect(router)

    def send(self, message: WorkerMessage) -> None:
        self._socket.post([encode(message)])

    async def serve(self, handler: Callable[[RouterMessage], None]) -> None:
        """Deliver the router's messages until cancelled."""
        await self._socket.deliver(lambda frames: handler(from_router(frames[-1])))

    async def turned_away(self) -> None:
        """Goes on for as long as there is hope; raises RegistrationRefused when the router does not let us in."""
        raise RegistrationRefused(await self._knock.refused)

    def close(self) -> None:
        self._socket.close()
        self._knock.close()
        self.context.destroy(linger=500)
