"""Whether this worker can connect to the others: tried as they come, and again for as long as one cannot be reached;
and to who would join, when the router asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from bascule.link_wire import Neighbour, Neighbours, Reached, TryReach
from bascule.reach import first_unreachable
from bascule.types import WorkerId
from bascule.worker.parts import Identity

log = logging.getLogger(__name__)

_AGAIN_S = 5.0
_AT_ONCE = 8


class Reach:
    """Runs in the asyncio loop. A worker that has not been tried yet, or is not known, counts as reached."""

    def __init__(self, identity: Identity, send: Callable[[Reached], None]) -> None:
        """`send` takes what this worker answers the router."""
        self._identity = identity
        self._send = send
        self._answering: set[asyncio.Task[None]] = set()
        self.unreachable: dict[WorkerId, str] = {}
        """The address that does not answer, and why."""
        self.known: dict[WorkerId, Neighbour] = {}
        """The other workers there are, as the router tells."""
        self._untried: dict[WorkerId, Neighbour] = {}
        self._news = asyncio.Event()

    def told(self, message: Neighbours) -> None:
        """Workers have come, or gone."""
        for gone in message.gone:
            self._forget(gone)
        for neighbour in message.come:
            self._forget(neighbour.worker)
            self.known[neighbour.worker] = self._untried[neighbour.worker] = neighbour
        self._news.set()

    def forget_all(self) -> None:
        """The router is another one, and will tell anew."""
        for worker in list(self.known):
            self._forget(worker)

    def _forget(self, worker: WorkerId) -> None:
        for kept in (self.known, self._untried, self.unreachable):
            kept.pop(worker, None)

    def asked(self, question: TryReach) -> None:
        """Try and answer, unless many questions wait already."""
        if len(self._answering) < _AT_ONCE:
            self._answering.add(task := asyncio.create_task(self._answer(question)))
            task.add_done_callback(self._answering.discard)

    async def _answer(self, question: TryReach) -> None:
        why = await first_unreachable(question.addresses)
        who = self._identity
        self._send(Reached(worker=who.worker, epoch=who.epoch, question=question.question, unreachable=why or ""))

    async def watch(self) -> None:
        """Try those who are new, and now and then those who could not be reached, until cancelled."""
        try:
            while True:
                await self._try(await self._due())
        finally:
            for task in self._answering:
                task.cancel()

    async def _due(self) -> list[Neighbour]:
        """The next ones to try, as soon as there are any."""
        if not self._untried:
            self._news.clear()
            try:
                async with asyncio.timeout(_AGAIN_S if self.unreachable else None):
                    await self._news.wait()
            except TimeoutError:
                self._untried = {worker: self.known[worker] for worker in self.unreachable}
        return [self._untried.pop(worker) for worker in list(self._untried)[:_AT_ONCE]]

    async def _try(self, batch: Sequence[Neighbour]) -> None:
        found = await asyncio.gather(*(first_unreachable(neighbour.addresses) for neighbour in batch))
        for neighbour, why in zip(batch, found, strict=True):
            if self.known.get(neighbour.worker) is not neighbour:
                continue
            before = self.unreachable.pop(neighbour.worker, None)
            if why is not None:
                self.unreachable[neighbour.worker] = why
                if before is None:
                    log.warning("cannot connect to worker %s at %s", neighbour.worker, why)
            elif before is not None:
                log.info("worker %s can be reached now", neighbour.worker)
