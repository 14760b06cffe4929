"""The router's map from block hash to the workers and tiers that hold it: one lookup, every worker's longest prefix.

A worker that joins gets a *slot*, a bit position, and a block's holders are one integer: bit s is set where slot s has
it. A lookup follows the prompt's hashes with `run &= holders`, and notes where the run shrinks:

    block       0     1     2     3
    holders   1110  1110  0110  0010       slot 1: 4 blocks, slot 2: 3, slot 3: 2 (slot 0 is nobody's)
    run       1110  1110  0110  0010

Integers are shared wherever blocks have the same holders, so that a block costs its key and a place in a dict.

Nobody walks over a million blocks because a worker left: its slot is *retired*, which lookups ignore at once, swept out
a little at a time, and given to another worker only when no block names it any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from heapq import heappop, heappush
from operator import or_, xor
from struct import iter_unpack

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.kv.expectations import Expectations
from bascule.kv.hashing import HASH_BYTES
from bascule.types import BlockHash, Tier

Blocks = NDArray[np.int32]
"""Numbers of blocks, by row."""

SHARDS = 256
"""Dicts that a tier's blocks lie in, by the first byte of the hash: growing or sweeping one of them takes no time."""
_NOBODY = 0
"""The slot that no worker ever gets; rows without a worker have it."""
_EXPECTED_S = 10.0
_FEW = 16
"""Rows for which arrays cost more than they save."""

_Shards = list[dict[BlockHash, int]]


class Match(Struct, frozen=True):
    """How many leading blocks of a prompt each row's worker has."""

    tiers: Mapping[Tier, Blocks]
    """Blocks to be had without going below a tier: each lies in that tier or in a faster one."""

    @property
    def device(self) -> Blocks:
        """Blocks that are on the device, or will be when what was placed there is computed."""
        return self.tiers[Tier.DEVICE]


@dataclass
class Recount:
    """What lies in the shards that have been looked at, by the integer of a block's holders."""

    counts: dict[Tier, Counter[int]] = field(default_factory=dict)
    digests: dict[int, int] = field(default_factory=dict)
    """Of the blocks on the device: their hashes, taken as numbers, xored."""


class _Holder:
    """One worker: its slot, and how many blocks it may have and has in each tier."""

    __slots__ = ("bit", "capacity", "held", "slot")

    def __init__(self, slot: int, bit: int, capacity: Mapping[Tier, int]) -> None:
        self.slot = slot
        self.bit = bit
        self.capacity = capacity
        self.held = dict.fromkeys(capacity, 0)


class PrefixIndex:
    """Which rows' workers have which blocks. Rows are the caller's, and may be used again once a worker has left.

    Not thread-safe. Memory is bounded by what the workers say they can hold, and as much again for expectations.
    """

    def __init__(self, expected_s: float = _EXPECTED_S) -> None:
        """`expected_s` seconds after a placement its blocks no longer count unless the worker has them."""
        self._tiers: dict[Tier, _Shards] = {Tier.DEVICE: [{} for _ in range(SHARDS)]}
        """The device, and those that have ever held a block."""
        self._holders: dict[int, _Holder] = {}
        self._slots = np.zeros(0, np.int64)
        """By row."""
        self.changes = 0
        """Goes up with whatever changes what blocks are held, or by whom."""
        self._live = 0
        """The bits of all workers that are here."""
        self._expected = Expectations(expected_s)
        self._free: list[int] = []
        """A heap of slots that nobody has and no block names."""
        self._bits = [0]
        """By slot, the one integer that all blocks share that nobody else has."""
        self._retired: dict[int, int] = {}
        """Slots that some block may name still, and how many shards are yet to be swept for each."""
        self._cursor = 0
        """The shard to be swept next."""

    @property
    def blocks(self) -> int:
        """Blocks that workers have, in all tiers; one that two workers have counts twice."""
        return sum(sum(holder.held.values()) for holder in self._holders.values())

    @property
    def expected(self) -> int:
        """Blocks that workers are expected to have and have not confirmed."""
        return len(self._expected)

    # ------------------------------------------------------------ workers

    def join(self, row: int, capacity: Mapping[Tier, int]) -> None:
        """A worker without blocks takes a row; `capacity` is the most that it can hold in each tier that it has."""
        if row in self._holders:
            raise ValueError(f"row {row} has a worker already")
        if row >= len(self._slots):
            self._slots = np.concatenate([self._slots, np.full(row + 1, _NOBODY)])
        self._settle_in(row, capacity)

    def leave(self, row: int) -> None:
        """The worker is gone, and all that it held."""
        self.changes += 1
        holder = self._holders.pop(row)
        self._expected.clear(holder.bit)
        self._give_up_slot(holder)
        self._slots[row] = _NOBODY

    def clear(self, row: int) -> None:
        """What is known of this worker's blocks is void; it tells all again. What is expected of it stays."""
        holder = self._holders[row]
        if not any(holder.held.values()):
            return
        self._give_up_slot(holder)
        self._expected.move(holder.bit, self._settle_in(row, holder.capacity).bit)

    def _settle_in(self, row: int, capacity: Mapping[Tier, int]) -> _Holder:
        """Give the row's worker a slot that no block names."""
        self.changes += 1
        if not self._free:
            self._free.append(len(self._bits))
            self._bits.append(1 << len(self._bits))
        slot = heappop(self._free)
        holder = self._holders[row] = _Holder(slot, self._bits[slot], capacity)
        self._slots[row] = slot
        self._live |= holder.bit
        return holder

    def _give_up_slot(self, holder: _Holder) -> None:
        self._live &= ~holder.bit
        if any(holder.held.values()):
            self._retired[holder.slot] = SHARDS
        else:
            heappush(self._free, holder.slot)

    # ------------------------------------------------------------ blocks

    def store(self, row: int, tier: Tier, hashes: bytes) -> bool:
        """The worker has these blocks (16 bytes each, one after another) in `tier`.

        False if they are more than it can hold: then what it says cannot be right, and only `clear` helps. Raises
        ValueError for bytes that are no hashes.
        """
        names = _unpacked(hashes)
        if not names:
            return True
        holder = self._holders[row]
        room = holder.capacity.get(tier, 0)
        if len(names) > room:
            return False
        self.changes += 1
        if tier is Tier.DEVICE:
            self._expected.settle(holder.bit, names)
        if tier not in self._tiers:
            self._tiers[tier] = [{} for _ in range(SHARDS)]
        shards = self._tiers[tier]
        bit, added = holder.bit, 0
        before, after = 0, bit
        for name in names:
            shard = shards[name[0]]
            holders = shard.get(name, 0)
            if holders != before:
                before, after = holders, holders | bit
            if holders & bit:
                continue
            shard[name] = after
            added += 1
        holder.held[tier] += added
        return holder.held[tier] <= room

    def room(self, row: int, tier: Tier) -> int | None:
        """How many blocks more the worker can have in a tier; None where it has no such tier."""
        holder = self._holders[row]
        return holder.capacity[tier] - holder.held[tier] if tier in holder.capacity else None

    def remove(self, row: int, tier: Tier, hashes: bytes) -> None:
        """The worker no longer has these blocks in `tier`. Raises ValueError for bytes that are no hashes."""
        names = _unpacked(hashes)
        holder = self._holders[row]
        if tier is Tier.DEVICE:
            self._expected.settle(holder.bit, names)
        shards = self._tiers.get(tier)
        if shards is None:
            return
        self.changes += 1
        bit, removed = holder.bit, 0
        before = after = 0
        for name in names:
            shard = shards[name[0]]
            holders = shard.get(name, 0)
            if not holders & bit:
                continue
            if holders != before:
                before, after = holders, self._shared(holders ^ bit)
            if after:
                shard[name] = after
            else:
                del shard[name]
            removed += 1
        if removed:
            holder.held[tier] -= removed

    def expect(self, row: int, hashes: Sequence[BlockHash], now: float) -> None:
        """A prompt with these blocks was placed on the row's worker at `now` (s), which will have them soon."""
        holder = self._holders[row]
        shards = self._tiers[Tier.DEVICE]
        absent = [name for name in hashes if not shards[name[0]].get(name, 0) & holder.bit]
        self._expected.add(holder.bit, absent, now, holder.capacity.get(Tier.DEVICE, 0))

    def expire(self, now: float) -> None:
        """Forget expectations that have not come true in time."""
        self._expected.expire(now)

    def _shared(self, holders: int) -> int:
        """The same integer, and the same object where it names one holder or none."""
        return holders if holders & (holders - 1) else self._bits[max(holders.bit_length() - 1, _NOBODY)]

    # ------------------------------------------------------------ lookup

    def match(self, hashes: Sequence[BlockHash]) -> Match:
        """Every worker's longest prefix of a prompt, given as its chained block hashes."""
        if len(self._tiers) == 1:
            return Match(dict.fromkeys(Tier, self._longest(self._on_device(hashes), len(hashes))))
        found: dict[Tier, Blocks] = {}
        holders = list(self._on_device(hashes))
        for tier in Tier:
            if (shards := self._tiers.get(tier)) is not None:
                if tier is not Tier.DEVICE:
                    here = [shards[name[0]].get(name, 0) for name in hashes]
                    holders = [ours | theirs if theirs else ours for ours, theirs in zip(holders, here, strict=True)]
                blocks = self._longest(holders, len(hashes))
            found[tier] = blocks
        return Match(found)

    def has(self, row: int, hashes: Sequence[BlockHash], tiers: Sequence[Tier]) -> int:
        """How many leading blocks the worker itself has said to have in any of `tiers`."""
        bit, depth = self._holders[row].bit, 0
        first, *others = [self._tiers[tier] for tier in tiers if tier in self._tiers]
        for name in hashes:
            if not first[name[0]].get(name, 0) & bit and not any(each[name[0]].get(name, 0) & bit for each in others):
                break
            depth += 1
        return depth

    def _on_device(self, hashes: Sequence[BlockHash]) -> Iterator[int]:
        """Who has each block on the device, or is expected to."""
        shards, expected = self._tiers[Tier.DEVICE], self._expected.masks
        if not expected:
            return (shards[name[0]].get(name, 0) for name in hashes)
        return (shards[name[0]].get(name, 0) | expected.get(name, 0) for name in hashes)

    def _longest(self, holders: Iterable[int], count: int) -> Blocks:
        """By row: how many of the `count` blocks, from the first on, it holds without a gap."""
        run, last = self._live, -1
        runs: list[int] = []
        ends = [0]
        for depth, holding in enumerate(holders):
            if holding is last:
                continue
            last = holding
            rest = run & holding
            if rest != run:
                runs.append(run)
                ends.append(depth)
                run = rest
                if not rest:
                    break
        else:
            runs.append(run)
            ends.append(count)
        return self._by_row(runs, ends)

    def _by_row(self, runs: list[int], ends: list[int]) -> Blocks:
        """Runs only ever shrink, so a slot that is in the first n of them came as far as `ends[n]`."""
        if len(self._slots) <= _FEW:
            each = [ends[sum([run >> slot & 1 for run in runs])] for slot in self._slots.tolist()]
            blocks = np.array(each, np.int32)
        else:
            width = -(-len(self._bits) // 8)
            packed = np.frombuffer(b"".join([run.to_bytes(width, "little") for run in runs]), np.uint8)
            bits = np.unpackbits(packed.reshape(len(runs), width), axis=1, bitorder="little")
            counts = bits.sum(axis=0, dtype=np.uint8 if len(runs) < 256 else np.uint32)
            blocks = np.array(ends, np.int32)[counts[self._slots]]
        blocks.flags.writeable = False
        return blocks

    # ------------------------------------------------------------ sweeping

    def sweep(self, most: int) -> None:
        """Clear retired slots out of about `most` blocks, at least of one shard; call it now and then."""
        self.changes += bool(self._retired)
        seen = 0
        while self._retired and (not seen or seen < most):
            seen += 1 + self._sweep_shard(self._cursor)
            self._cursor = (self._cursor + 1) % SHARDS
            for slot in list(self._retired):
                self._retired[slot] -= 1
                if not self._retired[slot]:
                    del self._retired[slot]
                    heappush(self._free, slot)

    def _sweep_shard(self, number: int) -> int:
        """Returns how many blocks were looked at."""
        gone = sum(1 << slot for slot in self._retired)
        seen = 0
        for shards in self._tiers.values():
            shard = shards[number]
            seen += len(shard)
            touched = [(name, holders) for name, holders in shard.items() if holders & gone]
            for name, holders in touched:
                if rest := self._shared(holders & ~gone):
                    shard[name] = rest
                else:
                    del shard[name]
            if len(touched) > len(shard):
                # A dict does not shrink by itself.
                shards[number] = dict(shard)
        return seen

    # ------------------------------------------------------------ audit

    def check_integrity(self) -> list[str]:
        """Recount everything; every line names something that does not add up. Empty means clean."""
        recount = Recount()
        for shard in range(SHARDS):
            self.recount(shard, recount)
        return self.wrong(recount)

    def recount(self, shard: int, into: Recount) -> int:
        """Count one shard; returns how many blocks were looked at."""
        seen = 0
        for tier, shards in self._tiers.items():
            seen += len(shards[shard])
            into.counts.setdefault(tier, Counter()).update(shards[shard].values())
        digests = into.digests
        for name, holders in self._tiers[Tier.DEVICE][shard].items():
            digests[holders] = digests.get(holders, 0) ^ int.from_bytes(name, "little")
        return seen

    def digest(self, row: int, recount: Recount) -> bytes:
        """Of the blocks that the row's worker has on the device, as `BlockDigest` has it."""
        bit = self._holders[row].bit
        held = (digest for holders, digest in recount.digests.items() if holders & bit)
        return reduce(xor, held, 0).to_bytes(HASH_BYTES, "little")

    def wrong(self, recount: Recount) -> list[str]:
        """What does not add up, by a recount of all shards; every line names something."""
        return [*self._wrong_counts(recount), *self._wrong_slots(recount), *self._expected.check_integrity()]

    def _wrong_counts(self, recount: Recount) -> Iterator[str]:
        for row, holder in self._holders.items():
            for tier, held in holder.held.items():
                counts = recount.counts.get(tier, Counter())
                counted = sum(count for holders, count in counts.items() if holders & holder.bit)
                if counted != held:
                    yield f"row {row} has {counted} blocks in tier {tier} and counts {held}"

    def _wrong_slots(self, recount: Recount) -> Iterator[str]:
        slots = [holder.slot for holder in self._holders.values()] + list(self._retired) + self._free
        if sorted(slots) != list(range(_NOBODY + 1, len(self._bits))):
            yield f"of {len(self._bits)} slots, these are held, retired or free: {sorted(slots)}"
        if self._live != sum(holder.bit for holder in self._holders.values()):
            yield f"the workers' slots are {self._live:b}, which is not what they have"
        named = reduce(or_, (holders for counts in recount.counts.values() for holders in counts), 0)
        if named & ~self._live & ~sum(1 << slot for slot in self._retired):
            yield "a block names a slot that nobody has"


def _unpacked(hashes: bytes) -> list[BlockHash]:
    if len(hashes) % HASH_BYTES:
        raise ValueError(f"{len(hashes)} bytes are no block hashes of {HASH_BYTES} bytes each")
    return [name for (name,) in iter_unpack(f"{HASH_BYTES}s", hashes)]
