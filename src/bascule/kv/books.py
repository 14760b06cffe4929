"""Who holds which block: the allocator of an arena's blocks, and its prefix cache. What owns them is in `lease.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from threading import RLock

import numpy as np
from msgspec import Struct

from bascule.kv.journal import Changes, Journal
from bascule.kv.lease import CachedBlock, Lease, LeaseError, LeaseState
from bascule.kv.placement import Mask, place, reach
from bascule.policies.evict import EvictionOrder
from bascule.types import BlockHash

__all__ = ["Books", "CachedBlock", "Counts", "Lease", "LeaseError"]

_NOBODY = 0


class Counts(Struct, frozen=True):
    """How many blocks are in each of the four states; they add up to all blocks."""

    free: int
    cached: int
    """Held by nobody, findable by hash, evictable."""
    held: int
    """Named by at least one lease."""
    quarantined: int
    """Out of use, because a peer may still write there."""


class Books:
    """The states of `num_blocks` blocks of `block_size` tokens. Thread-safe; no call waits for more than bookkeeping.

    A block is free, cached, held (by as many leases as name it) or quarantined. Blocks enter the cache only by
    `Lease.seal` and leave it by eviction, in the order of `policies.evict`: the end of a prefix before its beginning.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"books need at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.mismatches = 0
        """Blocks found by hash that held other tokens: misses."""
        self.evictions = 0
        self.high_water = 0
        """Every block that has ever been leased is below this one."""
        self._lock = RLock()
        self._free = np.ones(num_blocks, np.bool_)
        self._room_of = np.full(num_blocks, _NOBODY, np.int64)
        """The number of the lease that a free block is kept for, softly."""
        self._holders = [0] * num_blocks
        self._quarantined: set[int] = set()
        self._by_hash: dict[BlockHash, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}
        self._journal = Journal()
        self._evictable = EvictionOrder(num_blocks)
        """Cached blocks, the next to be evicted first."""
        self._leases: dict[int, Lease] = {}
        """Those held or quarantined, by number."""
        self._last_number = _NOBODY

    @property
    def counts(self) -> Counts:
        with self._lock:
            free, cached, quarantined = self._count_free(), len(self._evictable), len(self._quarantined)
            return Counts(free, cached, self.num_blocks - free - cached - quarantined, quarantined)

    def changes(self) -> Changes:
        """What has become findable, or ceased to be, since the last `changes` or `inventory`."""
        with self._lock:
            return self._journal.drain()

    def inventory(self) -> tuple[list[BlockHash], Changes]:
        """All that is findable, and the `changes` that led there; the next ones are those made to it."""
        with self._lock:
            return list(self._by_hash), self._journal.drain()

    def peek(self, names: Sequence[BlockHash]) -> list[CachedBlock]:
        """Those of `names` that are in the cache; pins nothing, so what is read there counts only if `unchanged`."""
        with self._lock:
            return [entry for name in names if (entry := self._by_hash.get(name)) is not None]

    def unchanged(self, entries: Sequence[CachedBlock]) -> list[bool]:
        """Whether each of what `peek` gave has been in its block all the time since: no one writes a cached block."""
        with self._lock:
            return [self._by_hash.get(entry.hash) is entry for entry in entries]

    def acquire(self, hashes: Sequence[BlockHash], tokens: Sequence[int], total: int, room: int = 0) -> Lease | None:
        """Lease `total` blocks: the longest cached prefix of `hashes`, then fresh ones. None if there are not enough.

        `tokens` are the prompt's ids; those of a block must equal the ids cached with it, else it is a miss. Whoever
        needs the last prompt token computed leaves its block out of `hashes`. Fresh blocks are free ones, then evicted
        ones. `room` foresees growth: as many blocks behind the last are freed and kept where possible; others get them
        only when nothing else is left.
        """
        with self._lock:
            pinned = self._cached_prefix(hashes[:total], tokens)
            needed = total - len(pinned)
            idle = sum(1 for block in pinned if not self._holders[block])
            if needed > self._count_free() + len(self._evictable) - idle:
                return None
            self._last_number += 1
            lease = Lease(self, self._last_number, pinned, room)
            self._leases[self._last_number] = lease
            for block in pinned:
                self._holders[block] += 1
            self._evictable.use(pinned)
            self._grow(lease, needed)
            return lease

    def count_cached(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of `hashes` are in the cache now; by hash alone, so an estimate, and pins nothing."""
        with self._lock:
            return next((index for index, name in enumerate(hashes) if name not in self._by_hash), len(hashes))

    def _count_free(self) -> int:
        return int(np.count_nonzero(self._free))

    def _cached_prefix(self, hashes: Sequence[BlockHash], tokens: Sequence[int]) -> list[int]:
        found: list[int] = []
        for index, name in enumerate(hashes):
            entry = self._by_hash.get(name)
            if entry is None:
                break
            if entry.tokens != tuple(tokens[index * self.block_size : (index + 1) * self.block_size]):
                self.mismatches += 1
                break
            found.append(entry.block)
        return found

    def _grow(self, lease: Lease, count: int) -> None:
        """Append `count` fresh blocks, of which there are enough, and keep the lease's room behind them."""
        behind = lease._blocks[-1] if lease._blocks else None
        usable = self._usable(lease)
        if behind is None or reach(usable, behind + 1, count) < count:
            shortage = count + lease._room - int(np.count_nonzero(usable))
            if shortage > 0:
                self._evict(shortage)
                usable = self._usable(lease)
        chosen = place(usable, count, lease._room, behind)
        if len(chosen) < count:
            kept_for_others = np.flatnonzero(self._free & ~usable)
            chosen.extend(kept_for_others[len(chosen) - count :].tolist())
        self._free[chosen] = usable[chosen] = False
        self._room_of[chosen] = _NOBODY
        self.high_water = max(self.high_water, *(block + 1 for block in chosen), 0)
        for block in chosen:
            self._holders[block] = 1
        lease._blocks.extend(chosen)
        if lease._blocks:
            start = lease._blocks[-1] + 1
            lease._kept = range(start, start + reach(usable, start, lease._room))
            self._room_of[lease._kept.start : lease._kept.stop] = lease._number

    def _usable(self, lease: Lease) -> Mask:
        """Free blocks that are not kept for other leases."""
        usable: Mask = self._free & ((self._room_of == _NOBODY) | (self._room_of == lease._number))
        return usable

    def _share(self, block: int) -> None:
        """One hold more of a cached block: it has been used again."""
        self._holders[block] += 1
        self._evictable.use((block,))

    def _give_up(self, block: int) -> None:
        """Free a block that is not findable and that one lease holds."""
        self._holders[block] = 0
        self._free[block] = True

    def _give_up_room(self, lease: Lease) -> None:
        window = self._room_of[lease._kept.start : lease._kept.stop]
        window[window == lease._number] = _NOBODY
        lease._kept = range(0)

    def _evict(self, count: int) -> None:
        """Free `count` cached blocks, or all if there are fewer."""
        for block in self._evictable.pop(count):
            name = self._by_block.pop(block).hash
            del self._by_hash[name]
            self._journal.removed(name)
            self._free[block] = True
            self.evictions += 1

    def _let_go(self, blocks: Sequence[int], copies: Mapping[int, CachedBlock]) -> None:
        """Drop one hold of each block: sealed ones may be evicted from now on, the end of the prefix first.

        A block with `copies` holds what another is found by. It takes that one's place if it is gone; else that one has
        been used now. So no suffix stays behind without its prefix, nor is younger than it, if leases are sealed from
        their beginning on. Whoever seals an end before what comes in front of it leaves one that is found when that
        comes, and is evicted in its turn if it does not.
        """
        holders, by_block, run = self._holders, self._by_block, list[int]()
        for block in reversed(blocks):
            holders[block] = left = holders[block] - 1
            if left:
                continue
            if block in by_block:
                run.append(block)
            elif block in copies:
                found = self._by_hash.get(copies[block].hash) or self._enter(copies[block])
                self._evictable.use((found.block,))
                self._free[block] = found.block != block
                if not holders[found.block]:
                    run.append(found.block)
            else:
                self._free[block] = True
        self._evictable.offer(run)

    def _enter(self, entry: CachedBlock) -> CachedBlock:
        """Make a block findable under a hash that nothing is found by."""
        self._by_hash[entry.hash] = self._by_block[entry.block] = entry
        self._journal.stored(entry.hash)
        return entry

    def check_integrity(self) -> list[str]:
        """Recompute everything from the leases; every line returned names a lie in the books. Empty means clean."""
        with self._lock:
            return [*self._wrong_holds(), *self._wrong_states(), *self._wrong_cache(), *self._wrong_room()]

    def _wrong_holds(self) -> Iterator[str]:
        naming = np.zeros(self.num_blocks, np.int64)
        quarantined: Counter[int] = Counter()
        for lease in self._leases.values():
            if lease._state is LeaseState.HELD:
                np.add.at(naming, np.asarray(lease._blocks, np.intp), 1)
            else:
                quarantined.update(lease._blocks)
            if lease._state is LeaseState.RELEASED:
                yield f"{lease} is released but still in the books"
            if len(set(lease._blocks)) < len(lease._blocks):
                yield f"{lease} names a block twice"
        for block in np.flatnonzero(np.asarray(self._holders) != naming):
            yield f"block {block} counts {self._holders[block]} holders, but {naming[block]} leases name it"
        if self._quarantined != set(quarantined) or quarantined.total() != len(quarantined):
            yield f"quarantined are {sorted(self._quarantined)}, but leases quarantine {sorted(quarantined.elements())}"

    def _wrong_states(self) -> Iterator[str]:
        states = self._free.astype(np.int64)
        states += np.asarray(self._holders) > 0
        states[list(self._evictable)] += 1
        states[list(self._quarantined)] += 1
        for block in np.flatnonzero(states != 1):
            yield f"block {block} is in {states[block]} states" if states[block] else f"block {block} has leaked"

    def _wrong_cache(self) -> Iterator[str]:
        if len(self._by_hash) != len(self._by_block):
            yield f"{len(self._by_hash)} hashes name {len(self._by_block)} blocks"
        for block, entry in self._by_block.items():
            if entry.block != block or self._by_hash.get(entry.hash) is not entry:
                yield f"block {block} and its hash {entry.hash.hex()} do not name each other"
            if not self._holders[block] and block not in self._evictable:
                yield f"block {block} is findable but neither held nor cached"
        for block in self._evictable:
            if block not in self._by_block:
                yield f"block {block} is cached but not findable"
        yield from self._evictable.check_integrity(self._by_block)

    def _wrong_room(self) -> Iterator[str]:
        for block in np.flatnonzero(self._room_of != _NOBODY):
            lease = self._leases.get(int(self._room_of[block]))
            rightful = lease is not None and lease._state is LeaseState.HELD and block in lease._kept
            if not rightful or not self._free[block]:
                yield f"block {block} is kept for lease {self._room_of[block]} which cannot have it"
