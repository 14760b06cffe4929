"""The books: leases, the prefix cache, quarantine, placement, and the proof that they add up."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest
from books_rig import HASHER, SIZE, cache, find, prompt, seal, take

from bascule.kv.arena import runs
from bascule.kv.books import Books, Counts, LeaseError
from bascule.types import BlockHash


@pytest.fixture
def books() -> Iterator[Books]:
    books = Books(16, SIZE)
    yield books
    assert books.check_integrity() == []


# ---------------------------------------------------------------- states


def test_all_blocks_are_free_at_first(books: Books) -> None:
    assert books.counts == Counts(16, 0, 0, 0)


def test_a_lease_holds_its_blocks_until_released(books: Books) -> None:
    lease = take(books, 5)
    assert lease.blocks == [0, 1, 2, 3, 4]
    assert lease.cached == 0
    assert books.counts == Counts(11, 0, 5, 0)
    lease.release()
    lease.release()
    assert books.counts == Counts(16, 0, 0, 0)


def test_a_lease_is_all_or_nothing(books: Books) -> None:
    lease = take(books, 10)
    assert books.acquire([], [], 7) is None
    assert not lease.extend(7)
    assert books.counts == Counts(6, 0, 10, 0)
    assert lease.extend(6)
    assert len(lease.blocks) == 16


def test_an_exception_releases_a_lease_used_as_a_context(books: Books) -> None:
    with pytest.raises(RuntimeError), take(books, 3):
        raise RuntimeError
    assert books.counts.held == 0


def test_a_released_lease_refuses_every_use(books: Books) -> None:
    lease = take(books, 2)
    lease.release()
    uses = (lambda: lease.blocks, lambda: lease.extend(1), lambda: lease.seal(0, [], []), lease.quarantine)
    for use in uses:
        with pytest.raises(LeaseError, match=r"lease 1 cannot be \w+: it is released"):
            use()


# ---------------------------------------------------------------- prefix cache


def test_a_sealed_prefix_is_found_and_shared(books: Books) -> None:
    tokens = prompt(3)
    first = find(books, tokens, 4)
    seal(first, tokens)
    second = find(books, tokens, 5)
    assert second.cached == 3
    assert second.blocks[:3] == first.blocks[:3]
    assert books.counts == Counts(10, 0, 6, 0)
    first.release()
    assert books.counts == Counts(11, 0, 5, 0)
    second.release()
    assert books.counts == Counts(13, 3, 0, 0)


def test_a_prefix_is_found_as_far_as_it_is_equal(books: Books) -> None:
    blocks = cache(books, prompt(4))
    other = prompt(2) + prompt(2, seed=1)
    lease = find(books, other, 4)
    assert lease.cached == 2
    assert lease.blocks[:2] == blocks[:2]


def test_a_cached_prefix_can_be_counted_without_holding_it(books: Books) -> None:
    cache(books, prompt(4))
    before = books.counts
    names = [HASHER.chain(each) for each in (prompt(4), prompt(2) + prompt(2, seed=1), prompt(2, seed=1), [])]
    assert [books.count_cached(each) for each in names] == [4, 2, 0, 0]
    assert books.counts == before
    with find(books, prompt(4), 13):
        assert books.count_cached(names[0]) == 4


def test_blocks_that_are_not_asked_for_are_not_pinned(books: Books) -> None:
    cache(books, prompt(4))
    assert find(books, prompt(4), 2).cached == 2
    assert books.counts == Counts(12, 2, 2, 0)


def test_an_equal_hash_of_other_tokens_is_a_miss_and_counted(books: Books) -> None:
    tokens = prompt(2)
    cache(books, tokens)
    forged = prompt(1) + prompt(1, seed=9)
    lease = books.acquire(HASHER.chain(tokens), forged, 2)
    assert lease is not None
    assert lease.cached == 1
    assert books.mismatches == 1


def test_the_first_block_under_a_hash_wins_and_the_duplicate_becomes_free(books: Books) -> None:
    tokens = prompt(2)
    first, second = take(books, 2), take(books, 2)
    winners = list(first.blocks)
    seal(first, tokens)
    seal(second, tokens)
    second.release()
    first.release()
    assert books.counts == Counts(14, 2, 0, 0)
    assert find(books, tokens, 2).blocks == winners


def test_sealing_again_changes_nothing_but_another_hash_is_an_error(books: Books) -> None:
    lease = take(books, 2)
    seal(lease, prompt(2))
    seal(lease, prompt(2))
    with pytest.raises(LeaseError, match="is sealed as"):
        seal(lease, prompt(2, seed=1))


def test_sealing_in_parts_makes_one_prefix(books: Books) -> None:
    tokens = prompt(3)
    with take(books, 3) as lease:
        seal(lease, tokens[: 2 * SIZE])
        seal(lease, tokens, start=2)
    assert find(books, tokens, 3).cached == 3


@pytest.mark.parametrize(
    ("start", "hashes", "tokens"), [(0, 1, SIZE - 1), (2, 1, SIZE), (-1, 1, SIZE), (1, 2, 2 * SIZE)]
)
def test_only_full_blocks_of_the_lease_can_be_sealed(books: Books, start: int, hashes: int, tokens: int) -> None:
    lease = take(books, 2)
    with pytest.raises(LeaseError, match="cannot seal"):
        lease.seal(start, [BlockHash(bytes([n] * 16)) for n in range(hashes)], list(range(tokens)))


# ---------------------------------------------------------------- quarantine


def test_quarantine_takes_own_blocks_out_of_use_and_lets_shared_ones_go(books: Books) -> None:
    tokens = prompt(2)
    cache(books, tokens)
    lease = find(books, tokens, 5)
    lease.quarantine()
    lease.quarantine()
    lease.release()
    assert books.counts == Counts(11, 2, 0, 3)
    assert books.acquire([], [], 14) is None
    lease.lift()
    lease.lift()
    assert books.counts == Counts(14, 2, 0, 0)


def test_room_ends_with_quarantine(books: Books) -> None:
    lease = take(books, 2, room=4)
    lease.quarantine()
    assert take(books, 14).blocks == list(range(2, 16))
    assert books.check_integrity() == []


def test_a_quarantined_lease_cannot_be_used(books: Books) -> None:
    lease = take(books, 2)
    lease.quarantine()
    with pytest.raises(LeaseError, match="it is quarantined"):
        lease.extend(1)


def test_blocks_that_are_not_quarantined_cannot_be_lifted(books: Books) -> None:
    lease = take(books, 2)
    with pytest.raises(LeaseError, match="not quarantined"):
        lease.lift()
    lease.release()
    lease.lift()


def test_sealed_blocks_cannot_be_quarantined(books: Books) -> None:
    lease = take(books, 2)
    seal(lease, prompt(1))
    with pytest.raises(LeaseError, match="others may read"):
        lease.quarantine()
    lease.release()
    assert books.counts == Counts(15, 1, 0, 0)


# ---------------------------------------------------------------- segments


def test_growth_stays_adjacent_while_others_come(books: Books) -> None:
    first = take(books, 2, room=3)
    second = take(books, 2, room=2)
    for lease in (first, second, first, second, first):
        assert lease.extend(1)
    assert first.blocks == [0, 1, 2, 3, 4]
    assert second.blocks == [5, 6, 7, 8]


def test_room_is_given_to_others_when_nothing_else_is_left(books: Books) -> None:
    first = take(books, 2, room=6)
    second = take(books, 12)
    assert second.blocks[:8] == list(range(8, 16))
    assert first.extend(2)
    assert books.counts == Counts(0, 0, 16, 0)


def test_cached_blocks_are_evicted_before_the_room_of_others_is_taken(books: Books) -> None:
    cache(books, prompt(8))
    first = take(books, 2, room=2)
    second = take(books, 10)
    assert first.extend(2)
    assert first.blocks == list(range(first.blocks[0], first.blocks[0] + 4))
    assert len(second.blocks) == 10


def test_cached_blocks_make_room_for_foreseen_growth(books: Books) -> None:
    cache(books, prompt(16))
    lease = take(books, 2, room=4)
    for _ in range(4):
        assert lease.extend(1)
    assert lease.blocks == list(range(10, 16))
    assert books.counts.cached <= 10


def test_growth_beyond_all_foresight_still_comes_in_segments(books: Books) -> None:
    leases = [take(books, 2), take(books, 2)]
    for _ in range(4):
        for lease in leases:
            assert lease.extend(1)
    assert [len(runs(lease.blocks)) for lease in leases] == [2, 2]


def test_growth_evicts_cached_blocks(books: Books) -> None:
    cache(books, prompt(14))
    lease = take(books, 2)
    assert lease.extend(3)
    assert books.evictions >= 3


def test_room_ends_with_its_lease(books: Books) -> None:
    take(books, 2, room=10).release()
    assert take(books, 16).blocks == list(range(16))


def test_growth_continues_behind_a_pinned_prefix(books: Books) -> None:
    blocks = cache(books, prompt(3))
    lease = find(books, prompt(3), 6)
    assert lease.blocks == [*blocks, 3, 4, 5]


# ---------------------------------------------------------------- integrity


def test_every_kind_of_lie_is_found() -> None:
    def lie(tell: str) -> list[str]:
        books = Books(4, SIZE)
        lease = find(books, prompt(1), 2)
        seal(lease, prompt(1))
        exec(tell, {"books": books, "lease": lease})
        return books.check_integrity()

    assert lie("") == []
    for tell in (
        "books._holders[0] = 2",
        "books._holders[3] = 1",
        "books._free[3] = False",
        "books._free[1] = True",
        "books._quarantined.add(2)",
        "books._evictable.offer([1])",
        "books._evictable._count += 1",
        "books._evictable._after[-1] = 1",
        "books._evictable.use([3])",
        "books._by_hash.clear()",
        "books._leases.clear()",
        "lease._blocks.append(0)",
        "books._room_of[3] = 1",
    ):
        assert lie(tell), tell


def test_threads_do_not_confuse_the_books() -> None:
    books = Books(64, SIZE)

    def work(seed: int) -> None:
        for turn in range(100):
            tokens = prompt(3, seed=(seed + turn) % 5)
            lease = books.acquire(HASHER.chain(tokens), tokens, 5, room=2)
            if lease is not None:
                with lease:
                    seal(lease, tokens)
                    lease.extend(1)

    threads = [Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert books.counts.held == 0
    assert books.check_integrity() == []


# ---------------------------------------------------------------- swapping


def test_cached_blocks_take_the_places_of_fresh_ones_up_to_a_gap(books: Books) -> None:
    tokens = prompt(6)
    hashes = HASHER.chain(tokens)
    with take(books, 6) as lease:
        own = list(lease.blocks)
        with take(books, 4) as other:
            other.seal(0, hashes[:2], tokens[: 2 * SIZE])
            other.seal(2, hashes[4:], tokens[4 * SIZE :])
            found = list(other.blocks)
        assert lease.swap(range(6), hashes, tokens) == 2
        assert lease.swap(range(5, -1, -1), hashes, tokens) == 2
        assert lease.blocks == [*found[:2], *own[2:4], *found[2:]]
        assert books.counts == Counts(10, 0, 6, 0)
        assert lease.swap(range(2), hashes, tokens) == 2, "they are there"
        with find(books, tokens, 6) as sharing:
            assert (sharing.cached, sharing.blocks[:2]) == (2, found[:2])
    assert books.counts == Counts(12, 4, 0, 0)


def test_other_tokens_under_the_same_hash_are_not_swapped_in(books: Books) -> None:
    tokens = prompt(1)
    cache(books, tokens)
    with take(books, 1) as lease:
        assert lease.swap(range(1), HASHER.chain(tokens), prompt(1, seed=1)) == 0


def test_what_others_may_have_found_is_not_swapped_away(books: Books) -> None:
    tokens, others = prompt(1), prompt(1, seed=1)
    cache(books, tokens)
    with take(books, 1) as lease:
        seal(lease, others)
        with pytest.raises(LeaseError, match="is sealed: it cannot be swapped"):
            lease.swap(range(1), HASHER.chain(tokens), tokens)
    with take(books, 1) as lease:
        seal(lease, tokens)
        with pytest.raises(LeaseError, match="is sealed: it cannot be swapped"):
            lease.swap(range(1), HASHER.chain(tokens), tokens)


def test_a_lease_with_blocks_swapped_in_is_released_and_not_quarantined(books: Books) -> None:
    tokens = prompt(2)
    [found, _] = cache(books, tokens)
    with take(books, 3, room=2) as lease:
        lease.swap(range(1), HASHER.chain(tokens), tokens)
        with pytest.raises(LeaseError, match="can only be released"):
            lease.quarantine()
        assert lease.blocks[0] == found


def test_behind_a_last_block_that_was_swapped_no_room_is_kept(books: Books) -> None:
    tokens = prompt(2)
    cache(books, tokens)
    with take(books, 2, room=3) as lease:
        assert lease.swap(range(2), HASHER.chain(tokens), tokens) == 2
        assert books.check_integrity() == []
        assert lease.extend(4)
