"""Keeps a folder of blocks within its bound: measures it now and then, counts own writes in between, evicts.

Several processes may do so on one folder. Each measures it again after writing 1/32 of the bound, so together they
exceed it by no more than that for each process but one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread

from msgspec import Struct

from bascule.kv.store.base import Fault, Tally
from bascule.kv.store.folder import Entry, Folder, Marks
from bascule.policies.evict import PROTECTED_SHARE, first_to_go

log = logging.getLogger(__name__)

_SLACK_PARTS = 32
_RELIEF_PARTS = 16
"""Of what is there, one part is evicted where the file system is full: others' files fill it, perhaps."""
_HELPLESS_S = 60.0
"""For so long nothing more is evicted for a file system that is full all the same."""
_REST_S = 30.0
"""Between measurements of a folder that is in use but not written to much, and between looks at an idle one."""
_GRAIN_S = 5.0
"""No file system's clock is coarser: a folder with the same marks for so long has others with the next change."""
_LOCK_PATIENCE_S = 1.0
_FIRST_MEASUREMENT_S = 2.0
"""What a start waits for it at most; it then ends in the background."""
_LAST_MEASUREMENT_S = 1.0
"""What `close` waits for one that is under way at most."""
LEFT_OVER_S = 1.0
"""Between two looks of an audit, in which a call that is under way gets on."""
_PROOFS = 2
"""Measurements after which figures must still be wrong: one may fall into what others put there and take away."""
_MOST_LOOKS = 4
"""Of one audit, while others change the folder all the time; then nothing is said until we have changed it again."""


class Contents(Struct, frozen=True):
    """What the folder holds, as far as this process knows."""

    blocks: int
    bytes: int


class _Look(Struct):
    """What an audit has seen that may be wrong, or may be of a moment."""

    changes: int
    """Of our own until then: with one more of them it starts anew."""
    at: float
    """Monotonic seconds."""
    begun: int
    """Measurements that had begun."""
    there: Contents | None = None
    """What the folder held; None where it was not measured."""
    number: int = 1
    """Of looks since our own last change, each of which has found another folder."""
    wrong: int = 0
    """Measurements since then after which the accounts were still not what the folder holds."""


class Keeper:
    """The accounts of a folder with at most `capacity` bytes of blocks, and the thread that measures and evicts."""

    def __init__(self, folder: Folder, capacity: int, tally: Tally) -> None:
        self.capacity = capacity
        self._folder = folder
        self._tally = tally
        self._slack = capacity // _SLACK_PARTS
        self._changed = Condition()
        self._blocks = 0
        self._bytes = 0
        self._waiting = 0
        """Bytes that writers wait to have room for."""
        self._pressed = 0
        """Bytes that the file system had no room for."""
        self._relieved_at = -math.inf
        """When room was last made for those, in monotonic seconds; long ago where a block has found room since."""
        self._fresh = 0
        """Bytes written since the last measurement began."""
        self._flying: dict[str, int] = {}
        self._recent: dict[str, int | None] = {}
        """Own changes that a measurement under way may or may not see: sizes, None for what was removed."""
        self._changes = 0
        """What this process has reserved, written, removed or given up, each counted."""
        self._begun = self._accounted = 0
        """Measurements that have begun, and the number of the latest that has ended."""
        self._clean = -1
        """The number of changes with which an audit last came to its end; -1 where another is due."""
        self._look: _Look | None = None
        self._marks: Marks | None = None
        """The folder's when the latest measurement began; of the keeper's thread alone, like the two below."""
        self._marked_at = -math.inf
        """When a measurement first found these, in monotonic seconds."""
        self._settled = False
        """Whether one has found them again since, too late for changes that leave them as they are."""
        self._due = True
        self._closed = False
        self._measured = Event()
        self._thread = Thread(target=self._run, name="kv-store keeper", daemon=True)
        self._thread.start()
        self._measured.wait(_FIRST_MEASUREMENT_S)

    def contents(self) -> Contents:
        with self._changed:
            return Contents(max(0, self._blocks), max(0, self._bytes))

    def reserve(self, name: str, size: int, deadline: float) -> bool:
        """Room for a block, to be told to `written` or `failed`; waits for it until `deadline` (monotonic seconds)."""
        if size > self.capacity:
            return False
        with self._changed:
            self._waiting += size
            self._changes += 1
            try:
                while self._bytes + size > self.capacity:
                    self._ask()
                    remaining = deadline - time.monotonic()
                    if self._closed or remaining <= 0 or not self._changed.wait(remaining):
                        return False
            finally:
                self._waiting -= size
                self._changes += 1
            self._bytes += size
            self._fresh += size
            self._flying[name] = self._recent[name] = size
            if self._fresh > self._slack:
                self._ask()
            return True

    def written(self, name: str, replaced: int | None) -> None:
        """What was reserved is there, in place of a block of `replaced` bytes, if any."""
        with self._changed:
            self._changes += 1
            self._relieved_at = -math.inf
            self._flying.pop(name, None)
            self._bytes -= replaced or 0
            self._blocks += replaced is None

    def failed(self, name: str, size: int, fault: Fault | None = None) -> None:
        """What was reserved is not there, because of `fault` or because nobody has tried."""
        with self._changed:
            self._changes += 1
            self._flying.pop(name, None)
            self._recent.pop(name, None)
            self._bytes -= size
            if fault is Fault.FULL:  # the file system's own bound comes before ours: make room within it
                self._press(size)

    def _press(self, size: int) -> None:
        if time.monotonic() - self._relieved_at >= _HELPLESS_S:
            self._pressed += size
            self._ask()

    def removed(self, name: str, size: int) -> None:
        with self._changed:
            self._changes += 1
            self._bytes -= size
            self._blocks -= 1
            self._recent[name] = None

    def check_integrity(self, measure: Callable[[], Contents | None]) -> list[str]:
        """What is wrong with the accounts; empty if nothing is, or nothing can be said yet. Call it now and then, from
        one thread, while this process neither writes nor removes.

        One look is no proof, as a call may just be on its way, and other processes change the folder too. So wrong is
        what later looks find again: a reservation, a second later, while nothing else was done; figures that are
        not the folder's though they were measured anew twice, and the folder is as it was. `measure` says what it
        holds, None if that cannot be found out now, and is asked only where we have changed something since the last
        audit, or where the keeper has found the folder changed and then at rest. What others have changed until then
        is not in the figures yet, and no fault.
        """
        with self._changed:
            changes, flying, waiting = self._changes, sum(self._flying.values()), self._waiting
            if not (flying or waiting) and changes == self._clean:
                return []
        if flying or waiting:
            return self._left_over(changes, flying, waiting)
        if (there := measure()) is None:
            return []
        with self._changed:
            return self._compare(there) if changes == self._changes else []

    def _left_over(self, changes: int, flying: int, waiting: int) -> list[str]:
        now, before = time.monotonic(), self._look
        if before is None or before.changes != changes:
            self._look = _Look(changes, now, self._begun)
            return []
        if now - before.at < LEFT_OVER_S:
            return []
        return [f"{flying} bytes are reserved and {waiting} waited for, and nobody writes"]

    def _compare(self, there: Contents) -> list[str]:
        """With the lock: our figures with the folder's, nothing of ours being under way."""
        ours, before = Contents(self._blocks, self._bytes), self._look
        if ours == there:
            self._clean, self._look = self._changes, None
            return []
        self._ask()
        if before is None or before.changes != self._changes or before.there != there:
            number = before.number + 1 if before is not None and before.changes == self._changes else 1
            self._look = _Look(self._changes, time.monotonic(), self._begun, there, number)
            if number >= _MOST_LOOKS:
                self._clean, self._look = self._changes, None
            return []
        if self._accounted > before.begun:
            before.wrong, before.begun = before.wrong + 1, self._begun
        if before.wrong < _PROOFS:
            return []
        return [
            f"{ours.blocks} blocks of {ours.bytes} bytes are in the accounts, {there.blocks} of {there.bytes} there"
        ]

    def close(self) -> None:
        """End the thread, and leave the folder alone from then on, unless it hangs. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_LAST_MEASUREMENT_S)

    def _ask(self) -> None:
        if not self._due:
            self._due = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closed, timeout=_REST_S)
                wanted = self._due or self._closed or bool(self._recent)
            if not wanted and not self._stale():
                continue
            with self._changed:
                if self._closed:
                    return
                self._due = False
                self._begun += 1
                self._fresh = 0
                self._recent = dict(self._flying)
            try:
                self._tidy()
            except OSError as error:
                log.debug("KV store: cannot measure or evict: %s", error)  # writers see it too, and count it
            except Exception:
                log.exception("KV store: the folder's accounts are wrong")
            self._measured.set()

    def _stale(self) -> bool:
        """Whether others may have changed the folder since the latest measurement."""
        try:
            return not self._settled or self._folder.marks() != self._marks
        except OSError:
            return True

    def _tidy(self) -> None:
        with self._folder.locked(_LOCK_PATIENCE_S) as ours:
            began, marks = time.monotonic(), self._folder.marks()
            entries = self._folder.scan()
            self._account(entries)
            self._settle(marks, began)
            if ours:
                self._evict(entries)
                self._folder.remove_abandoned()

    def _settle(self, marks: Marks, began: float) -> None:
        """The folder had these marks when its measurement `began`, which has ended well."""
        if marks != self._marks:
            self._marks, self._marked_at, self._settled = marks, began, False
        elif not self._settled and began - self._marked_at >= _GRAIN_S:
            self._settled = True
            with self._changed:
                self._clean = -1

    def _account(self, entries: Sequence[Entry]) -> None:
        with self._changed:
            known = [entry.size for entry in entries if entry.name not in self._recent]
            own = {name: size for name, size in self._recent.items() if size is not None}
            self._bytes = sum(known) + sum(own.values())
            self._blocks = len(known) + len(own.keys() - self._flying.keys())
            self._accounted = self._begun
            self._changed.notify_all()

    def _evict(self, entries: list[Entry]) -> None:
        """Remove blocks until there is room for those who wait, and some more.

        What we have changed since the measurement began is left for the next one, and so are the protected, before
        which it may have to go.
        """
        with self._changed:
            goal = self._goal()
            surplus = self._bytes - goal if goal is not None else 0
            recent = set(self._recent)
        if surplus <= 0:
            return
        evicted = 0
        others, spared = first_to_go(entries, int(PROTECTED_SHARE * self.capacity))
        for entry in others if recent else others + spared:
            if surplus <= 0:
                break
            if entry.name not in recent and self._folder.evict(entry):
                surplus -= entry.size
                evicted += 1
                with self._changed:
                    self._changes += 1
                    self._bytes -= entry.size
                    self._blocks -= 1
        self._tally.evicted(evicted)
        with self._changed:
            self._changed.notify_all()

    def _goal(self) -> int | None:
        """Bytes to come down to; None where there is no need to."""
        goal, pressed = self._bytes, self._pressed
        if pressed:
            self._pressed, self._relieved_at = 0, time.monotonic()
            goal -= pressed + self._bytes // _RELIEF_PARTS
        if self._bytes > self.capacity - self._slack or self._bytes + self._waiting > self.capacity:
            goal = min(goal, self.capacity - 2 * self._slack, self.capacity - self._waiting)
        return max(0, goal) if goal < self._bytes else None
