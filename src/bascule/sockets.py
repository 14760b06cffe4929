"""Message sockets as every process of ours sets them up: bounded messages, unbounded queues, sends that never wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio

from bascule.wire import MAX_MESSAGE, WireError

log = logging.getLogger(__name__)


def open_socket(
    context: zmq.asyncio.Context, kind: int, linger_ms: int, identity: str | None = None
) -> zmq.asyncio.Socket:
    """A socket of `kind`; under `identity`, if given, a ROUTER at the other end knows it."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if identity is not None:
        socket.setsockopt(zmq.ROUTING_ID, identity.encode())
    return socket


def post(socket: zmq.asyncio.Socket, frames: Sequence[bytes], on_failure: Callable[[], None] | None = None) -> None:
    """Queue a message without waiting; `on_failure` is called later if the other end is known not to be there."""

    def sent(future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            log.debug("a message was not sent: %s", error)
            if on_failure is not None:
                on_failure()

    asyncio.ensure_future(socket.send_multipart(frames)).add_done_callback(sent)


async def deliver(socket: zmq.asyncio.Socket, apply: Callable[[list[bytes]], None]) -> None:
    """Hand every message's frames to `apply` until cancelled.

    What cannot be read or applied is logged and dropped: one bad message must not end the conversation.
    """
    while True:
        frames = await socket.recv_multipart()
        try:
            apply(frames)
        except (WireError, UnicodeDecodeError) as error:
            log.warning("dropped a message: %s", error)
        except Exception:
            log.exception("a message could not be applied")
