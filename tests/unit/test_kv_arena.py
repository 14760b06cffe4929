"""Arenas: shared memory, runs of adjacent blocks, checksums."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import xxhash

from bascule.kv.arena import Arena, ArenaError, Run, runs
from bascule.types import KVLayout

LAYOUT = KVLayout("float32", layers=2, kv_heads=1, head_dim=8, block_size=4, planes=4, token_bytes=32)


@pytest.fixture
def arena() -> Arena:
    arena = Arena.create(LAYOUT, 6)
    arena.bytes[:] = np.random.default_rng(0).integers(0, 256, arena.bytes.shape, np.uint8)
    return arena


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([], []),
        ([7], [Run(7, 1)]),
        ([4, 5, 6, 2], [Run(4, 3), Run(2, 1)]),
        ([3, 2, 1], [Run(3, 1), Run(2, 1), Run(1, 1)]),
        ([0, 1, 1, 2], [Run(0, 2), Run(1, 2)]),
    ],
)
def test_runs_are_maximal_and_in_order(blocks: list[int], expected: list[Run]) -> None:
    assert runs(blocks) == expected


def test_a_new_arena_is_zero_and_has_the_layouts_shape() -> None:
    with Arena.create(LAYOUT, 6) as arena:
        assert arena.bytes.shape == (4, 6, 128)
        assert not arena.bytes.any()
        assert os.fstat(arena.fd).st_size == 6 * LAYOUT.block_bytes


def test_what_one_mapping_writes_the_other_reads(arena: Arena) -> None:
    with Arena.attach(os.dup(arena.fd), LAYOUT, 6) as peer:
        assert np.array_equal(peer.bytes, arena.bytes)
        peer.bytes[2, 3, 4:8] = 99
        assert (arena.bytes[2, 3, 4:8] == 99).all()


def test_a_file_of_another_size_is_not_attached_and_not_leaked(arena: Arena) -> None:
    fd = os.dup(arena.fd)
    with pytest.raises(ArenaError, match="3072 bytes, but 7 blocks need 3584"):
        Arena.attach(fd, LAYOUT, 7)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_peer_cannot_shrink_the_memory(arena: Arena) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 1)


def test_an_arena_of_nothing_is_refused() -> None:
    with pytest.raises(ArenaError, match="at least one block"):
        Arena.create(LAYOUT, 0)


def test_views_outlive_close(arena: Arena) -> None:
    view, fd = arena.bytes, arena.fd
    arena.close()
    arena.close()
    view[:] = 5
    assert (view == 5).all()
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_checksum_covers_the_first_tokens_in_all_planes_and_no_more(arena: Arena, tokens: int) -> None:
    data = b"".join(arena.bytes[plane, 2, : tokens * 32].tobytes() for plane in range(4))
    before = arena.checksum(2, tokens)
    assert before == xxhash.xxh3_64_digest(data)
    if tokens < 4:
        arena.bytes[:, 2, tokens * 32 :] ^= 1
    arena.bytes[:, 1] ^= 1
    assert arena.checksum(2, tokens) == before
    arena.bytes[3, 2, tokens * 32 - 1] ^= 1
    assert arena.checksum(2, tokens) != before


@pytest.mark.parametrize("in_last", [1, 4])
def test_many_checksums_are_those_of_each(arena: Arena, in_last: int) -> None:
    blocks = [4, 5, 0, 1, 2, 5]
    each = [arena.checksum(block, 4) for block in blocks[:-1]] + [arena.checksum(blocks[-1], in_last)]
    assert arena.checksums(blocks, in_last) == each
    assert arena.checksums([], in_last) == []


def test_many_checksums_over_several_pieces() -> None:
    layout = KVLayout("float32", layers=1, kv_heads=1, head_dim=8, block_size=4, planes=2, token_bytes=1 << 18)
    with Arena.create(layout, 5) as arena:
        arena.bytes[:] = np.arange(5, dtype=np.uint8)[:, None]
        assert arena.checksums([0, 1, 2, 3, 4], 4) == [arena.checksum(block, 4) for block in range(5)]


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_checksum_over_more_or_less_than_a_block_is_an_error(arena: Arena, tokens: int) -> None:
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        arena.checksum(0, tokens)


def resident_bytes(arena: Arena) -> int:
    """Memory behind the arena's file, wherever it was touched."""
    return os.fstat(arena.fd).st_blocks * 512


def test_memory_is_taken_ahead_of_use_not_all_at_once() -> None:
    layout = KVLayout("float32", layers=2, kv_heads=4, head_dim=64, block_size=16, planes=4, token_bytes=1024)
    size = 1 << 30
    with Arena.create(layout, size // layout.block_bytes) as arena:
        first = settled(arena, least=48 << 20)
        assert first < 160 << 20
        arena.prepare(0)
        assert settled(arena, least=first) == first
        arena.prepare(3000)  # blocks of 64 KiB
        grown = settled(arena, least=190 << 20)
        assert grown < 400 << 20
        arena.prepare(arena.num_blocks)
        assert settled(arena, least=size) >= size


def settled(arena: Arena, least: int) -> int:
    """Resident bytes once they have stopped growing at `least` or more."""
    deadline, before = time.monotonic() + 30, -1
    while time.monotonic() < deadline:
        now = resident_bytes(arena)
        if now == before and now >= least:
            return now
        before = now
        time.sleep(0.1)
    raise AssertionError(f"{before} bytes are resident after 30 s, not {least}")
