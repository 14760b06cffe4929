"""Requests whose KV is to be in a tier when they have ended: says when it is, and how much of it was written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from bascule.engine.sequence import Key
from bascule.kv.hashing import BlockHasher
from bascule.types import BlockHash, Tier
from bascule.wire import Submit
from bascule.worker.saver import Saver

FLUSH_S = 2.0
"""What an announcement, or a worker's end, waits for blocks that are not saved yet; `serve` kills what takes 5 s to
end."""


Announce = Callable[[Key, Mapping[Tier, int], int], None]
"""Told of a request whose KV is in its tier, or will not come there: the bytes that were written for it, and how many
of its blocks cannot be found there, as the tier has not taken them, or what is in front of them."""


class _Wanted:
    """What one request wants saved."""

    def __init__(self, tier: Tier, names: Sequence[BlockHash]) -> None:
        self.tier = tier
        self.names = names
        self.unwritten = set(names)
        self.bytes = 0
        """Written since it began."""


class Announcer:
    """One for a worker that has a store. Runs in the asyncio loop."""

    def __init__(self, savers: Mapping[Tier, Saver], hasher: BlockHasher, announce: Announce) -> None:
        self._savers = savers
        self._hasher = hasher
        self._announce = announce
        self._wanted: dict[Key, _Wanted] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, key: Key, submission: Submit) -> None:
        """A request has come; `ended` or `forget` ends it."""
        if submission.save_to is not None:
            tokens = (*submission.prompt, *submission.generated)
            self._wanted[key] = _Wanted(submission.save_to, self._hasher.chain(tokens, submission.salt))

    def written(self, tier: Tier, sizes: Mapping[BlockHash, int]) -> None:
        """Blocks have been written to a tier. Of several requests that want one, it counts for the first."""
        for wanted in self._wanted.values():
            if wanted.tier is tier and (here := wanted.unwritten & sizes.keys()):
                wanted.unwritten -= here
                wanted.bytes += sum(sizes[name] for name in here)
                sizes = {name: size for name, size in sizes.items() if name not in here}

    def ended(self, key: Key) -> None:
        """A request has its last token."""
        if key in self._wanted:
            task = asyncio.create_task(self._wait(key, self._wanted[key]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def forget(self, key: Key) -> None:
        """The request is no longer wanted here; does nothing for others."""
        self._wanted.pop(key, None)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _wait(self, key: Key, wanted: _Wanted) -> None:
        missing = len(wanted.names)
        if (saver := self._savers.get(wanted.tier)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await saver.passed(wanted.names)
            missing = saver.lacking(wanted.names)
        self.forget(key)
        self._announce(key, {wanted.tier: wanted.bytes}, missing)
