"""The tiers below one arena, fastest first: what they hold of a prompt, and blocks on their way down and up."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from threading import Lock

from msgspec import Struct
from msgspec.structs import replace

from bascule.kv.arena import Arena
from bascule.kv.books import Books, CachedBlock
from bascule.kv.store.base import Store, StoreStats, Use
from bascule.kv.store.description import description_name, is_description
from bascule.kv.store.forms import Forms
from bascule.kv.store.record import InvalidRecord, Payload, inspect, model_digest, name_in_tiers, pack, unpack
from bascule.policies.load import UNMEASURED
from bascule.types import BlockHash, LinkCost, Salt, Tier

BATCH = 16
"""Blocks in one call of a store: large enough to be quick, small enough for what comes behind it not to wait long."""
_FORGOTTEN_S = 60.0
"""After this, half of what was measured still counts, the other half being what is assumed of such a tier."""
_LEARNT = 0.5
"""How much the latest load counts in what a tier is said to cost."""
_DESCRIBED_S = 60.0
"""Between two looks at a tier's description of the model."""
_ASSUMED_BYTES = 1 << 16
"""As if so much had been read at the rate that is assumed of a tier."""


class Wanted(Struct, frozen=True):
    """One block to be loaded: its name, its tokens, the block of the arena that it goes to, and the salt that it was
    hashed with."""

    name: BlockHash
    tokens: tuple[int, ...]
    block: int
    salt: Salt = b""


class Saved(Struct, frozen=True):
    """What a tier made of blocks that were not there."""

    taken: Mapping[BlockHash, int]
    """And the bytes of their records."""
    refused: Sequence[BlockHash]
    """Of these some may be there."""


class _Slowness(Struct, frozen=True):
    times: float
    """Longer than assumed."""
    measured_at: float


class _Reads(Struct, frozen=True):
    """Records that a tier has given lately, what is longer ago counting less."""

    bytes: float = 0.0
    seconds: float = 0.0
    at: float = 0.0


class TierFigures(Struct):
    """What has gone up and down between one tier and the arena."""

    loaded_blocks: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    saved_blocks: int = 0
    saved_bytes: int = 0
    invalid: Counter[str] = {}  # type: ignore[assignment]
    """Blocks that were not what they should have been, by reason."""


class Tiers:
    """Blocks between an arena and the stores below it. Thread-safe; nothing here raises for what a store does.

    What a store gives back is used only if its record says that it is this model's KV of these very tokens, whole and
    unaltered; else it is dropped from there, counted, and looked for one tier further down.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        arena: Arena,
        books: Books,
        fingerprint: str,
        forms: Forms,
        now: Callable[[], float] = time.perf_counter,
        description: bytes | None = None,
    ) -> None:
        """`stores` from the fastest to the slowest, of different tiers; they are closed with this. `description` is
        kept beside the model's blocks (`description.describe`)."""
        self.stores = {store.tier: store for store in stores}
        self.figures = {tier: TierFigures(invalid=Counter()) for tier in self.stores}
        self._slowness: dict[Tier, _Slowness] = {}
        self._reads: dict[Tier, _Reads] = dict.fromkeys(self.stores, _Reads())
        self._arena = arena
        self._books = books
        self._fingerprint = fingerprint
        self._forms = forms
        self._now = now
        self._description = description
        self._described: dict[Tier, float] = {}
        """When each tier's was last looked after."""
        self._lock = Lock()
        self._scrubbing: dict[Tier, Iterator[BlockHash]] = {}
        """What is left of a tier's blocks to be looked at, in this round."""

    def costs(self) -> dict[Tier, LinkCost]:
        """What loading from each tier has lately taken, checks included."""
        with self._lock:
            return {tier: self._cost(tier) for tier in self.stores}

    @property
    def least_block_bytes(self) -> int:
        """Of a block in the form that takes least."""
        return self._forms.least_bytes

    def _cost(self, tier: Tier) -> LinkCost:
        guess, times = UNMEASURED[tier], self._times(tier)
        return LinkCost(guess.latency_s * times, guess.bytes_per_s / times)

    def _times(self, tier: Tier) -> float:
        """How many times longer than assumed it takes. What was measured long ago counts less: a tier that was slow
        once has to be tried again."""
        if (slowness := self._slowness.get(tier)) is None:
            return 1.0
        return math.pow(slowness.times, self._trust(slowness.measured_at))

    def _trust(self, measured_at: float) -> float:
        return float(0.5 ** ((self._now() - measured_at) / _FORGOTTEN_S))

    def _rate(self, tier: Tier) -> float:
        """Bytes of records a second that it gives. Not those of KV: what a codec makes of a slow tier is no reason to
        do without the codec."""
        reads, guess = self._reads[tier], UNMEASURED[tier].bytes_per_s
        trust = self._trust(reads.at)
        return (reads.bytes * trust + _ASSUMED_BYTES) / (reads.seconds * trust + _ASSUMED_BYTES / guess)

    # ------------------------------------------------------------ up

    def within(self, seconds: float) -> list[Tier]:
        """The tiers that have anything to give in that time, the fastest first."""
        return [tier for tier, cost in self.costs().items() if cost.latency_s <= seconds]

    def find(self, names: Sequence[BlockHash], tiers: Sequence[Tier]) -> list[Tier | None]:
        """The fastest of `tiers` that has each block; None where none of them does."""
        found: list[Tier | None] = [None] * len(names)
        for tier in tiers:
            if missing := [index for index, source in enumerate(found) if source is None]:
                there = self.stores[tier].holds([name_in_tiers(names[index]) for index in missing])
                for index, held in zip(missing, there, strict=True):
                    found[index] = tier if held else None
        return found

    def load(
        self,
        wanted: Sequence[Wanted],
        run: Sequence[Tier],
        may_write: Callable[[], bool] = lambda: True,
        moved: Counter[Tier] | None = None,
    ) -> list[Tier]:
        """Write blocks to the arena, `run` being the first tier to look in for each; returns where each came from.
        `moved` counts the bytes of their records.

        Ends with the first block that no tier gives; what lies in the arena's blocks from there on is undefined.
        `may_write` is asked whenever a store has answered; once it says no, nothing more is written.
        """
        came: list[Tier] = []
        for tier, group in groupby(zip(wanted, run, strict=True), key=lambda pair: pair[1]):
            part = [each for each, _ in group]
            for start in range(0, len(part), BATCH):
                batch = part[start : start + BATCH]
                sources = self._load_batch(batch, tier, may_write, Counter() if moved is None else moved)
                came += sources
                if len(sources) < len(batch):
                    return came
        return came

    def _load_batch(
        self, batch: Sequence[Wanted], first: Tier, may_write: Callable[[], bool], moved: Counter[Tier]
    ) -> list[Tier]:
        """The blocks of a batch from one tier, and one by one from those below it where it fails."""
        sources: list[Tier | None] = [None] * len(batch)
        tiers = list(self.stores)
        for tier in tiers[tiers.index(first) :]:
            left = [index for index, source in enumerate(sources) if source is None]
            loaded = self._load_from(tier, [batch[index] for index in left], may_write, moved)
            for index, good in zip(left, loaded, strict=True):
                if good:
                    sources[index] = tier
            if None not in sources:
                break
        whole = sources.index(None) if None in sources else len(sources)
        return [source for source in sources[:whole] if source is not None]

    def _load_from(
        self, tier: Tier, batch: Sequence[Wanted], may_write: Callable[[], bool], moved: Counter[Tier]
    ) -> list[bool]:
        begun = self._now()
        store = self.stores[tier]
        good, invalid, size = [False] * len(batch), [], 0
        names = [name_in_tiers(each.name) for each in batch]
        answers = store.get(names)
        self._gave(tier, sum(len(data) for data in answers if data is not None), self._now() - begun)
        if not may_write():
            return good
        for index, (each, data) in enumerate(zip(batch, answers, strict=True)):
            if data is None:
                continue
            try:
                payload = unpack(names[index], self._fingerprint, each.tokens, data, each.salt)
                self._forms.decode(payload, self._arena.bytes[:, each.block : each.block + 1])
            except InvalidRecord as error:
                invalid.append((names[index], error.reason))
            else:
                good[index] = True
                size += len(data)
        moved[tier] += size
        self._loaded(tier, sum(good), size, self._now() - begun, Counter(reason for _, reason in invalid))
        if invalid:
            store.drop([name for name, _ in invalid])
        return good

    def _gave(self, tier: Tier, size: int, seconds: float) -> None:
        if not size:
            return
        with self._lock:
            before = self._reads[tier]
            trust = self._trust(before.at)
            self._reads[tier] = _Reads(before.bytes * trust + size, before.seconds * trust + seconds, self._now())

    def _loaded(self, tier: Tier, blocks: int, size: int, seconds: float, invalid: Counter[str]) -> None:
        with self._lock:
            figures = self.figures[tier]
            figures.loaded_blocks += blocks
            figures.loaded_bytes += size
            figures.load_s += seconds
            figures.invalid.update(invalid)
            if blocks and seconds > 0:
                guess = UNMEASURED[tier]
                # By what lies in the arena then: whoever asks for the cost knows nothing of codecs.
                whole = blocks * self._arena.layout.block_bytes
                times = seconds / (guess.latency_s + whole / guess.bytes_per_s)
                self._slowness[tier] = _Slowness(self._times(tier) ** (1 - _LEARNT) * times**_LEARNT, self._now())

    # ------------------------------------------------------------ down

    def save(self, tier: Tier, names: Sequence[BlockHash]) -> Saved:
        """Give a tier those of `names` that are cached on the device and not there.

        Blocks are copied while they may be evicted: what changed meanwhile is thrown away.
        """
        store, taken, refused = self.stores[tier], dict[BlockHash, int](), list[BlockHash]()
        for batch in _batches(names):
            there = store.holds([name_in_tiers(name) for name in batch])
            absent = [name for name, held in zip(batch, there, strict=True) if not held]
            items = self._records(self._books.peek(absent), tier)
            if not items:
                continue
            count = store.put({name_in_tiers(name): record for name, record in items.items()})
            sizes = {name: len(record) for name, record in items.items()}
            # How many were taken, and not which: where some were not, nothing is said of any of them.
            if count == len(items):
                taken |= sizes
            else:
                refused += items
            with self._lock:
                self.figures[tier].saved_blocks += count
                self.figures[tier].saved_bytes += sum(sizes.values()) * count // len(items)
        if taken:
            self._describe(tier)
        return Saved(taken, refused)

    def use(self, tier: Tier, uses: Sequence[Use]) -> Saved:
        """Tell a tier what is used, and give it those of these blocks that are cached on the device and not there."""
        absent = {use.name: use for use, held in zip(uses, self._touch(tier, uses), strict=True) if not held}
        saved = self.save(tier, list(absent))
        if saved.taken:
            self._touch(tier, [absent[name] for name in saved.taken])
        elif len(absent) < len(uses):
            self._describe(tier)
        return saved

    def _touch(self, tier: Tier, uses: Sequence[Use]) -> list[bool]:
        return self.stores[tier].touch([replace(use, name=name_in_tiers(use.name)) for use in uses])

    def _describe(self, tier: Tier) -> None:
        """Have a tier that has blocks of this model say whose they are, for as long as they are used: now and then, as
        it may be evicted or cleared. What another said of the model is replaced once."""
        now, before = self._now(), self._described.get(tier)
        if self._description is None or (before is not None and now < before + _DESCRIBED_S):
            return
        self._described[tier] = now
        store, name = self.stores[tier], description_name(model_digest(self._fingerprint))
        if before is None or not store.touch([Use(name, time.monotonic(), again=True)])[0]:
            store.put({name: self._description})

    def _records(self, entries: Sequence[CachedBlock], tier: Tier) -> dict[BlockHash, bytes]:
        if not entries:
            return {}
        copies = self._arena.bytes[:, [entry.block for entry in entries]]
        unchanged = self._books.unchanged(entries)
        codec, data = self._forms.encode(copies, self._rate(tier))
        return {
            entry.hash: pack(
                name_in_tiers(entry.hash), self._fingerprint, entry.tokens, Payload(codec, record.data), entry.salt
            )
            for entry, record, whole in zip(entries, data, unchanged, strict=True)
            if whole
        }

    def scrub(self, most: int) -> dict[Tier, list[BlockHash]]:
        """Read at most so many blocks of each tier of this machine, one round of them after the other, and drop those
        that are not whole, which it returns. Other models' are read, too. Called by one thread, now and then."""
        dropped: dict[Tier, list[BlockHash]] = {}
        for tier, store in self.stores.items():
            if tier is Tier.REMOTE:
                continue
            left = self._scrubbing.setdefault(tier, chain.from_iterable(store.names()))
            if not (names := list(islice(left, most))):
                del self._scrubbing[tier]
                continue
            data = store.peek(names)
            faults = {name: _fault(name, each) for name, each in zip(names, data, strict=True) if each is not None}
            if wrong := {name: reason for name, reason in faults.items() if reason}:
                with self._lock:
                    self.figures[tier].invalid.update(wrong.values())
                store.drop(list(wrong))
                dropped[tier] = [name_in_tiers(name) for name in wrong]
        return dropped

    def names(self, tier: Tier) -> Iterator[list[BlockHash]]:
        """The blocks that lie in a tier, as `Store.names` tells them; what other releases put there has other names."""
        for page in self.stores[tier].names():
            yield [name_in_tiers(name) for name in page if not is_description(name)]

    def stats(self) -> dict[Tier, StoreStats]:
        """What each tier holds; asks servers."""
        return {tier: store.stats() for tier, store in self.stores.items()}

    def close(self) -> None:
        for store in self.stores.values():
            store.close()


def _fault(name: BlockHash, data: bytes) -> str:
    """What is wrong with a record, in a word; empty for one that is whole, or that another release may read."""
    try:
        inspect(name, data)
    except InvalidRecord as error:
        return "" if error.reason == "version" else error.reason
    return ""


def _batches(names: Sequence[BlockHash]) -> Iterator[Sequence[BlockHash]]:
    for start in range(0, len(names), BATCH):
        yield names[start : start + BATCH]
