"""Computed blocks on their way down to one tier, and what is used of it, in a thread that gives way to all others."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

from bascule.kv.store.base import Use
from bascule.kv.store.tiers import Saved
from bascule.types import BlockHash

log = logging.getLogger(__name__)

_AT_ONCE = 16
_USES_AT_ONCE = 256
_NICENESS = 10
_OFFERED_S = 60.0
"""What a tier refused is offered again for so long: it may have been slow for a moment."""

Save = Callable[[Sequence[BlockHash]], Saved]


class Saver:
    """A line of blocks before a tier, so that a slow one holds up no other. Runs in the asyncio loop."""

    def __init__(
        self,
        save: Save,
        saved: Callable[[Mapping[BlockHash, int]], None],
        most: int,
        use: Callable[[Sequence[Use]], Saved],
    ) -> None:
        """`save` is called in the thread, and `use` with blocks that are used; what was taken, `saved` is told in the
        loop, with the bytes.

        Of more than `most` blocks in the line the first are left out: they will have been evicted by then.
        """
        self._save = save
        self._use = use
        self._saved = saved
        self._most = most
        self._line: dict[BlockHash, None] = {}
        self._uses: dict[BlockHash, Use] = {}
        self._refused: dict[BlockHash, float] = {}
        """When for the first time; not forgotten where it is in the line again."""
        self._busy: Sequence[BlockHash] = ()
        self._batch_done = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "kv-save", initializer=_give_way)

    @property
    def idle(self) -> bool:
        return self._task is None

    def add(self, names: Sequence[BlockHash]) -> None:
        self._line |= dict.fromkeys(names)
        while len(self._line) > self._most:
            del self._line[next(iter(self._line))]
        self._begin()

    def use(self, uses: Sequence[Use]) -> None:
        """These blocks of a prefix are used: they are to stay in the tier, or to come back to it.

        Of more than `most` such blocks the last are left out: none is found without what is in front of it.
        """
        self._uses |= {use.name: use for use in uses}
        while len(self._uses) > self._most:
            self._uses.popitem()
        self._begin()

    def _begin(self) -> None:
        if (self._line or self._uses) and self._task is None:
            self._task = asyncio.create_task(self._run())

    def again(self) -> None:
        """Offer what was refused once more, if nothing else is to be saved; to be called now and then."""
        if self._task is None and self._refused:
            oldest = asyncio.get_running_loop().time() - _OFFERED_S
            self._refused = {name: at for name, at in self._refused.items() if at > oldest}
            self.add(list(self._refused))

    async def passed(self, names: Sequence[BlockHash]) -> None:
        """Wait until none of these blocks is in the line or being saved."""
        while self._task is not None and any(name in self._line or name in self._busy for name in names):
            batch_done = self._batch_done
            await batch_done.wait()

    def lacking(self, names: Sequence[BlockHash]) -> int:
        """How many blocks of a prefix cannot be found in the tier, as far as is known: from the first on that it has
        refused, or that waits to be saved."""
        for at, name in enumerate(names):
            if name in self._refused or name in self._line or name in self._busy:
                return len(names) - at
        return 0

    async def drain(self) -> None:
        """Wait until nothing is left to be saved or told."""
        if self._task is not None:
            await self._task

    def close(self) -> None:
        self._line.clear()
        self._uses.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._line or self._uses:  # some of each in turn, so that neither waits for the end of the other
                if names := list(islice(self._line, _AT_ONCE)):
                    for name in names:
                        del self._line[name]
                    self._busy = names
                    done = await loop.run_in_executor(self._thread, self._save, names)
                    self._note(names, done, loop.time())
                    self._end_batch()
                if uses := list(islice(self._uses.values(), _USES_AT_ONCE)):
                    for use in uses:
                        del self._uses[use.name]
                    done = await loop.run_in_executor(self._thread, self._use, uses)
                    self._note([use.name for use in uses], done, loop.time())
        except Exception:
            log.exception("KV store: computed blocks could not be saved")
        finally:
            self._task = None
            self._end_batch()

    def _note(self, names: Sequence[BlockHash], done: Saved, now: float) -> None:
        if done.taken:
            self._saved(done.taken)
        refused = {name: self._refused.get(name, now) for name in done.refused}
        for name in names:
            self._refused.pop(name, None)
        if refused:
            # The others would be refused, too: they are offered again together.
            refused |= {name: self._refused.get(name, now) for name in self._line}
            self._line.clear()
        self._refused |= refused
        while len(self._refused) > self._most:
            del self._refused[next(iter(self._refused))]

    def _end_batch(self) -> None:
        self._busy = ()
        self._batch_done.set()
        self._batch_done = asyncio.Event()


def _give_way() -> None:
    """Let this thread run where nothing else wants to: steps and loads go first."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
