"""The memory that KV lies in: blocks in anonymous shared memory, so that a peer on the same host can write into it."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from msgspec import Struct
from numpy.typing import NDArray

from bascule.errors import BasculeError
from bascule.types import KVLayout

CHECKSUM_BYTES = 8
_AHEAD_BYTES = 64 << 20


class ArenaError(BasculeError):
    """Memory that is not the arena it is said to be."""


class Run(Struct, frozen=True):
    """`count` adjacent blocks from `start` on."""

    start: int
    count: int


def runs(blocks: Sequence[int]) -> list[Run]:
    """Split a block table into its maximal runs of adjacent ascending ids, in order: [4, 5, 6, 2] -> (4, 3), (2, 1)."""
    found: list[Run] = []
    first = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            found.append(Run(blocks[first], index - first))
            first = index
    return found


def checksums(memory: NDArray[np.uint8], blocks: Sequence[int], bytes_in_last: int) -> list[bytes]:
    """xxh3_64 (8 bytes) of each of `blocks` of `memory`, [planes, blocks, bytes], plane after plane.

    Of the last one only the first `bytes_in_last` bytes of a plane count.
    """
    if not blocks:
        return []
    hashes = [xxhash.xxh3_64() for _ in blocks]
    updates = [digest.update for digest in hashes]
    pieces = list(_pieces(blocks))
    # Plane after plane, as the bytes lie: block after block would be jumps of a few kilobytes, at half the speed.
    for plane in memory:
        for piece, first in pieces:
            for update, row in zip(updates[first:], plane[piece], strict=False):
                update(row)
        updates[-1](plane[blocks[-1], :bytes_in_last])
    return [digest.digest() for digest in hashes]


def _pieces(blocks: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """The runs of all `blocks` but the last, each with its place in `blocks`."""
    first = 0
    for run in runs(blocks[:-1]):
        yield slice(run.start, run.start + run.count), first
        first += run.count


class Arena:
    """`num_blocks` blocks of one layout, mapped from an anonymous shared file.

    `bytes` is writable, [planes, num_blocks, block_size * token_bytes]. The memory lives until the last array that
    views it is gone, in this process or in a peer's.
    """

    def __init__(self, fd: int, layout: KVLayout, num_blocks: int, memory: mmap.mmap) -> None:
        """Use `create` or `attach`."""
        self.fd = fd
        self.layout = layout
        self.num_blocks = num_blocks
        self._closed = False
        shape = (layout.planes, num_blocks, layout.plane_block_bytes)
        self.bytes: NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
        self._prepared = 0
        self.prepare(0)

    @classmethod
    def create(cls, layout: KVLayout, num_blocks: int) -> Arena:
        """New zeroed memory of `num_blocks * layout.block_bytes` bytes; its size is sealed.

        Raises ArenaError if there is nothing to hold or the machine refuses the memory.
        """
        size = _size(layout, num_blocks)
        fd = os.memfd_create("bascule-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, layout, num_blocks, mmap.mmap(fd, size, mmap.MAP_SHARED))
        except OSError as error:
            os.close(fd)
            raise ArenaError(f"cannot map {size} bytes for KV ({error}); give less KV memory") from error

    @classmethod
    def attach(cls, fd: int, layout: KVLayout, num_blocks: int) -> Arena:
        """Map a peer's arena; takes ownership of `fd`.

        A child forked later does not inherit the mapping, so the end of this process is the end of its writes.
        Raises ArenaError if the file cannot be mapped or its size is not that of `num_blocks` blocks of `layout`.
        """
        try:
            size, actual = _size(layout, num_blocks), os.fstat(fd).st_size
            if size != actual:
                raise ArenaError(f"the peer's arena has {actual} bytes, but {num_blocks} blocks need {size}")
            memory = mmap.mmap(fd, size, mmap.MAP_SHARED)
            memory.madvise(mmap.MADV_DONTFORK)
        except OSError as error:
            os.close(fd)
            raise ArenaError(f"cannot map the peer's arena: {error}") from error
        except ArenaError:
            os.close(fd)
            raise
        return cls(fd, layout, num_blocks, memory)

    def prepare(self, through: int) -> None:
        """Have the blocks below `through`, and some behind them, mapped in the background; returns at once.

        The first use of a page is ten times slower than any other. All memory mapped at the start would be simpler, and
        an idle worker would hold it all.
        """
        ahead = max(1, _AHEAD_BYTES // self.layout.block_bytes)
        target = min(through + ahead, self.num_blocks)
        if target - self._prepared > ahead // 2 or target == self.num_blocks > self._prepared:
            begin, self._prepared = self._prepared, target
            blocks = self.bytes[:, begin:target]
            if blocks.size:  # a closed arena has none
                with suppress(RuntimeError):  # no more threads to be had; the memory is only slower at first
                    Thread(target=_touch, args=(blocks,), name="kv-touch", daemon=True).start()

    def checksum(self, block: int, tokens: int) -> bytes:
        """xxh3_64 (8 bytes) over the first `tokens` tokens of `block` in all planes, plane after plane."""
        return self.checksums([block], tokens)[0]

    def checksums(self, blocks: Sequence[int], tokens_in_last: int) -> list[bytes]:
        """`checksum` of each of `blocks`, all of them full but the last, which holds `tokens_in_last` tokens."""
        if blocks and not 0 < tokens_in_last <= self.layout.block_size:
            raise ValueError(f"a block holds 1 to {self.layout.block_size} tokens, not {tokens_in_last}")
        return checksums(self.bytes, blocks, tokens_in_last * self.layout.token_bytes)

    def close(self) -> None:
        """Give up the file and this object's view; arrays that were handed out stay valid. Idempotent."""
        if not self._closed:
            self._closed = True
            self.bytes = self.bytes[:, :0].copy()
            os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _size(layout: KVLayout, num_blocks: int) -> int:
    if num_blocks < 1 or layout.block_bytes < 1:
        raise ArenaError(f"an arena holds at least one block of one byte, not {num_blocks} of {layout.block_bytes}")
    return num_blocks * layout.block_bytes


def _touch(blocks: NDArray[np.uint8]) -> None:
    """Read a byte of every page of `blocks` [planes, blocks, bytes]."""
    for plane in blocks:
        plane.reshape(-1)[:: mmap.PAGESIZE].max()
