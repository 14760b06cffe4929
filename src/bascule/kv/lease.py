"""The right to a sequence's blocks: the only way in which blocks of the `Books` are held, written and given back."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from bascule.errors import BasculeError
from bascule.types import BlockHash, Salt

if TYPE_CHECKING:
    from bascule.kv.books import Books

_UNFORESEEN_ROOM = 4
"""Blocks to look for behind a sequence that has outgrown the room foreseen for it: it probably goes on."""


class LeaseError(BasculeError):
    """A lease used after its end, or in a way that would make the books lie."""


class CachedBlock(Struct, frozen=True):
    """A block in the prefix cache and the tokens whose KV it holds."""

    block: int
    hash: BlockHash
    tokens: tuple[int, ...]
    salt: Salt = b""


class LeaseState(StrEnum):
    HELD = "held"
    QUARANTINED = "quarantined"
    RELEASED = "released"


class Lease:
    """The right to a sequence's blocks; made by `Books.acquire`. As a context manager it releases at the end."""

    def __init__(self, books: Books, number: int, pinned: list[int], room: int) -> None:
        self.cached = len(pinned)
        """How many leading blocks came from the cache: shared, not to be written."""
        self._books = books
        self._number = number
        self._blocks = pinned
        self._copies: dict[int, CachedBlock] = {}
        """By block, what was sealed while another block was found by its hash."""
        self._room = room
        self._kept = range(0)
        self._state = LeaseState.HELD

    @property
    def blocks(self) -> list[int]:
        """The block table (grows in place with `extend`; not to be altered)."""
        self._require_held("read")
        return self._blocks

    def extend(self, count: int) -> bool:
        """Append `count` fresh blocks, directly behind the last where possible; False (nothing changed) if too few."""
        books = self._books
        with books._lock:
            self._require_held("extended")
            if count > books._count_free() + len(books._evictable):
                return False
            self._room = max(self._room - count, _UNFORESEEN_ROOM)
            books._grow(self, count)
            return True

    def seal(self, start: int, hashes: Sequence[BlockHash], tokens: Sequence[int], salt: Salt = b"") -> None:
        """Make the blocks at `start`, `start + 1`, ... of the table findable under `hashes`.

        They must be full, verified and never written again; `tokens` are the `block_size` ids of each of them, and
        `salt` what they were hashed with. A hash that another block already has stays with that block. Sealing a block
        again under its hash changes nothing.
        """
        books, size = self._books, self._books.block_size
        with books._lock:
            self._require_held("sealed")
            if len(tokens) != len(hashes) * size or not 0 <= start <= start + len(hashes) <= len(self._blocks):
                raise LeaseError(
                    f"cannot seal {len(hashes)} blocks from {start} on with {len(tokens)} tokens: "
                    f"{self} has {len(self._blocks)} blocks of {size} tokens"
                )
            for index, name in enumerate(hashes):
                block = self._blocks[start + index]
                known = books._by_block.get(block) or self._copies.get(block)
                if known is not None and known.hash != name:
                    raise LeaseError(f"block {block} is sealed as {known.hash.hex()} and cannot become {name.hex()}")
                if known is None:
                    entry = CachedBlock(block, name, tuple(tokens[index * size : (index + 1) * size]), salt)
                    if name in books._by_hash:
                        self._copies[block] = entry
                    else:
                        books._enter(entry)

    def swap(self, places: range, hashes: Sequence[BlockHash], tokens: Sequence[int]) -> int:
        """Take the cached blocks of `hashes` instead of its own at `places` of the table, which become free.

        `hashes` and `tokens` are those of the whole table, from place 0 on. Goes through `places` in their order, up to
        the first whose hash is not cached with these ids, and returns how many it got through. What it takes is shared,
        not to be written; a place whose block is found by its hash already stays as it is. Raises LeaseError before a
        block of its own that is sealed, which others may have found.
        """
        books, size = self._books, self._books.block_size
        with books._lock:
            self._require_held("changed")
            for done, place in enumerate(places):
                entry = books._by_hash.get(hashes[place])
                if entry is None or entry.tokens != tuple(tokens[place * size : (place + 1) * size]):
                    return done
                if (own := self._blocks[place]) != entry.block:
                    if own in books._by_block or own in self._copies:
                        raise LeaseError(f"block {own} of {self} is sealed: it cannot be swapped for {entry.block}")
                    books._share(entry.block)
                    books._give_up(own)
                    self._blocks[place] = entry.block
                    if place == len(self._blocks) - 1:
                        books._give_up_room(self)
            return len(places)

    def release(self) -> None:
        """Let go of all blocks: sealed ones stay cached. Idempotent; what is quarantined stays so until `lift`."""
        with self._books._lock:
            if self._state is LeaseState.HELD:
                self._books._let_go(self._blocks, self._copies)
                self._end()

    def quarantine(self) -> None:
        """Put the lease's own fresh blocks out of use until `lift`, and let the pinned shared ones go. Idempotent.

        Raises LeaseError if one of its own blocks is sealed, or was swapped for one that is: others may already read
        it, so it is too late.
        """
        books = self._books
        with books._lock:
            if self._state is LeaseState.QUARANTINED:
                return
            self._require_held("quarantined")
            fresh = self._blocks[self.cached :]
            if any(block in books._by_block for block in fresh):
                raise LeaseError(f"{self} has sealed blocks of its own, which others may read; it can only be released")
            books._let_go(self._blocks[: self.cached], {})
            books._give_up_room(self)
            books._quarantined.update(fresh)
            for block in fresh:
                books._holders[block] = 0
            self._blocks = fresh
            self._state = LeaseState.QUARANTINED

    def lift(self) -> None:
        """End the quarantine: nobody can write the blocks any more, they become free. Idempotent.

        Raises LeaseError if the blocks are held and not quarantined.
        """
        books = self._books
        with books._lock:
            if self._state is LeaseState.HELD:
                raise LeaseError(f"{self} is not quarantined; quarantine it before asking whether its writer is gone")
            if self._state is LeaseState.QUARANTINED:
                books._quarantined.difference_update(self._blocks)
                books._free[self._blocks] = True
                self._end()

    def _end(self) -> None:
        self._books._give_up_room(self)
        del self._books._leases[self._number]
        self._state = LeaseState.RELEASED

    def _require_held(self, verb: str) -> None:
        if self._state is not LeaseState.HELD:
            raise LeaseError(f"{self} cannot be {verb}: it is {self._state}")

    def __str__(self) -> str:
        return f"lease {self._number}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
