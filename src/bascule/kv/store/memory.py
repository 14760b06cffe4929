"""The in-memory twin of the tiers: a dict with a bound, for tests and for whoever needs a store and has no place."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from threading import Lock

from bascule.kv.store.base import Blob, Fault, StoreStats, Tally, Use
from bascule.types import BlockHash, Tier


class MemoryStore:
    """At most `capacity` bytes of blocks in this process; the least recently used go first, however often they were."""

    def __init__(self, capacity: int, tier: Tier = Tier.HOST) -> None:
        self.tier = tier
        self.place = secrets.token_hex(16)
        self._capacity = capacity
        self._lock = Lock()
        self._tally = Tally()
        self._blocks: OrderedDict[BlockHash, bytes] = OrderedDict()
        self._bytes = 0
        self._closed = False

    def put(self, items: Mapping[BlockHash, Blob]) -> int:
        taken = 0
        with self._lock:
            if self._refuses(len(items)):
                return 0
            for name, data in items.items():
                self._remove(name)
                if len(data) > self._capacity:
                    self._tally.failed(Fault.FULL)
                    continue
                while self._bytes + len(data) > self._capacity:
                    self._remove(next(iter(self._blocks)))
                    self._tally.evicted(1)
                self._blocks[name] = bytes(data)
                self._bytes += len(data)
                taken += 1
        return taken

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        with self._lock:
            self._refuses(len(names))
            answers = [self._blocks.get(name) for name in names]
        self._tally.answered(answers)
        return answers

    def peek(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        with self._lock:
            return [self._blocks.get(name) for name in names]

    def holds(self, names: Sequence[BlockHash]) -> list[bool]:
        with self._lock:
            return [name in self._blocks for name in names]

    def touch(self, uses: Sequence[Use]) -> list[bool]:
        with self._lock:
            for use in sorted(uses, key=attrgetter("at")):
                if use.name in self._blocks:
                    self._blocks.move_to_end(use.name)
            return [use.name in self._blocks for use in uses]

    def names(self) -> Iterator[list[BlockHash]]:
        with self._lock:
            names = list(self._blocks)
        yield names

    def drop(self, names: Sequence[BlockHash]) -> None:
        with self._lock:
            for name in names:
                self._remove(name)

    def stats(self) -> StoreStats:
        with self._lock:
            return self._tally.stats(blocks=len(self._blocks), size=self._bytes, capacity=self._capacity)

    def check_integrity(self) -> list[str]:
        with self._lock:
            there = sum(map(len, self._blocks.values()))
            return [] if self._bytes == there else [f"{self._bytes} bytes are in the accounts, {there} there"]

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._bytes = 0

    def close(self) -> None:
        """The blocks go with it."""
        self.clear()
        self._closed = True

    def _refuses(self, blocks: int) -> bool:
        if self._closed:
            self._tally.failed(Fault.CLOSED, blocks)
        return self._closed

    def _remove(self, name: BlockHash) -> None:
        self._bytes -= len(self._blocks.pop(name, b""))
