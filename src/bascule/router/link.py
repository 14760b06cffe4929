"""The router's socket: workers connect to it, each under its epoch as address."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path

import zmq

from bascule.door import Doorkeeper
from bascule.errors import ConfigError
from bascule.keys import ClusterKey
from bascule.sockets import MessageSocket
from bascule.types import Epoch
from bascule.wire import OtherVersion, RegistrationRefusal, RouterMessage, WorkerMessage, encode, from_worker

Handler = Callable[[Epoch, WorkerMessage], None]

_IPC = "ipc://"


class RouterLink:
    """Receives worker messages and hands them to a handler, in order; sends without waiting."""

    def __init__(self, bind: str, key: ClusterKey | None = None) -> None:
        """Listen at `bind` (`tcp://host:port`, port * for a free one; `ipc://path`) for those with `key`.

        Raises ConfigError when that is not possible, or another listens there.
        """
        self._context = zmq.Context()
        self._door = Doorkeeper(self._context, key)
        self._socket = MessageSocket(self._context, zmq.ROUTER, linger_ms=200, key=key)
        self._door.watch(self._socket, "the socket for workers")
        try:
            if bind.startswith(_IPC) and _taken(Path(bind.removeprefix(_IPC))):
                raise zmq.ZMQError(errno.EADDRINUSE)
            self.address = self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._door.close()
            self._context.destroy(linger=0)
            raise ConfigError(
                f"cannot listen for workers at {bind}: {zmq.strerror(error.errno or 0).lower()}; choose another address"
            ) from error

    def send(self, epoch: Epoch, message: RouterMessage, on_failure: Callable[[], None] | None = None) -> None:
        """Queue a message to the worker with that epoch; `on_failure` is called later if it is not connected."""
        self._socket.post([epoch.encode(), encode(message)], on_failure)

    async def serve(self, handler: Handler, is_member: Callable[[Epoch], bool] = lambda epoch: False) -> None:
        """Deliver messages until cancelled; a newcomer of another version of the protocol is told so, and ends: what a
        member says of another version is dropped."""

        def deliver(frames: list[bytes]) -> None:
            sender = Epoch(frames[0].decode("ascii"))
            try:
                message = from_worker(frames[-1])
            except OtherVersion as other:
                if not is_member(sender):
                    self.send(sender, RegistrationRefusal(str(other)))
                raise
            handler(sender, message)

        await self._socket.deliver(deliver)

    def close(self) -> None:
        self._socket.close()
        self._door.close()
        self._context.destroy(linger=200)


def _taken(path: Path) -> bool:
    """Whether something is at `path`, other than a socket that nobody listens at; zmq would replace whatever it is."""
    if not path.is_socket():
        return path.exists()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.setblocking(False)
        try:
            caller.connect(str(path))
        except BlockingIOError:
            return True  # as many others wait there as may
        except OSError:
            return False
    return True
