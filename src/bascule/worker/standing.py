"""A worker's standing with its router: it offers itself until it is taken, beats, and asks for leave before it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable

from bascule import __version__
from bascule.clock import Clock
from bascule.engine.sequence import Key
from bascule.kv.transfer.base import machine_id
from bascule.types import Tier, WorkerLoad
from bascule.wire import (
    VERSION,
    Draining,
    Heartbeat,
    Leaving,
    PeerAddress,
    Register,
    Registered,
    StorePlace,
    WorkerMessage,
)
from bascule.worker.parts import Identity, Parts

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
_SAY_UNHEARD_S = 15.0
UNHEARD_S = 5.0
"""A router that does not answer for so long is gone, and whoever sent the requests with it."""


def offer_of(
    identity: Identity,
    parts: Parts,
    peer: PeerAddress,
    stores: dict[Tier, StorePlace],
    kv_addresses: tuple[str, ...] = (),
) -> Register:
    """How a worker offers itself."""
    return Register(
        version=VERSION,
        worker=identity.worker,
        epoch=identity.epoch,
        role=identity.role,
        card=parts.runner.card,
        device=identity.device,
        pid=os.getpid(),
        peer=peer,
        max_sequences=parts.max_sequences,
        kv_blocks=parts.books.num_blocks,
        machine=machine_id(),
        cost=parts.cost,
        stores=stores,
        lends=parts.engine.publishes,
        chunk_tokens=parts.chunk_tokens,
        release=__version__,
        kv_addresses=kv_addresses,
    )


class Standing:
    """Runs in the asyncio loop."""

    def __init__(
        self,
        identity: Identity,
        send: Callable[[WorkerMessage], None],
        load: Callable[[], WorkerLoad],
        told: Callable[[], tuple[int, bytes]],
        keys: Callable[[], Iterable[Key]],
        stop: Callable[[], None],
        clock: Clock,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`load`, `told` and `keys` are what a heartbeat tells (of the latest `KvEvents`, and of all requests that are
        here); `stop` ends the worker at once."""
        self._identity = identity
        self._send = send
        self._load = load
        self._told_of = told
        self._keys = keys
        self._stop = stop
        self._clock = clock
        self._wall = wall
        self._registered = asyncio.Event()
        self._heartbeat_s = 0.5
        self._leaving = asyncio.Event()
        self._heard_at = 0.0
        self._told = False

    def taken(self, message: Registered) -> None:
        """The router has taken this worker in."""
        self._heartbeat_s = message.heartbeat_s
        if not self._registered.is_set():
            log.info("the router has taken this worker in")
        self._registered.set()

    def forgotten(self) -> None:
        """The router, another one probably, does not know this worker."""
        self._registered.clear()

    def leave(self) -> None:
        """End once nothing that the router has placed here needs this worker; when called again, at once.

        At once also where the router does not know this worker, or does not answer.
        """
        if self._leaving.is_set() or not self._registered.is_set():
            self._stop()
            return
        log.info("asking the router for leave; once more to stop at once")
        self._heard_at = self._clock.now()
        self._leaving.set()

    def heard(self, message: Draining) -> None:
        """The router knows that this worker would like to end; it sends `Stop` when it may."""
        self._heard_at = self._clock.now()
        if not self._told and message.requests:
            log.info("%d requests still need this worker", message.requests)
        self._told = True

    async def offer(self, register: Register) -> None:
        """Offer this worker until it is taken, and again when a new router asks for it."""
        unheard_s = 0.0
        while True:
            if self._registered.is_set() or self._leaving.is_set():
                unheard_s = 0.0
            else:
                if unheard_s and unheard_s % _SAY_UNHEARD_S == 0:
                    log.warning(
                        "the router has not taken this worker in for %g s: is it running, is --join its address, and "
                        "does a firewall let us through to it? Trying on (bascule doctor --join tells more)",
                        unheard_s,
                    )
                self._send(register)
                unheard_s += _AGAIN_S
            await asyncio.sleep(_AGAIN_S)

    async def beat(self) -> None:
        while True:
            await self._registered.wait()
            identity = self._identity
            runs = tuple((key.request, key.attempt) for key in self._keys())
            load, (sequence, digest) = self._load(), self._told_of()
            self._send(Heartbeat(identity.worker, identity.epoch, load, sequence, runs, self._wall(), digest))
            await asyncio.sleep(self._heartbeat_s)

    async def ask_for_leave(self) -> None:
        """From `leave` on."""
        await self._leaving.wait()
        while self._clock.now() - self._heard_at < UNHEARD_S:
            self._send(Leaving(self._identity.worker, self._identity.epoch))
            await asyncio.sleep(_AGAIN_S)
        log.warning("the router has not answered for %g s; ending without its leave", UNHEARD_S)
        self._stop()
