"""Silent workers whose process has ended: their ports refuse connections, and nobody needs to wait for heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from bascule.clock import Clock
from bascule.reach import refuses
from bascule.router.view import Member
from bascule.types import Epoch, WorkerId

SILENT_S = 1.1
"""Without a heartbeat for so long a worker's address is tried: they come each 0.5 s, and two may be late."""
_BETWEEN_S = 0.2
"""Between two refusals that are believed."""
_LATER = 0.5
"""Who does not refuse is tried again after this share of its silence so far: what is stopped accepts no connection by
itself, and must not find hundreds when it wakes."""
_MOST_AT_ONCE = 64


class Silence:
    """Tries silent workers' addresses, each in a task of its own; in the running event loop.

    Who is refused twice has no process there: a stopped one, and one that does not get to run, has its connections
    accepted by the kernel. No answer may be the network's doing, and says nothing; `--dead-after` is for that.
    """

    def __init__(
        self,
        clock: Clock,
        is_current: Callable[[WorkerId, Epoch], bool],
        lost: Callable[[WorkerId, str, Epoch], None],
    ) -> None:
        """`lost` is told of who has ended, and how that is known."""
        self._clock = clock
        self._is_current = is_current
        self._lost = lost
        self._trying: dict[Epoch, asyncio.Task[None]] = {}
        self._connections = asyncio.Semaphore(_MOST_AT_ONCE)

    def look(self, members: Iterable[Member]) -> None:
        """Begin with those that have become silent; only with such as could be connected to when they joined."""
        for member in members:
            if member.reached and self.is_silent(member) and member.epoch not in self._trying:
                self._begin(member)

    def close(self) -> None:
        for task in self._trying.values():
            task.cancel()

    def _begin(self, member: Member) -> None:
        task = self._trying[member.epoch] = asyncio.create_task(self._try(member))
        task.add_done_callback(lambda _: self._trying.pop(member.epoch))

    def is_silent(self, member: Member) -> bool:
        """Whether nothing was heard of it for longer than late heartbeats explain."""
        return self._clock.now() - member.last_seen > SILENT_S

    async def _try(self, member: Member) -> None:
        """Until it speaks, is no member any more, or is known to have ended."""
        address = member.registration.peer.address
        while self.is_silent(member) and self._is_current(member.id, member.epoch):
            if await self._has_ended(address) and self.is_silent(member):
                self._lost(member.id, f"has ended: it is silent, and nothing listens at {address}", member.epoch)
                return
            await asyncio.sleep(_LATER * (self._clock.now() - member.last_seen))

    async def _has_ended(self, address: str) -> bool:
        if not await self._refuses(address):
            return False
        await asyncio.sleep(_BETWEEN_S)
        return await self._refuses(address)

    async def _refuses(self, address: str) -> bool:
        async with self._connections:
            return await refuses(address)
