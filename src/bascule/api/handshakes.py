"""TLS connections from the first packet to the end of their handshakes: bounded in number and in time.

asyncio's own servers tell nobody of a connection before its handshake is done, so that silent ones count nowhere.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from bascule.api import connection

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""How long a client may take for its handshake; then it is cut off."""
GOODBYE_S = 1.0
"""How long it may take to close its side, too, which a stop of the server waits for."""
_AGAIN_S = 1.0
"""How long to wait when this process, or the machine, has no room for one more connection."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TlsListener:
    """Takes connections on one listening socket until it is closed. Runs in the asyncio loop."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        protocol: Callable[[], asyncio.Protocol],
        connected: Callable[[], int],
    ) -> None:
        """`protocol` makes one for each connection whose handshake is done; `connected` says how many of these there
        are."""
        self._listener = listener
        self._context = context
        self._protocol = protocol
        self._connected = connected
        self._handshakes: set[asyncio.Task[None]] = set()
        """Those not done, and for a moment some that are connected by now: they count twice, to be on the safe side."""
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Take no more connections, and cut those off whose handshake is not done."""
        tasks = [self._accepting, *self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    log.warning("no connection can be taken: %s", error.strerror)
                await asyncio.sleep(_AGAIN_S if error.errno in _NO_ROOM else 0)  # else that one has gone again
                continue
            if len(self._handshakes) + self._connected() >= (most := connection.most_clients()):
                connection.say_too_many(loop.time(), most)
                client.close()
            else:
                task = asyncio.create_task(self._shake_hands(client))
                self._handshakes.add(task)
                task.add_done_callback(self._handshakes.discard)
            await asyncio.sleep(0)  # one that comes at once would not have let others have their turn

    async def _shake_hands(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # the client's business: it went away, took too long, or speaks no TLS
            await loop.connect_accepted_socket(
                self._protocol,
                client,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=GOODBYE_S,
            )
