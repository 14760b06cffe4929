"""What the books evict: never what is held, ends before beginnings, what was used once before what was used again."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from books_rig import HASHER, SIZE, cache, find, prompt, seal, take

from bascule.kv.books import Books, Counts, Lease, LeaseError
from bascule.types import BlockHash


@pytest.fixture
def books() -> Iterator[Books]:
    books = Books(16, SIZE)
    yield books
    assert books.check_integrity() == []


def test_free_blocks_are_used_before_cached_ones(books: Books) -> None:
    cache(books, prompt(4))
    take(books, 12)
    assert books.counts == Counts(0, 4, 12, 0)
    assert books.evictions == 0


def test_the_oldest_prefix_is_evicted_first_and_from_its_end(books: Books) -> None:
    old, new = prompt(4), prompt(4, seed=1)
    cache(books, old)
    cache(books, new)
    take(books, 10).release()
    assert find(books, new, 4).cached == 4
    assert find(books, old, 4).cached == 2
    assert books.evictions == 2


def test_a_prefix_that_was_used_again_is_young(books: Books) -> None:
    old, new = prompt(4), prompt(4, seed=1)
    cache(books, old)
    cache(books, new)
    find(books, old, 4).release()
    take(books, 12).release()
    assert find(books, old, 4).cached == 4
    assert find(books, new, 4).cached == 0


def test_what_an_acquisition_pins_it_does_not_evict(books: Books) -> None:
    tokens = prompt(8)
    cache(books, tokens)
    take(books, 8)
    assert books.acquire(HASHER.chain(tokens), tokens, 9) is None
    assert books.counts == Counts(0, 8, 8, 0)
    lease = find(books, tokens[: 4 * SIZE], 8)
    assert lease.cached == 4
    assert len(set(lease.blocks)) == 8


def test_a_failed_acquisition_does_not_make_its_prefix_young(books: Books) -> None:
    old, new = prompt(4), prompt(4, seed=1)
    cache(books, old)
    cache(books, new)
    assert books.acquire(HASHER.chain(old), old, 17) is None
    take(books, 12).release()
    assert find(books, new, 4).cached == 4


def test_a_scan_larger_than_the_cache_leaves_a_prefix_that_is_used_again_and_again(books: Books) -> None:
    system = prompt(3)
    for seed in range(1, 4):
        with find(books, system + prompt(1, seed), 4) as lease:
            seal(lease, system + prompt(1, seed))
    for seed in range(10, 20):
        cache(books, prompt(8, seed))
    assert find(books, system, 3).cached == 3


def test_a_scan_larger_than_the_cache_evicts_a_prefix_that_was_used_once(books: Books) -> None:
    cache(books, prompt(3))
    for seed in range(10, 13):
        cache(books, prompt(8, seed))
    assert find(books, prompt(3), 3).cached == 0


def test_a_shared_prefix_outlives_its_suffixes_however_they_were_used(books: Books) -> None:
    system = prompt(4)
    suffixes = [system + prompt(2, seed) for seed in (1, 2, 3)]
    for tokens in suffixes:
        cache(books, tokens)
    for tokens in (suffixes[1], suffixes[1], suffixes[2]):
        find(books, tokens, 6).release()
    for held in range(1, 17):
        with take(books, held):
            names = set(books._by_hash)
        for tokens in suffixes:
            found = [name in names for name in HASHER.chain(tokens)]
            assert found == sorted(found, reverse=True), "a suffix is there without its prefix"


def test_what_is_held_is_not_evicted_though_it_was_used_once(books: Books) -> None:
    lease = find(books, prompt(4), 4)
    seal(lease, prompt(4))
    for seed in range(1, 5):
        cache(books, prompt(12, seed))
    assert find(books, prompt(4), 4).blocks == lease.blocks


# ---------------------------------------------------------------- copies: the same prompt computed twice at once


def test_a_copy_takes_the_place_of_what_was_evicted_meanwhile(books: Books) -> None:
    tokens = prompt(4)
    first, second = take(books, 2), take(books, 4)
    seal(first, tokens[: 2 * SIZE])
    seal(second, tokens)
    first.release()
    take(books, 12).release()
    assert books.count_cached(HASHER.chain(tokens)) == 0, "the first's blocks were evicted"
    own = list(second.blocks)
    second.release()
    assert books.counts == Counts(12, 4, 0, 0)
    assert find(books, tokens, 4).blocks == own


def test_what_a_copy_was_made_of_is_as_young_as_its_suffix(books: Books) -> None:
    tokens = prompt(4)
    first, second = take(books, 2), take(books, 4)
    seal(first, tokens[: 2 * SIZE])
    seal(second, tokens)
    first.release()
    cache(books, prompt(2, seed=1))
    second.release()
    take(books, 10).release()
    assert books.count_cached(HASHER.chain(tokens)) == 4
    take(books, 13).release()
    assert books.count_cached(HASHER.chain(tokens)) == 3


def test_a_copy_of_what_is_still_held_becomes_free(books: Books) -> None:
    tokens = prompt(4)
    first, second = take(books, 2), take(books, 4)
    seal(first, tokens[: 2 * SIZE])
    seal(second, tokens)
    second.release()
    assert books.counts == Counts(12, 2, 2, 0)
    first.release()
    assert find(books, tokens, 4).cached == 4


def test_a_copy_cannot_become_something_else(books: Books) -> None:
    first, second = take(books, 1), take(books, 1)
    seal(first, prompt(1))
    seal(second, prompt(1))
    with pytest.raises(LeaseError, match="is sealed as"):
        seal(second, prompt(1, seed=1))


def test_a_copy_that_is_quarantined_takes_nobodys_place(books: Books) -> None:
    first, second = take(books, 1), take(books, 1)
    seal(first, prompt(1))
    seal(second, prompt(1))
    first.release()
    second.quarantine()
    take(books, 15).release()
    second.lift()
    assert books.counts == Counts(16, 0, 0, 0)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_a_prefix_goes_after_its_suffixes(seed: int) -> None:
    random = Random(seed)
    books = Books(16, SIZE)
    leases: list[tuple[Lease, list[int]]] = []
    previous: dict[BlockHash, BlockHash | None] = {}
    for _ in range(200):
        tokens = prompt(random.randint(1, 3)) + prompt(random.randint(0, 1), seed=random.randint(1, 2))
        names = HASHER.chain(tokens)
        previous.update(zip(names, [None, *names], strict=False))
        if lease := books.acquire(names, tokens, len(names)):
            leases.append((lease, tokens))
        random.shuffle(leases)
        if random.random() < 0.7 and leases:
            seal(*leases[0])
        while len(leases) > 3 or (leases and random.random() < 0.3):
            leases.pop()[0].release()
        if random.random() < 0.3:
            take(books, books.counts.free + random.randint(0, books.counts.cached)).release()
        assert books.check_integrity() == []
        order = {block: place for place, block in enumerate(books._evictable)}
        for name, entry in books._by_hash.items():
            before = previous[name]
            if entry.block in order and before is not None:
                assert before in books._by_hash, "a suffix is there without its prefix"
                assert order.get(books._by_hash[before].block, len(order)) > order[entry.block]
