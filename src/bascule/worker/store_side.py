"""The KV store at a worker: what is computed is saved to the tiers below, what a prompt needs is loaded from them.

Both go on beside the engine's steps, in threads of their own. Blocks are saved once they are in the device's prefix
cache and stay where they are; they are loaded before the engine has the request, into blocks that become cached.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Event

from msgspec import Struct

from bascule.engine.core import Engine
from bascule.engine.sequence import Key
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.base import StoreStats
from bascule.kv.store.tiers import Tiers, Wanted
from bascule.policies.load import blocks_to_load, prompt_seconds
from bascule.types import BlockHash, CostModel, KVLayout, StoreLoad, Tier
from bascule.wire import StorePlace, Submit
from bascule.worker.saver import Saver

log = logging.getLogger(__name__)

_LOADERS = 2
_LOOK_S = 2.0
_FLUSH_S = 2.0
"""What a worker's end waits for blocks that are not saved yet; `serve` kills what takes 5 s to end."""
_LATER_S = 1.0
"""How much longer than for computing a prompt to wait for what the store has of it, other prompts' turns included."""
_MOST_TOLD = 1_000_000
"""Blocks of a tier without a known bound that the router is told at once."""

Tell = Callable[[Tier, Sequence[BlockHash], Sequence[BlockHash]], None]


class Brought(Struct, frozen=True):
    """What was loaded for a prompt: tokens by tier, and the seconds it took."""

    tokens: dict[Tier, int]
    seconds: float


class StoreSide:
    """One for a worker that has a store. Runs in the asyncio loop; files, servers and copies in threads of its own."""

    def __init__(
        self,
        tiers: Tiers,
        engine: Engine,
        books: Books,
        hasher: BlockHasher,
        layout: KVLayout,
        tell: Tell,
        on_saved: Callable[[Key], None] = lambda _: None,
    ) -> None:
        """`tell` is told, in the loop, what has come into a tier and what was found missing there; `on_saved`, when
        the KV of a request that asked for it (`Submit.save_to`) is in its tier."""
        self._tiers = tiers
        self._engine = engine
        self._books = books
        self._hasher = hasher
        self._layout = layout
        self._tell = tell
        self._on_saved = on_saved
        self._starting: dict[Key, asyncio.Task[None]] = {}
        """Requests that wait for what is loaded for them."""
        self._to_save: dict[Key, Submit] = {}
        """Those whose KV is to be saved when they have ended."""
        self._saving_tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._savers = {
            tier: Saver(partial(tiers.save, tier), partial(self._saved, tier), books.num_blocks)
            for tier in tiers.stores
        }
        self._places: dict[Tier, StorePlace] = {}
        self._counting: asyncio.Task[None] | None = None
        self._under_way: dict[BlockHash, asyncio.Future[Brought | None]] = {}
        """Loads by the first block that they bring."""
        self._hit_tokens: Counter[Tier] = Counter()
        self._saved_s: Counter[Tier] = Counter()
        self._stats: dict[Tier, StoreStats] = {}
        self.waiting = 0
        """Prompts that are being looked for, or loaded."""
        self.waiting_tokens = 0
        """Their tokens that are not cached on the device."""
        self._loaders = ThreadPoolExecutor(_LOADERS, "kv-load")
        self._askers = ThreadPoolExecutor(1, "kv-ask")

    # ------------------------------------------------------------ requests

    def start(self, submission: Submit, ready: Callable[[Submit, Brought | None], None]) -> asyncio.Task[None]:
        """Have what the store holds of its prompt loaded, as far as that is worth it; then call `ready`.

        The task that does so is for the caller to watch: with an error there the request would be lost.
        """
        key = Key(submission.request, submission.attempt)
        if submission.save_to is not None:
            self._to_save[key] = submission
        task = self._starting[key] = asyncio.create_task(self._start(key, submission, ready))
        return task

    async def _start(self, key: Key, submission: Submit, ready: Callable[[Submit, Brought | None], None]) -> None:
        brought = await self.bring((*submission.prompt, *submission.generated), submission.stored_tokens)
        del self._starting[key]
        ready(submission, brought)

    def ended(self, key: Key) -> None:
        """A request has its last token; its blocks have been told to `computed`."""
        if (submission := self._to_save.pop(key, None)) is not None:
            task = asyncio.create_task(self._announce(key, submission))
            self._saving_tasks.add(task)
            task.add_done_callback(self._saving_tasks.discard)

    async def _announce(self, key: Key, submission: Submit) -> None:
        saver = self._savers.get(submission.save_to) if submission.save_to is not None else None
        if saver is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await saver.passed(self._hasher.chain((*submission.prompt, *submission.generated)))
        self._on_saved(key)

    def cancel(self, key: Key) -> None:
        """The request is no longer wanted here; does nothing for others."""
        self._to_save.pop(key, None)
        if (starting := self._starting.pop(key, None)) is not None:
            starting.cancel()

    # ------------------------------------------------------------ down

    def computed(self, names: Sequence[BlockHash]) -> None:
        """Blocks have become findable on the device: save them, once there is time."""
        for saver in self._savers.values():
            saver.add(names)

    @property
    def saving(self) -> bool:
        """Some tier is still to get some blocks."""
        return not all(saver.idle for saver in self._savers.values())

    def _saved(self, tier: Tier, names: Sequence[BlockHash]) -> None:
        self._tell(tier, names, ())

    # ------------------------------------------------------------ up

    async def bring(self, tokens: Sequence[int], believed_tokens: int = 0) -> Brought | None:
        """Have what the store holds of a prompt loaded as far as that is worth it; None if nothing was.

        `believed_tokens` is how much the router takes to be there; it is told what is not. Never raises for what a
        store does: what cannot be loaded will be computed.
        """
        hashes = self._hasher.chain(tokens[:-1])
        cached = self._books.count_cached(hashes)
        if cached == len(hashes):
            return None
        behind = len(tokens) - cached * self._layout.block_size
        patience = prompt_seconds(self._engine.cost, len(tokens), len(tokens) - behind) + _LATER_S
        self.waiting, self.waiting_tokens = self.waiting + 1, self.waiting_tokens + behind
        try:
            async with asyncio.timeout(patience):
                return await self._bring(tokens, hashes, cached, believed_tokens // self._layout.block_size)
        except TimeoutError:
            return None
        except Exception:
            log.exception("KV store: a prefix could not be loaded")
            return None
        finally:
            self.waiting, self.waiting_tokens = self.waiting - 1, self.waiting_tokens - behind

    async def _bring(
        self, tokens: Sequence[int], hashes: Sequence[BlockHash], cached: int, believed: int
    ) -> Brought | None:
        while (other := self._under_way.get(hashes[cached])) is not None:
            await asyncio.wait([other])
            if (cached := self._books.count_cached(hashes)) == len(hashes):
                return None
        first, given_up = hashes[cached], Event()
        load = self._loop.run_in_executor(self._loaders, self._load, tokens, hashes, cached, believed, given_up)
        self._under_way[first] = load
        load.add_done_callback(lambda _: self._under_way.pop(first, None))
        try:
            # A request that is given up meanwhile leaves the load to its end: its thread writes into leased blocks.
            return await asyncio.shield(load)
        except asyncio.CancelledError:
            given_up.set()
            raise

    def _load(
        self, tokens: Sequence[int], hashes: Sequence[BlockHash], cached: int, believed: int, given_up: Event
    ) -> Brought | None:
        """In a thread: lease, load, seal, let go; unless it was `given_up` before it began."""
        if given_up.is_set():
            return None
        begun = self._loop.time()
        size, block_bytes = self._layout.block_size, self._layout.block_bytes
        model = self._engine.cost
        spared = math.inf if model == CostModel() else prompt_seconds(model, len(tokens), cached * size)
        tiers = self._tiers.within(spared)
        run = self._tiers.find(hashes[cached:], tiers)
        if missing := hashes[cached + len(run) : believed]:
            self._loop.call_soon_threadsafe(self._missing, missing, tiers)
        count = blocks_to_load(
            run,
            self._tiers.costs(),
            model,
            prompt_tokens=len(tokens),
            cached_tokens=cached * size,
            block_tokens=size,
            token_bytes=block_bytes // size,
        )
        if not count or (lease := self._engine.borrow(hashes[: cached + count], tokens, cached + count)) is None:
            return None
        with lease:
            # What was cached a moment ago may be evicted now, and more may have come.
            run = [*[run[0]] * (cached - lease.cached), *run[max(lease.cached - cached, 0) : count]]
            parts = [tuple(tokens[index * size : (index + 1) * size]) for index in range(lease.cached, cached + count)]
            wanted = [
                Wanted(hashes[lease.cached + index], part, lease.blocks[lease.cached + index])
                for index, part in enumerate(parts)
            ]
            patience = prompt_seconds(model, len(tokens), lease.cached * size) or None
            came = self._tiers.load(wanted, run, patience)
            loaded = wanted[: len(came)]
            self._engine.take_in([each.block for each in loaded])
            lease.seal(
                lease.cached, [each.name for each in loaded], [token for each in loaded for token in each.tokens]
            )
        if not came:
            return None
        unheard_of = slice(max(believed - lease.cached, 0), None)
        self._loop.call_soon_threadsafe(self._found, [each.name for each in loaded[unheard_of]], came[unheard_of])
        seconds = self._loop.time() - begun
        by_tier = {tier: blocks * size for tier, blocks in Counter(came).items()}
        before = lease.cached * size
        saved_s = prompt_seconds(model, len(tokens), before) - prompt_seconds(
            model, len(tokens), before + len(came) * size
        )
        self._hit_tokens.update(by_tier)
        self._saved_s.update({tier: saved_s * count / (len(came) * size) for tier, count in by_tier.items()})
        return Brought(by_tier, seconds)

    def _missing(self, names: Sequence[BlockHash], tiers: Sequence[Tier]) -> None:
        for tier in tiers:
            self._tell(tier, (), names)

    def _found(self, names: Sequence[BlockHash], tiers: Sequence[Tier]) -> None:
        """The router did not count on these: it has never heard of them, or they were out of reach for a while."""
        for tier in self._tiers.stores:
            if here := [name for name, source in zip(names, tiers, strict=True) if source is tier]:
                self._tell(tier, here, ())

    # ------------------------------------------------------------ figures

    def places(self) -> dict[Tier, StorePlace]:
        """Where the tiers are, and how much of this model's KV they hold. Asked once: the router makes room for it."""
        if not self._places:
            for tier, store in self._tiers.stores.items():
                capacity = store.stats().capacity_bytes or 0
                self._places[tier] = StorePlace(store.place, capacity // self._tiers.least_block_bytes)
        return self._places

    def tell_all(self) -> None:
        """The router knows nothing of the tiers, or nothing for sure: tell it what is there, from the beginning."""
        if self._counting is not None:
            self._counting.cancel()
        self._counting = asyncio.create_task(self._tell_all())

    async def _tell_all(self) -> None:
        """As many blocks as the router has room for: other models' may lie there, too, and be more than that."""
        for tier, place in self.places().items():
            pages, room = self._tiers.stores[tier].names(), place.blocks or _MOST_TOLD
            while room and (page := await self._loop.run_in_executor(self._askers, next, pages, None)) is not None:
                self._tell(tier, page[:room], ())
                room -= min(len(page), room)

    async def watch(self) -> None:
        """Ask the stores now and then what they hold, for `loads`."""
        while True:
            self._stats = await self._loop.run_in_executor(self._askers, self._tiers.stats)
            await asyncio.sleep(_LOOK_S)

    def loads(self) -> dict[Tier, StoreLoad]:
        """What each tier holds and has done for this worker."""
        return {tier: self._of(tier) for tier in self._tiers.stores}

    def _of(self, tier: Tier) -> StoreLoad:
        stats, figures = self._stats.get(tier, StoreStats()), self._tiers.figures[tier]
        return StoreLoad(
            blocks=stats.blocks,
            bytes=stats.bytes,
            capacity_bytes=stats.capacity_bytes,
            evictions=stats.evictions,
            errors={fault.value: count for fault, count in stats.errors.items()},
            invalid=dict(figures.invalid),
            hit_tokens=self._hit_tokens[tier],
            loaded_bytes=figures.loaded_bytes,
            saved_bytes=figures.saved_bytes,
            load_s=figures.load_s,
            spared_s=float(self._saved_s[tier]),
            cost=self._tiers.costs()[tier],
        )

    async def close(self) -> None:
        """Save what is left, for a while, and let go of the stores."""
        for task in (*self._starting.values(), *self._saving_tasks):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await asyncio.gather(*(saver.drain() for saver in self._savers.values()))
        for saver in self._savers.values():
            saver.close()
        if self._counting is not None:
            self._counting.cancel()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._askers.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._tiers.close)
