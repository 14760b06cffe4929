"""Tells the router what this worker's cache holds: everything once, then what changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bascule.kv.books import Books
from bascule.kv.hashing import BlockDigest
from bascule.kv.journal import Changes
from bascule.types import BlockHash, Epoch, Tier, WorkerId
from bascule.wire import KvEvents, TierChanges

REPORT_S = 0.05
"""Seconds between reports: often enough for prompts that follow each other, and few messages for many workers."""
MOST_BLOCKS = 4096
"""Hashes in one message, so that the router never spends more than a few milliseconds over one."""


class KvReporter:
    """Numbers and sends the changes of a worker's books. Runs in the asyncio loop, so that numbers go out in order."""

    def __init__(
        self,
        worker: WorkerId,
        epoch: Epoch,
        books: Books,
        send: Callable[[KvEvents], None],
        on_stored: Callable[[Sequence[BlockHash]], None] = lambda _: None,
    ) -> None:
        """`on_stored` is told, too, of what has become findable on the device: once, however often the router asks."""
        self.sequence = 0
        """Of the last message."""
        self._told = BlockDigest()
        """Of the device's blocks that the router has been told of."""
        self._on_stored = on_stored
        self._worker = worker
        self._epoch = epoch
        self._books = books
        self._send = send
        self._listening = False
        """Whether the router has asked for the worker's changes, by registering it."""

    @property
    def told(self) -> tuple[int, bytes]:
        """The number of the last message, and a digest of the device's blocks as the router has them from these."""
        return self.sequence, self._told.value

    def tell_all(self) -> None:
        """The router knows nothing, or nothing for sure."""
        self._listening = True
        names, changes = self._books.inventory()
        self._tell(Changes(names, []), anew=True)
        self._on_stored(changes.stored)

    def tell_changes(self) -> None:
        """Send what has changed since the last report, if anything has."""
        if self._listening:
            changes = self._books.changes()
            self._tell(changes, anew=False)
            self._on_stored(changes.stored)

    def tell(self, tier: Tier, stored: Sequence[BlockHash], removed: Sequence[BlockHash] = ()) -> None:
        """Blocks have come into a tier below the device or were found there, others were found missing."""
        if self._listening:
            for names in _parts(removed):
                self._message(TierChanges(tier, b"", b"".join(names)), anew=False)
            for names in _parts(stored):
                self._message(TierChanges(tier, b"".join(names), b""), anew=False)

    def pause(self) -> None:
        """The router does not know this worker any more; say nothing until it wants to hear all."""
        self._listening = False

    def _tell(self, changes: Changes, *, anew: bool) -> None:
        if anew:
            self._told = BlockDigest()
        self._told.toggle(changes.removed)
        self._told.toggle(changes.stored)
        # First what went: the other way round a full cache would seem to hold more than it can.
        for names in _parts(changes.removed):
            self._message(TierChanges(Tier.DEVICE, b"", b"".join(names)), anew=False)
        parts = _parts(changes.stored)
        if anew and not parts:
            parts = [()]
        for names in parts:
            self._message(TierChanges(Tier.DEVICE, b"".join(names), b""), anew=anew)
            anew = False

    def _message(self, changes: TierChanges, *, anew: bool) -> None:
        self.sequence += 1
        self._send(
            KvEvents(worker=self._worker, epoch=self._epoch, sequence=self.sequence, anew=anew, changes=(changes,))
        )


def _parts(names: Sequence[BlockHash]) -> list[Sequence[BlockHash]]:
    return [names[start : start + MOST_BLOCKS] for start in range(0, len(names), MOST_BLOCKS)]
