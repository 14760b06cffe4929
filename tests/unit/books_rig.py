"""Prompts, and leases of the blocks that hold them."""

from __future__ import annotations

from bascule.kv.books import Books, Lease
from bascule.kv.hashing import BlockHasher

SIZE = 4
HASHER = BlockHasher("model", SIZE)


def prompt(blocks: int, seed: int = 0) -> list[int]:
    return [1000 * seed + position for position in range(blocks * SIZE)]


def take(books: Books, total: int, room: int = 0) -> Lease:
    lease = books.acquire([], [], total, room)
    assert lease is not None
    return lease


def find(books: Books, tokens: list[int], total: int, room: int = 0) -> Lease:
    lease = books.acquire(HASHER.chain(tokens), tokens, total, room)
    assert lease is not None
    return lease


def seal(lease: Lease, tokens: list[int], start: int = 0) -> None:
    lease.seal(start, HASHER.chain(tokens)[start:], tokens[start * SIZE :])


def cache(books: Books, tokens: list[int]) -> list[int]:
    """Leave the blocks of `tokens` cached; returns them."""
    with take(books, len(tokens) // SIZE) as lease:
        seal(lease, tokens)
        return list(lease.blocks)
