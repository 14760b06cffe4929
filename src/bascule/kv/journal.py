"""What has become findable in a cache, or ceased to be, since somebody last asked."""

from __future__ import annotations

from msgspec import Struct

from bascule.types import BlockHash


class Changes(Struct, frozen=True):
    """What is findable now and was not, and the other way round; no hash is in both."""

    stored: list[BlockHash]
    removed: list[BlockHash]


class Journal:
    """Net changes of a cache: what comes and goes between two drains leaves no trace.

    So however long nobody drains it, it is never longer than what the cache held then and holds now.
    """

    def __init__(self) -> None:
        # Dicts for their order: blocks of a prefix stay together.
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    def stored(self, name: BlockHash) -> None:
        """It was not findable, and now is."""
        if name in self._removed:
            del self._removed[name]
        else:
            self._stored[name] = None

    def removed(self, name: BlockHash) -> None:
        """It was findable, and no longer is."""
        if name in self._stored:
            del self._stored[name]
        else:
            self._removed[name] = None

    def drain(self) -> Changes:
        """Everything since the last time, which is thereby told."""
        changes = Changes(list(self._stored), list(self._removed))
        self.clear()
        return changes

    def clear(self) -> None:
        """Forget everything since the last time: it is told in another way."""
        self._stored.clear()
        self._removed.clear()
