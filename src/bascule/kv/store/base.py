"""What every tier promises: blocks as bytes by hash, where anything slow, full, gone or broken is a miss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from threading import Lock
from typing import Protocol, TypeAlias

from msgspec import Struct

from bascule.types import BlockHash, Tier

Blob: TypeAlias = bytes | bytearray | memoryview


class Fault(StrEnum):
    """Why a block was not read, taken or dropped."""

    FULL = "full"
    """No room that could be made in time."""
    DENIED = "denied"
    """Read-only, no permission, larger than files may be, wrong password."""
    GONE = "gone"
    """The directory has vanished; the server cannot be reached or hung up."""
    SLOW = "slow"
    """No progress within the timeout."""
    BUSY = "busy"
    """Not begun within the timeout, because nothing else made progress either."""
    SKIPPED = "skipped"
    """Not tried, because the place failed a moment ago."""
    BROKEN = "broken"
    """I/O errors and answers that make no sense."""
    CLOSED = "closed"
    """A call after `close`."""


class Use(Struct, frozen=True):
    """When a block was last used, and how."""

    name: BlockHash
    at: float
    """Monotonic seconds of this machine. Of one prompt's blocks, the one in front is told to be used later."""
    again: bool
    """It was found here or loaded, and not computed anew."""
    depth: int = 0
    """Blocks of its prompt that are in front of it."""


class StoreStats(Struct, frozen=True, kw_only=True):
    """A tier's figures. Contents are as last measured, with this store's own changes since; counts are its own."""

    blocks: int = 0
    bytes: int = 0
    capacity_bytes: int | None = None
    """None where the tier has no bound that is known."""
    hits: int = 0
    misses: int = 0
    """Blocks asked for and not answered, whatever the reason."""
    evictions: int = 0
    errors: dict[Fault, int] = {}
    """Blocks not read, taken or dropped, by reason; a block that is simply not there is none of them."""


class Store(Protocol):
    """One tier. Thread-safe; after construction no method raises.

    No call waits longer than the tier's timeout without progress: what is not done by then counts in `errors` and is a
    miss, or is not taken. The bytes are whatever was put last under that name, or what has become of it: whoever reads
    them unpacks them as a record, which finds out.
    """

    @property
    def tier(self) -> Tier: ...

    @property
    def place(self) -> str:
        """Equal for stores that share what they hold, on whatever machines they are."""
        ...

    def put(self, items: Mapping[BlockHash, Blob]) -> int:
        """Keep blocks, replacing those of the same name; returns how many were taken."""
        ...

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        """The blocks in the order of `names`, None for misses. Whoever uses them tells `touch`."""
        ...

    def peek(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        """What `get` would give; counts neither as hit nor as miss."""
        ...

    def holds(self, names: Sequence[BlockHash]) -> list[bool]:
        """Whether a `get` would probably find each of `names`."""
        ...

    def touch(self, uses: Sequence[Use]) -> list[bool]:
        """Let blocks that are used stay longer; tells which of them are there, as far as that can be said."""
        ...

    def names(self) -> Iterator[list[BlockHash]]:
        """What is there, some at a time, and all of it as far as that can be told now; a block may come twice.

        Other models' blocks are among them.
        """
        ...

    def drop(self, names: Sequence[BlockHash]) -> None:
        """Forget blocks, as far as that is possible now."""
        ...

    def stats(self) -> StoreStats: ...

    def check_integrity(self) -> list[str]:
        """What is wrong with this store's own accounts, as far as that can be said yet; must be empty.

        Called now and then, by one thread, while nothing is put or dropped by this store.
        """
        ...

    def clear(self) -> None:
        """Forget all blocks, other processes' on the same place included, and nothing that is not a block."""
        ...

    def close(self) -> None:
        """Let go of threads and connections; what is stored stays, where it can. Idempotent."""
        ...


class Tally:
    """A store's own counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._hits = 0
        self._misses = 0
        self._evictions = 0
        self._faults: Counter[Fault] = Counter()

    def answered(self, answers: Iterable[object | None]) -> None:
        """Count the answers of a `get`."""
        found = [answer is not None for answer in answers]
        with self._lock:
            self._hits += sum(found)
            self._misses += len(found) - sum(found)

    def evicted(self, blocks: int) -> None:
        with self._lock:
            self._evictions += blocks

    def failed(self, fault: Fault, blocks: int = 1) -> None:
        with self._lock:
            self._faults[fault] += blocks

    def stats(self, *, blocks: int, size: int, capacity: int | None) -> StoreStats:
        """The counts, with what the tier holds: `size` and `capacity` in bytes."""
        with self._lock:
            return StoreStats(
                blocks=blocks,
                bytes=size,
                capacity_bytes=capacity,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                errors={fault: count for fault, count in self._faults.items() if count},
            )
