"""Which blocks of the tiers are used: those of each prompt that gets its first token, and of its output at its end.

Where a prompt is found on the device, no tier below is asked for it. So they are told, or they would evict first what
is used most, and keep what builds on it and cannot be found without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from time import monotonic

from bascule.engine.sequence import Key
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.base import Use
from bascule.types import BlockHash, Salt

EVERY_S = 60.0
"""A block is told at most once in so long, and once more when it is used again."""
_STEP_S = 1e-6
"""By so much the beginning of a prefix is told to be used later than what follows it."""


class _Text:
    """What is known of a request: the names of its full blocks, and the tokens behind them."""

    def __init__(self, names: Sequence[BlockHash], rest: Sequence[int], salt: Salt, leaves: bool) -> None:
        self.leaves = leaves
        self.names = list(names)
        self.rest = list(rest)
        self.salt = salt
        self.again = 0
        """Blocks before the end of what was found in the cache."""
        self.begun = False
        """It has a token."""


class Uses:
    """Of one worker. Runs in the asyncio loop; keeps no more than `most` blocks of the last minute in mind."""

    def __init__(self, hasher: BlockHasher, tell: Callable[[Sequence[Use]], None], most: int) -> None:
        self._hasher = hasher
        self._tell = tell
        self._most = most
        self._now = monotonic
        self._texts: dict[Key, _Text] = {}
        self._latest: dict[BlockHash, Use] = {}
        """What was told in the last minute, in that order."""

    def begin(self, key: Key, tokens: Sequence[int], names: Sequence[BlockHash], salt: Salt, *, leaves: bool) -> None:
        """A request with these tokens, whose first full blocks are called `names`; `drew` or `forget` ends it.

        One that `leaves` is decoded elsewhere: no more than its first token is known here.
        """
        self._texts[key] = _Text(names, tokens[len(names) * self._hasher.block_size :], salt, leaves)

    def found(self, key: Key, blocks: int) -> None:
        """It has found blocks in the cache, up to so many from its beginning on."""
        if (text := self._texts.get(key)) is not None:
            text.again = max(text.again, blocks)

    def drew(self, key: Key, token: int, *, last: bool) -> None:
        """It has one token more."""
        if (text := self._texts.get(key)) is None:
            return
        if not text.begun:
            text.begun = True
            self.count(text.names, text.again)
        text.rest.append(token)
        if last or text.leaves:
            del self._texts[key]
            # The last token is not computed.
            text.names += self._hasher.chain(text.rest[:-1], text.names[-1] if text.names else text.salt)
            self.count(text.names, text.again)

    def forget(self, key: Key) -> None:
        """The request has ended."""
        self._texts.pop(key, None)

    def count(self, names: Sequence[BlockHash], again: int) -> None:
        """The blocks of a prefix are used, the first `again` of them not for the first time."""
        now, uses = self._now(), list[Use]()
        at = now
        for place, name in enumerate(names):
            at -= _STEP_S
            use, before = Use(name, at, place < again, place), self._latest.get(name)
            if before is not None and now - before.at < EVERY_S and before.again >= use.again:
                at = min(at, before.at)  # what follows it is not to be younger
                continue
            self._latest.pop(name, None)
            self._latest[name] = use
            uses.append(use)
        self._drop_old(now)
        if uses:
            self._tell(uses)

    def _drop_old(self, now: float) -> None:
        for name in list(islice(self._latest, max(0, len(self._latest) - self._most))):
            del self._latest[name]
        while self._latest and now - next(iter(self._latest.values())).at >= EVERY_S:
            del self._latest[next(iter(self._latest))]
