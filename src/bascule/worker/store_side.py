"""The KV store at a worker: what is computed is saved to the tiers below, what a prompt needs is loaded from them.

Both go on beside the engine's steps, in threads of their own. Blocks are saved once they are in the device's prefix
cache and stay where they are; they are loaded into blocks that become cached, for as long as that is worth waiting for
before the engine has the request, and then beside it (`loader.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from bascule.engine.core import Engine, Found, StepResult
from bascule.engine.sequence import Key
from bascule.engine.work import Admitted
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.accounts import Accounts
from bascule.kv.store.base import StoreStats, Use
from bascule.kv.store.tiers import Tiers
from bascule.policies.load import LEAST_SHARE, prompt_seconds
from bascule.types import BlockHash, Brought, CostModel, KVLayout, RequestId, Salt, StoreLoad, Tier
from bascule.wire import StorePlace, Submit
from bascule.worker.announcer import FLUSH_S, Announce, Announcer
from bascule.worker.loader import LEAST_PATIENCE_S, Load, Loader, Tell
from bascule.worker.saver import Saver
from bascule.worker.uses import Uses

log = logging.getLogger(__name__)

_LOADERS = 2
_LOOK_S = 2.0
_SCRUBBED = 4
"""Blocks of a tier read at each look while nothing is saved or loaded."""
_UNKNOWN_S = 1.0
"""What it waits for its load where nothing is known of that time."""
_NOBODYS = Key(RequestId(""), 0)
_MOST_TOLD = 1_000_000
"""Blocks of a tier without a known bound that the router is told at once."""


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
        on_saved: Announce = lambda _, __, ___: None,
        on_loaded: Callable[[Key, Brought], None] = lambda _, __: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`tell` is told, in the loop, what has come into a tier and what was found missing there; `on_saved`, when
        the KV of a request that asked for it (`Submit.save_to`) is in its tier, and how many bytes were written for
        that; `on_loaded`, all that has been loaded for a request so far, each time that the engine has found more of
        it; `wake` is called, in any thread, when a sequence may run, or may get memory."""
        self._tiers = tiers
        self._engine = engine
        self._books = books
        self._hasher = hasher
        self._layout = layout
        self._tell = tell
        self._on_loaded = on_loaded
        self._wake = wake
        self._starting: dict[Key, asyncio.Task[None]] = {}
        """Requests that wait for what is loaded for them."""
        self._loads: dict[Key, Load] = {}
        """Of requests that have no token yet."""
        self._loading: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._savers = {
            tier: Saver(
                partial(tiers.save, tier), partial(self._saved, tier), books.num_blocks, partial(tiers.use, tier)
            )
            for tier in tiers.stores
        }
        self._announcer = Announcer(self._savers, hasher, on_saved)
        self._uses = Uses(hasher, self._used, books.num_blocks)
        self._places: dict[Tier, StorePlace] = {}
        self._counting: asyncio.Task[None] | None = None
        self._under_way: dict[BlockHash, Load] = {}
        """Loads by the blocks that they may bring."""
        self._hit_tokens: Counter[Tier] = Counter()
        self._saved_s = dict.fromkeys(tiers.stores, 0.0)
        self._stats: dict[Tier, StoreStats] = {}
        self.waiting = 0
        """Prompts that are being looked for, or loaded."""
        self.waiting_tokens = 0
        """Their tokens that are not cached on the device."""
        self.accounts = Accounts(tiers.stores)
        self._loader = Loader(tiers, engine, books, layout, tell, wake)
        self._loaders = ThreadPoolExecutor(_LOADERS, "kv-load")
        self._askers = ThreadPoolExecutor(1, "kv-ask")

    # ------------------------------------------------------------ requests

    def start(self, submission: Submit, ready: Callable[[Submit], None]) -> asyncio.Task[None]:
        """Have what the store holds of its prompt loaded, as far as that is worth it, and call `ready` when the engine
        should have it: when that has come, or at the end of a short patience, while the load goes on.

        The task that does so is for the caller to watch: with an error there the request would be lost.
        """
        key = Key(submission.request, submission.attempt)
        self._announcer.begin(key, submission)
        task = self._starting[key] = asyncio.create_task(self._start(key, submission, ready))
        return task

    def starts(self, key: Key) -> bool:
        """Whether a request waits for what is loaded for it."""
        return key in self._starting

    async def _start(self, key: Key, submission: Submit, ready: Callable[[Submit], None]) -> None:
        tokens, salt = (*submission.prompt, *submission.generated), submission.salt
        believed = submission.stored_tokens // self._layout.block_size
        load = self._loads[key] = Load(key, tokens, self._hasher.chain(tokens[:-1], salt), salt, believed)
        self._uses.begin(key, tokens, load.hashes, salt, leaves=submission.decode is not None)
        load.reach = cached = self._books.count_cached(load.hashes)
        if cached < len(load.hashes):
            behind = len(tokens) - cached * self._layout.block_size
            self.waiting, self.waiting_tokens = self.waiting + 1, self.waiting_tokens + behind
            try:
                await self._wait_for(load)
            finally:
                self.waiting, self.waiting_tokens = self.waiting - 1, self.waiting_tokens - behind
        else:
            load.ended.set()
            load.late.set()
        del self._starting[key]
        ready(submission)
        self._hold(load)
        if self._engine.is_starved(*key) and load.give_back():
            self._wake()

    def stepped(self, result: StepResult) -> None:
        """The engine has made a step, whose new blocks have been told to `computed`; its tokens are not sent yet."""
        for each in result.found:
            key = Key(each.request, each.attempt)
            self._uses.found(key, each.places.stop)
            if (load := self._loads.get(key)) is not None:
                self._found(load, each)
        for admitted in result.admitted:
            self._admitted(admitted)
        for output in result.outputs:
            key = Key(output.request, output.attempt)
            self._give_up(key)
            self._uses.drew(key, output.token, last=output.finish is not None)
            if output.finish is not None:
                self._announcer.ended(key)

    def _hold(self, load: Load) -> None:
        """All that could be loaded of a prompt in the engine's line has been: where others take its place before its
        turn, or there was none, it is loaded again then, before it is computed."""
        if load.late.is_set() and load.ended.is_set() and load.reach:
            self._engine.hold(*load.key, load.reach)

    def _admitted(self, admitted: Admitted) -> None:
        """Load what a sequence lacks, as far as that is quicker: before it is computed, if the engine holds it, else
        while it is computed from the front."""
        key, tokens, salt = Key(admitted.request, admitted.attempt), admitted.tokens, admitted.salt
        before = self._loads.get(key)
        self._give_up(key)
        load = self._loads[key] = Load(key, tokens, self._hasher.chain(tokens[:-1], salt), salt)
        if before is not None:
            load.came, load.used, load.waited_s = before.came, before.used, before.waited_s
        if admitted.held:
            load.held = True
            self._watch(self._load_first(load))
        else:
            load.late.set()
            self._watch(self._run(load))

    async def _load_first(self, load: Load) -> None:
        try:
            await self._wait_for(load)
        finally:
            self._engine.go(*load.key)
            self._wake()

    def _watch(self, loading: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(loading)
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    def cancel(self, key: Key) -> None:
        """The request is no longer wanted here; does nothing for others."""
        self._announcer.forget(key)
        self._uses.forget(key)
        self._give_up(key)
        if (starting := self._starting.pop(key, None)) is not None:
            starting.cancel()

    def _give_up(self, key: Key) -> None:
        """Nothing more is to be loaded for a request."""
        if (load := self._loads.pop(key, None)) is not None:
            load.over.set()

    # ------------------------------------------------------------ down

    def computed(self, names: Sequence[BlockHash]) -> None:
        """Blocks have become findable on the device: save them, once there is time."""
        for saver in self._savers.values():
            saver.add(names)

    def _used(self, uses: Sequence[Use]) -> None:
        for saver in self._savers.values():
            saver.use(uses)

    @property
    def saving(self) -> bool:
        """Some tier is still to get some blocks."""
        return not all(saver.idle for saver in self._savers.values())

    def _saved(self, tier: Tier, sizes: Mapping[BlockHash, int]) -> None:
        self._announcer.written(tier, sizes)
        self._tell(tier, list(sizes), ())

    # ------------------------------------------------------------ up

    async def _wait_for(self, load: Load) -> None:
        """Begin a load of what is not cached, and wait for it as long as that is worth it."""
        cached, model = self._books.count_cached(load.hashes) * self._layout.block_size, self._engine.cost
        patience_s = _UNKNOWN_S
        if model != CostModel():
            patience_s = max(LEAST_SHARE * prompt_seconds(model, len(load.tokens), cached), LEAST_PATIENCE_S)
        self._watch(self._run(load))
        await load.wait(patience_s)
        load.late.set()

    async def bring(self, tokens: Sequence[int], salt: Salt) -> None:
        """Have loaded what of these tokens, of full blocks, is quicker loaded than computed, for no request here."""
        load = Load(_NOBODYS, (*tokens, 0), self._hasher.chain(tokens, salt), salt)
        try:
            await self._run(load)
            self._uses.count(load.hashes, len(load.hashes))
        finally:
            load.over.set()

    async def _run(self, load: Load) -> None:
        """A load from its beginning to its end, behind those of others that bring the same.

        Never raises for what a store does: what cannot be loaded will be computed.
        """
        hashes = load.hashes
        try:
            while (cached := self._books.count_cached(hashes)) < len(hashes) and not load.over.is_set():
                load.reach = max(load.reach, cached)
                if (other := self._under_way.get(hashes[cached])) is not None:
                    await load.follow(other)
                    continue
                for name in hashes[cached:]:
                    self._under_way.setdefault(name, load)
                await self._loop.run_in_executor(self._loaders, self._loader.run, load)
                break
            else:
                load.reach = max(load.reach, cached)
        except Exception:
            if not load.over.is_set():
                log.exception("KV store: a prefix could not be loaded")
        finally:
            for name in hashes:
                if self._under_way.get(name) is load:
                    del self._under_way[name]
            load.front.set()
            load.ended.set()
            self._hold(load)
            self._wake()

    @property
    def loading(self) -> bool:
        """Something is looked for or loaded."""
        return bool(self._loading)

    def came_otherwise(self, key: Key, places: range) -> None:
        """These blocks of a prompt, which the engine has found, are counted by others: a token counts once."""
        if (load := self._loads.get(key)) is not None:
            for place in places:
                load.came.pop(place, None)

    def _found(self, load: Load, found: Found) -> None:
        """The engine has found blocks of a prompt in the cache: count those that were loaded for it."""
        size, model, prompt, places = self._layout.block_size, self._engine.cost, len(load.tokens), found.places
        tiers = {place: load.came.pop(place) for place in places if place in load.came}
        if not tiers:
            return
        saved_s = prompt_seconds(model, prompt, places.start * size) - prompt_seconds(model, prompt, places.stop * size)
        for place, tier in tiers.items():
            load.used[tier] += found.tokens_at([place], size)
            self._hit_tokens[tier] += found.tokens_at([place], size)
            self._saved_s[tier] += saved_s / len(places)
        load.spared_s += saved_s * len(tiers) / len(places)
        brought = Brought(dict(load.used.items()), load.waited_s, dict(load.moved.items()), load.spared_s)
        self._on_loaded(load.key, brought)

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
            pages, room = self._tiers.names(tier), place.blocks or _MOST_TOLD
            while room and (page := await self._loop.run_in_executor(self._askers, next, pages, None)) is not None:
                self._tell(tier, page[:room], ())
                room -= min(len(page), room)

    async def watch(self) -> None:
        """Ask the stores now and then what they hold, for `loads`, and look whether some of it is whole."""
        while True:
            self._stats = await self._loop.run_in_executor(self._askers, self._tiers.stats)
            for saver in self._savers.values():
                saver.again()
            if not (self.saving or self.loading):
                await self._loop.run_in_executor(self._askers, self.accounts.look)
                dropped = await self._loop.run_in_executor(self._askers, self._tiers.scrub, _SCRUBBED)
                for tier, names in dropped.items():
                    log.error("integrity: %d blocks of the %s tier were not whole, and are dropped", len(names), tier)
                    self._tell(tier, (), names)
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
            spared_s=self._saved_s[tier],
            cost=self._tiers.costs()[tier],
        )

    async def close(self) -> None:
        """Save what is left, for a while, and let go of the stores."""
        for load in self._loads.values():
            load.over.set()
        for task in self._starting.values():
            task.cancel()
        self._announcer.close()
        if self._counting is not None:
            self._counting.cancel()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._askers.shutdown(wait=False, cancel_futures=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                loads = (asyncio.shield(task) for task in self._loading)
                savers = (saver.drain() for saver in self._savers.values())
                await asyncio.gather(*loads, *savers, return_exceptions=True)
        for saver in self._savers.values():
            saver.close()
        await asyncio.to_thread(self._tiers.close)
