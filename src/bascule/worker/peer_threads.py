"""Threads for calls that wait for peers: each peer has a few of its own, so that a silent one holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from bascule.types import Epoch

_KEPT_S = 60.0
"""A peer's threads outlast their latest use by this, so that the next one finds them running."""


class PeerThreads:
    """Runs in the asyncio loop."""

    def __init__(self, most: int, name: str) -> None:
        """Up to `most` threads a peer, called `name`."""
        self._most = most
        self._name = name
        self._pools: dict[Epoch, _Pool] = {}

    @contextmanager
    def of(self, peer: Epoch) -> Iterator[ThreadPoolExecutor]:
        """The threads of this peer. What is still queued there some time after their last use has ended is dropped."""
        if (pool := self._pools.get(peer)) is None:
            pool = self._pools[peer] = _Pool(ThreadPoolExecutor(self._most, self._name))
        pool.users += 1
        if pool.ending is not None:
            pool.ending.cancel()
        try:
            yield pool.threads
        finally:
            pool.users -= 1
            if not pool.users:
                pool.ending = asyncio.get_running_loop().call_later(_KEPT_S, self._end, peer)

    def _end(self, peer: Epoch) -> None:
        self._pools.pop(peer).threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Start no further call; those under way end by themselves. Nothing may be in use any more."""
        for pool in self._pools.values():
            if pool.ending is not None:
                pool.ending.cancel()
            pool.threads.shutdown(wait=False, cancel_futures=True)


class _Pool:
    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self.users = 0
        self.ending: asyncio.TimerHandle | None = None
