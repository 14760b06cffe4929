"""Keeps one worker's part of the prefix index in step with what the worker tells, and knows when it is not."""

from __future__ import annotations

import logging
from collections import Counter

from bascule.kv.hashing import HASH_BYTES
from bascule.kv.prefix_index import PrefixIndex
from bascule.types import Tier
from bascule.wire import KvEvents, TierChanges

log = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0
"""Seconds between two requests to tell everything anew."""
CROWDED_S = 30.0
"""The same where a tier below the device seems to hold more than it can, because nobody tells what it evicts."""


class KvFeed:
    """The events of one incarnation of a worker, whose blocks are at `row` of `index`.

    After a gap what comes is still applied, for most of the picture remains true; but it stays out of step until the
    worker has begun anew.
    """

    def __init__(self, index: PrefixIndex, row: int, faults: Counter[str]) -> None:
        """Counts what goes wrong in `faults`: `gap`, `malformed`, `overflow` (more blocks than it has room for) or
        `strayed` (an audit of the index found something)."""
        self.in_step = True
        self._index = index
        self._row = row
        self._faults = faults
        self._sequence = 0
        self._claim = (0, b"")
        """What the worker last said of itself: the number of its last message, and a digest."""
        self._asked: float | None = None
        self._crowded = False
        """Some tier below the device seemed full; what came there since is not in the index."""

    def apply(self, events: KvEvents) -> bool:
        """One message, in order of arrival; False for what cannot be right: it is dropped, and we are out of step."""
        if events.sequence < 1:
            self._fault("malformed")
            return False
        if events.anew:
            self._index.clear(self._row)
            self.in_step, self._crowded = True, False
        else:
            self.told(events.sequence - 1)
        self._sequence = events.sequence
        try:
            fits = all(self._change(Tier(part.tier), part.stored, part.removed) for part in events.changes)
        except ValueError as error:
            log.debug("KV events of row %d are malformed: %s", self._row, error)
            self._fault("malformed")
            return False
        if not fits:
            self._index.clear(self._row)
            self._fault("overflow")
        return fits

    def also(self, part: TierChanges) -> None:
        """Changes of a tier that this worker shares, told by another one, whose feed has found them well-formed."""
        self._change(Tier(part.tier), part.stored, part.removed)

    @property
    def digest(self) -> bytes | None:
        """Of the blocks that the index should have on the worker's device; None where that is not known now."""
        sequence, digest = self._claim
        return digest if digest and self.in_step and sequence == self._sequence else None

    def claims(self, sequence: int, digest: bytes) -> None:
        """The worker has sent events up to `sequence`, after which it has the blocks of that digest."""
        self.told(sequence)
        self._claim = sequence, digest

    def strayed(self) -> None:
        """Something is wrong in the index, with what it has of this worker perhaps."""
        self._fault("strayed")

    def told(self, sequence: int) -> None:
        """The worker has sent events up to `sequence`; those that did not come are lost."""
        if sequence != self._sequence:
            self._sequence = sequence
            self._fault("gap")

    def should_ask(self, now: float) -> bool:
        """Whether to ask the worker to tell everything anew; then it is asked now (s)."""
        if self.in_step and not self._crowded:
            return False
        if self._asked is not None and now - self._asked < (CROWDED_S if self.in_step else ASK_AGAIN_S):
            return False
        self._asked = now
        return True

    def _change(self, tier: Tier, stored: bytes, removed: bytes) -> bool:
        """First what went, so that a full worker that exchanges blocks never seems to have too many."""
        self._index.remove(self._row, tier, removed)
        room = self._index.room(self._row, tier)
        if tier is not Tier.DEVICE and room is not None and len(stored) > HASH_BYTES * room:
            self._crowded = True
            return True
        return self._index.store(self._row, tier, stored)

    def _fault(self, kind: str) -> None:
        self._faults[kind] += 1
        self.in_step = False
