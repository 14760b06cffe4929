"""One prompt's KV on its way from the store, in a thread: from the front while the request waits, then from the back.

The engine computes from the front once it has the request. So what is loaded from then on comes from the back, and both
meet: the engine jumps over what it finds in the cache when it gets there, and the loader stops at what is computed.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Lock

from bascule.engine.core import Engine
from bascule.engine.sequence import Key
from bascule.kv.books import Books, Lease
from bascule.kv.store.tiers import BATCH, Tiers, Wanted
from bascule.policies.load import (
    blocks_to_load,
    load_seconds,
    patience_seconds,
    prompt_seconds,
    worth_loading_beside,
)
from bascule.policies.snapshot import CHUNK_TOKENS
from bascule.types import BlockHash, CostModel, KVLayout, Salt, Tier

Tell = Callable[[Tier, Sequence[BlockHash], Sequence[BlockHash]], None]

LEAST_PATIENCE_S = 0.01
"""A prompt waits for its load at least so long: most loads are done by then, and a step is not much shorter."""


class Load:
    """What is looked for and loaded for one prompt. All of it is the asyncio loop's but `late` and `over`."""

    def __init__(
        self, key: Key, tokens: Sequence[int], hashes: Sequence[BlockHash], salt: Salt, believed: int = 0
    ) -> None:
        """`hashes` are of the blocks that may be loaded, under `salt`; the router takes the first `believed` of them to
        be there."""
        self.key = key
        self.tokens = tokens
        self.hashes = hashes
        self.salt = salt
        self.believed = believed
        self.late = Event()
        """The engine has the request, and computes it from the front."""
        self.over = Event()
        """Nobody needs it any more."""
        self.front = asyncio.Event()
        """There is nothing more to wait for."""
        self.ended = asyncio.Event()
        self.came: dict[int, Tier] = {}
        """By place in the prompt, from where blocks came that the engine has not found yet."""
        self.used: Counter[Tier] = Counter()
        """Tokens that it has found, by tier."""
        self.moved: Counter[Tier] = Counter()
        """Bytes that have come for it, by tier."""
        self.spared_s = 0.0
        """Of computing, by what it has found."""
        self.reach = 0
        """Leading blocks that were on the device, or worth loading, when somebody looked; less, if no tier gave one."""
        self.held = False
        """The engine has given the request blocks, but does not compute it before this load has been waited for."""
        self.waited_s = 0.0
        self._patience_s: float | None = None
        self._limit: asyncio.Timeout | None = None
        self._followers: list[Load] = []
        self._lock = Lock()
        self._asks_for: Lease | None = None
        """What the call of a store that is under way is to fill."""
        self._fills = False

    @contextmanager
    def asking(self, lease: Lease) -> Iterator[None]:
        """A store is asked for what comes into blocks of `lease`; they may be written if `may_fill` says so."""
        with self._lock:
            self._asks_for, self._fills = lease, False
        try:
            yield
        finally:
            with self._lock:
                self._asks_for = None

    def may_fill(self) -> bool:
        """The store has answered: whether the blocks are still there to be written. From now on they stay there."""
        with self._lock:
            self._fills = self._asks_for is not None
            return self._fills

    def give_back(self) -> bool:
        """Let go of the memory of a call that is not answered yet; False if there is none."""
        with self._lock:
            lease, self._asks_for = (None, self._asks_for) if self._fills else (self._asks_for, None)
            if lease is not None:
                lease.release()
            return lease is not None

    async def wait(self, patience_s: float) -> None:
        """Wait for what comes from the front: until it is there, for `patience_s`, or what `expect` makes of that."""
        begun = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(patience_s) as self._limit:
                if self._patience_s is not None:
                    self.expect(self._patience_s)
                await self.front.wait()
        except TimeoutError:
            pass
        finally:
            self._limit = None
            self.waited_s += asyncio.get_running_loop().time() - begun

    def expect(self, patience_s: float) -> None:
        """It is known by now how long it is worth waiting, from now on; those that wait for the same do so, too."""
        self._patience_s = patience_s
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time() + max(patience_s, LEAST_PATIENCE_S))
        for follower in self._followers:
            follower.expect(patience_s)

    async def follow(self, other: Load) -> None:
        """Wait until `other`, which brings the same, has ended."""
        other._followers.append(self)
        if other._patience_s is not None:
            self.expect(other._patience_s)
        await other.ended.wait()


class Loader:
    """Does loads in threads of others, for one worker."""

    def __init__(
        self, tiers: Tiers, engine: Engine, books: Books, layout: KVLayout, tell: Tell, freed: Callable[[], None]
    ) -> None:
        """To be made in the asyncio loop, in which `tell` is told what is not in a tier, and what unexpectedly is;
        `freed` is called, in any thread, when memory that others may wait for is given back."""
        self._tiers = tiers
        self._engine = engine
        self._books = books
        self._layout = layout
        self._tell = tell
        self._freed = freed
        self._loop = asyncio.get_running_loop()

    def run(self, load: Load) -> None:
        """Load what is worth it. What has come is sealed at once, and told to the loop before anyone can find it."""
        if load.over.is_set():
            return
        cached = self._books.count_cached(load.hashes)
        run, quick = self._worth_loading(load, cached)
        load.reach = max(load.reach, cached + len(run))
        if not run:
            return
        tiers, first = [run[0]] * cached + run, cached
        if load.held:
            # Each batch takes the place of blocks that the sequence has: that needs next to no memory.
            first = cached + quick
            self._from_back(load, cached, tiers, first)
        elif quick:
            first = self._from_front(load, cached, run[:quick])
        self._loop.call_soon_threadsafe(load.front.set)
        if load.late.is_set():  # else the request comes first, before others that would evict what has come for it
            self._freed()
        self._from_back(load, first, tiers, cached + len(run))

    def _worth_loading(self, load: Load, cached: int) -> tuple[list[Tier], int]:
        """Where the blocks behind the `cached` ones are that are to be loaded, and how many of them, from the front on,
        are quicker loaded than computed."""
        size, block_bytes, prompt = self._layout.block_size, self._layout.block_bytes, len(load.tokens)
        model = self._engine.cost
        compute_s = math.inf if model == CostModel() else prompt_seconds(model, prompt, cached * size)
        tiers = self._tiers.within(compute_s)
        found = self._tiers.find(load.hashes[cached:], tiers)
        run = _leading(found)
        believed = zip(load.hashes[cached : load.believed], found, strict=False)
        if missing := [name for name, tier in believed if tier is None]:
            self._loop.call_soon_threadsafe(self._missing, missing, tiers)
        costs = self._tiers.costs()
        count = blocks_to_load(
            run,
            costs,
            model,
            prompt_tokens=prompt,
            cached_tokens=cached * size,
            block_tokens=size,
            token_bytes=block_bytes // size,
        )
        if model != CostModel():
            token_bytes, at = block_bytes // size, [cached * size, (cached + count) * size, (cached + len(run)) * size]
            behind_s = [prompt_seconds(model, prompt, tokens) for tokens in at]
            loads_s = [load_seconds(costs, _tokens(part, size), token_bytes) for part in (run[:count], run[count:])]
            step_s = prompt_seconds(model, at[0] + CHUNK_TOKENS, at[0])
            patience_s = patience_seconds(loads_s[0], behind_s[0] - behind_s[1], step_s)
            self._loop.call_soon_threadsafe(load.expect, patience_s)
            if not worth_loading_beside(loads_s[1], behind_s[1] - behind_s[2]):
                del run[count:]
        return run, count

    def _from_front(self, load: Load, cached: int, run: Sequence[Tier]) -> int:
        """Load on from what is cached until the engine has the request; returns how far that led.

        All is held until then, so that the beginning is not evicted for what comes behind it.
        """
        end, here = cached + len(run), min(cached + BATCH, cached + len(run))
        lease = self._engine.borrow(load.hashes[:here], load.tokens, here, end - here)
        if lease is None:
            return cached
        with lease:
            # What was cached a moment ago may be evicted now, and more may have come.
            first = lease.cached
            while first < end and not load.late.is_set() and not load.over.is_set():
                last = min(first + BATCH, end)
                missing = last - len(lease.blocks)
                if missing > 0 and not self._engine.widen(lease, missing):
                    break
                tiers = [run[max(place - cached, 0)] for place in range(first, last)]
                came = self._bring(load, lease, first, range(first, last), tiers)
                first += came
                if first < last:
                    return first + 1  # the engine computes this one
        return first

    def _from_back(self, load: Load, first: int, tiers: Sequence[Tier], end: int) -> None:
        """Load the blocks `first` to `end`, the last first, until they meet what is cached, computed or being computed.

        A prompt that is computed holds them at once, and its own blocks in their places are free for the next. For one
        that waits in the engine's line they are cached: it holds no memory. If it waits for memory, nothing more is
        taken of that: it is loaded when its turn comes.
        """
        while not load.over.is_set() and self._engine.take_found(*load.key, end):
            if load.late.is_set() and self._engine.is_starved(*load.key, BATCH):
                return
            first += self._books.count_cached(load.hashes[first:end])
            while first < end and self._books.count_cached(load.hashes[end - 1 : end]):
                end -= 1
            lease = self._some(min(end - first, BATCH))
            if lease is None:
                return
            with lease:
                places = range(end - len(lease.blocks), end)
                came = self._bring(load, lease, 0, places, [tiers[place] for place in places])
            self._freed()
            if not came:
                return
            end = places.start

    def _some(self, blocks: int) -> Lease | None:
        """So many fresh blocks, or fewer if there are not enough now."""
        lease = None
        while blocks and (lease := self._engine.borrow((), (), blocks)) is None:
            blocks //= 2
        return lease

    def _bring(self, load: Load, lease: Lease, at: int, places: range, tiers: Sequence[Tier]) -> int:
        """Load and seal blocks of a prompt, to the lease's place `at` and behind; returns how many came."""
        size = self._layout.block_size
        wanted = [
            Wanted(load.hashes[place], tuple(load.tokens[place * size : (place + 1) * size]), block, load.salt)
            for place, block in zip(places, lease.blocks[at:], strict=False)
        ]
        moved: Counter[Tier] = Counter()
        with load.asking(lease):
            came = self._tiers.load(wanted, tiers, load.may_fill, moved)
            if len(came) < len(wanted) and load.may_fill():
                load.reach = min(load.reach, places.start + len(came))
        if not came:
            return 0
        loaded = wanted[: len(came)]
        self._engine.take_in([each.block for each in loaded])
        self._loop.call_soon_threadsafe(self._came, load, places, came, moved)
        tokens = [token for each in loaded for token in each.tokens]
        lease.seal(at, [each.name for each in loaded], tokens, load.salt)
        self._engine.take_found(*load.key)
        return len(came)

    def _missing(self, names: Sequence[BlockHash], tiers: Sequence[Tier]) -> None:
        for tier in tiers:
            self._tell(tier, (), names)

    def _came(self, load: Load, places: range, tiers: Sequence[Tier], moved: Counter[Tier]) -> None:
        """In the loop. The router did not count on some: it has never heard of them, or they were out of reach."""
        found = dict(zip(places, tiers, strict=False))
        load.came |= found
        load.moved += moved
        for tier in self._tiers.stores:
            if here := [load.hashes[at] for at, source in found.items() if source is tier and at >= load.believed]:
                self._tell(tier, here, ())


def _leading(found: Sequence[Tier | None]) -> list[Tier]:
    """Those in front of the first None."""
    run: list[Tier] = []
    for tier in found:
        if tier is None:
            break
        run.append(tier)
    return run


def _tokens(run: Sequence[Tier], block_tokens: int) -> dict[Tier, int]:
    return {tier: blocks * block_tokens for tier, blocks in Counter(run).items()}
