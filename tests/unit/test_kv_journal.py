"""The journal of a cache: net changes, in order, that stay few however long nobody asks."""

from __future__ import annotations

from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.journal import Changes, Journal
from bascule.types import BlockHash

A, B, C = (BlockHash(bytes([letter]) * 16) for letter in b"abc")
SIZE = 2
HASHER = BlockHasher("model", SIZE)


def test_what_comes_and_goes_between_two_drains_leaves_no_trace() -> None:
    journal = Journal()
    journal.stored(A)
    journal.stored(B)
    journal.removed(A)
    changes = journal.drain()
    assert (changes.stored, changes.removed) == ([B], [])
    journal.removed(B)
    journal.stored(B)
    changes = journal.drain()
    assert (changes.stored, changes.removed) == ([], [])


def test_a_drain_tells_everything_once_and_keeps_the_order() -> None:
    journal = Journal()
    for name in (C, A, B):
        journal.stored(name)
    assert journal.drain().stored == [C, A, B]
    journal.removed(C)
    assert journal.drain().removed == [C]
    assert journal.drain().removed == []


def test_a_cleared_journal_has_forgotten() -> None:
    journal = Journal()
    journal.stored(A)
    journal.clear()
    assert journal.drain().stored == []


def fill(books: Books, seed: int) -> list[BlockHash]:
    """Compute a prompt that takes all blocks, and let it go."""
    tokens = [seed + position for position in range(books.num_blocks * SIZE)]
    names = HASHER.chain(tokens)
    lease = books.acquire([], [], books.num_blocks)
    assert lease is not None
    lease.seal(0, names, tokens)
    lease.release()
    return names


def test_books_that_nobody_asks_remember_no_more_than_they_hold() -> None:
    books = Books(8, SIZE)
    first = fill(books, 0)
    assert books.changes().stored == first
    for seed in range(1, 50):
        latest = fill(books, seed * 1000)
    changes = books.changes()
    assert set(changes.removed) == set(first)
    assert changes.stored == latest


def test_an_inventory_is_all_that_is_findable_and_changes_follow_it() -> None:
    books = Books(8, SIZE)
    names = fill(books, 0)
    found, untold = books.inventory()
    assert (found, untold.stored, untold.removed) == (names, names, [])
    assert books.changes().stored == []
    assert books.inventory() == (names, Changes([], []))
    again = fill(books, 1000)
    changes = books.changes()
    assert (changes.stored, set(changes.removed)) == (again, set(names))
