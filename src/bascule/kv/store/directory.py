"""The `host` and `disk` tiers: blocks as files of a bounded directory, which other processes and hosts may share."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from bascule.kv.store.base import Blob, Fault, StoreStats, Tally, Use
from bascule.kv.store.folder import Entry, Folder, TooLarge, fault_of
from bascule.kv.store.gate import Gate, Step
from bascule.kv.store.keeper import Contents, Keeper
from bascule.types import BlockHash, Tier

log = logging.getLogger(__name__)

TIMEOUT_S = 0.5
_CLOCK_S = 600.0
"""Between two looks at the file system's clock."""
_SILENCE_S = 60.0
"""Between two lines in the log about a tier that fails."""
_READ_LANES, _WRITE_LANES = 4, 2
LARGEST = 256 << 20
"""Bytes of a block: some dozen of tokens of any model are less, and what is more was put there by somebody else."""
_STEPS_PER_LANE = 8
"""Fewer are not worth another thread."""


class DirectoryStore:
    """At most `capacity` bytes of blocks in `directory`; what goes first, `policies.evict.first_to_go` says.

    Several stores on one directory exceed the bound by at most 1/32 each.
    Reads and writes of the disk tier go through threads, apart from each other, so that a file system that hangs is
    waited for `timeout_s` at most and slow writes hold up no reads; those of the host tier, which is RAM, do not.
    """

    def __init__(
        self,
        directory: Path,
        capacity: int,
        tier: Tier = Tier.DISK,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`places.host_store` and `places.disk_store` check what they are given; this raises OSError as it comes."""
        self.tier = tier
        self._patience_s = timeout_s / 2
        self._zero_ns = time.time_ns() - time.monotonic_ns()
        """Where our monotonic clock begins, by the file system's."""
        self._zero_due = -math.inf
        self._silent_until = -math.inf
        self._folder = Folder(directory, min(capacity, LARGEST))
        self._folder.prepare()
        self.place = self._folder.identity()
        self._tally = Tally()
        self._keeper = Keeper(self._folder, capacity, self._tally)
        self._reads, self._writes = (
            Gate(
                f"the {tier} tier ({use})",
                lanes=0 if tier is Tier.HOST else lanes,
                timeout_s=timeout_s,
                classify=fault_of,
                probe=self._folder.check,
            )
            for use, lanes in (("reading", _READ_LANES), ("writing", _WRITE_LANES))
        )

    def put(self, items: Mapping[BlockHash, Blob]) -> int:
        deadline = time.monotonic() + self._patience_s
        reserved: dict[BlockHash, Blob] = {}
        for name, data in items.items():
            if len(data) <= LARGEST and self._keeper.reserve(name.hex(), len(data), deadline):
                reserved[name] = data
            else:
                self._tally.failed(Fault.FULL)
        taken: list[BlockHash] = []
        self._run(self._writes, [partial(self._write, name, reserved, taken) for name in reserved])
        for name in list(reserved):
            if (data_left := reserved.pop(name, None)) is not None:
                self._keeper.failed(name.hex(), len(data_left))
        return len(taken)

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        answers = self.peek(names)
        self._tally.answered(answers)
        return answers

    def peek(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(names)
        self._run(self._reads, [partial(self._read, name, index, found) for index, name in enumerate(names)])
        return list(found)  # a step that was given up may still write to the other

    def holds(self, names: Sequence[BlockHash]) -> list[bool]:
        answers = [False] * len(names)
        self._run(self._reads, [partial(self._look, name, index, answers) for index, name in enumerate(names)])
        return list(answers)

    def touch(self, uses: Sequence[Use]) -> list[bool]:
        answers = [False] * len(uses)
        self._run(self._writes, [partial(self._touch, use, index, answers) for index, use in enumerate(uses)])
        return list(answers)

    def names(self) -> Iterator[list[BlockHash]]:
        for page in self._pages():
            if page:
                yield [BlockHash(bytes.fromhex(entry.name)) for entry in page]

    def drop(self, names: Sequence[BlockHash]) -> None:
        self._run(self._writes, [partial(self._remove, name.hex()) for name in names])

    def stats(self) -> StoreStats:
        contents = self._keeper.contents()
        return self._tally.stats(blocks=contents.blocks, size=contents.bytes, capacity=self._keeper.capacity)

    def check_integrity(self) -> list[str]:
        """As the keeper finds. Writes that hang keep what they have reserved, as they should."""
        return [] if self._writes.busy else self._keeper.check_integrity(self._measure)

    def clear(self) -> None:
        for page in self.names():
            self.drop(page)

    def close(self) -> None:
        self._reads.close()
        self._writes.close()
        self._keeper.close()

    def _run(self, gate: Gate, steps: Sequence[Step]) -> None:
        """Run steps, spread over the lanes, and count those that were not."""
        share = max(1, min(gate.lanes, len(steps) // _STEPS_PER_LANE))
        parts = [steps[first::share] for first in range(share)]
        for part, job in [(part, gate.start(part)) for part in parts if part]:
            if job is None:
                self._tally.failed(Fault.CLOSED if gate.closed else Fault.SKIPPED, len(part))
            elif fault := gate.finish(job):
                self._tally.failed(fault, len(part) - job.completed)

    def _note(self, fault: Fault) -> None:
        """Count a block that was not read or taken, and say so in the log now and then."""
        self._tally.failed(fault)
        now = time.monotonic()
        if now > self._silent_until:
            self._silent_until = now + _SILENCE_S
            log.warning("KV store: the %s tier is %s; what it does not give or take is computed", self.tier, fault)

    def _write(self, name: BlockHash, reserved: dict[BlockHash, Blob], taken: list[BlockHash]) -> None:
        """Write a block, unless `put` has taken its reservation back."""
        data = reserved.pop(name, None)
        if data is None:
            return
        key, size = name.hex(), len(data)
        try:
            replaced = self._folder.write(name, data)
        except OSError as error:
            fault = fault_of(error)
            self._keeper.failed(key, size, fault)
            self._note(fault)
        else:
            self._keeper.written(key, replaced)
            taken.append(name)

    def _read(self, name: BlockHash, index: int, answers: list[bytes | None]) -> None:
        try:
            answers[index] = self._folder.read(name)
            if answers[index] is None:
                self._folder.check()
        except TooLarge as error:
            self._note(fault_of(error))
            self._remove(name.hex())  # nobody else would: it is never read, so never found not to be a block
        except OSError as error:
            self._note(fault_of(error))

    def _look(self, name: BlockHash, index: int, answers: list[bool]) -> None:
        try:
            answers[index] = self._folder.holds(name)
        except OSError as error:
            self._note(fault_of(error))

    def _touch(self, use: Use, index: int, answers: list[bool]) -> None:
        try:
            answers[index] = self._folder.touch(use.name, self._zero() + int(use.at * 1e9), use.again)
        except OSError as error:
            if (fault := fault_of(error)) is Fault.DENIED:  # what is there can be used, if not marked
                self._look(use.name, index, answers)
            else:
                self._note(fault)

    def _zero(self) -> int:
        """Nanoseconds by the file system's clock; several hosts, whose own clocks differ, may share it."""
        if (now := time.monotonic()) >= self._zero_due:
            self._zero_due = now + _CLOCK_S
            with suppress(OSError):  # a full one tells no time
                self._zero_ns = self._folder.now_ns() - int(now * 1e9)
        return self._zero_ns

    def _remove(self, key: str) -> None:
        try:
            size = self._folder.remove(key)
        except OSError as error:
            self._note(fault_of(error))
        else:
            if size is not None:
                self._keeper.removed(key, size)

    def _pages(self) -> Iterator[list[Entry] | None]:
        """All blocks, a subfolder in each step, as all of them take longer than a step may. Ends with None if it fails
        before all are told."""
        pages = self._folder.pages()
        while True:
            found: list[list[Entry] | None] = []
            self._run(self._reads, [partial(self._list, pages, found)])
            if not found:
                yield None
                return
            if found[0] is None:
                return
            yield found[0]

    def _measure(self) -> Contents | None:
        """What the folder holds; None if it cannot be found out now."""
        blocks = size = 0
        for page in self._pages():
            if page is None:
                return None
            blocks += len(page)
            size += sum(entry.size for entry in page)
        return Contents(blocks, size)

    def _list(self, pages: Iterator[list[Entry]], found: list[list[Entry] | None]) -> None:
        try:
            found.append(next(pages, None))
        except OSError as error:
            self._note(fault_of(error))
