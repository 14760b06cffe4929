"""The prefix index by hand: what one lookup says as workers store, lose and promise blocks, come and go."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import pytest

from bascule.kv.prefix_index import PrefixIndex
from bascule.types import BlockHash, Tier

CAPACITY = {Tier.DEVICE: 100, Tier.HOST: 100}


def chain(name: str, length: int) -> list[BlockHash]:
    return [BlockHash(blake2b(f"{name}/{i}".encode(), digest_size=16).digest()) for i in range(length)]


@contextmanager
def index_of(workers: int) -> Iterator[PrefixIndex]:
    """An index with that many workers, whose counts must add up at the end."""
    index = PrefixIndex(expected_s=10.0)
    for row in range(workers):
        index.join(row, CAPACITY)
    yield index
    assert index.check_integrity() == []


def store(index: PrefixIndex, row: int, names: Sequence[BlockHash], tier: Tier = Tier.DEVICE) -> bool:
    return index.store(row, tier, b"".join(names))


def remove(index: PrefixIndex, row: int, names: Sequence[BlockHash], tier: Tier = Tier.DEVICE) -> None:
    index.remove(row, tier, b"".join(names))


def device(index: PrefixIndex, names: Sequence[BlockHash], rows: int) -> list[int]:
    return [int(blocks) for blocks in index.match(names).device[:rows]]


def test_one_lookup_gives_the_longest_prefix_of_every_worker() -> None:
    prompt, other = chain("a", 6), chain("b", 3)
    with index_of(5) as index:
        store(index, 0, prompt)
        store(index, 1, prompt[:2])
        store(index, 2, prompt[1:])
        store(index, 3, [*prompt[:3], *prompt[4:]])
        store(index, 4, other)
        assert device(index, prompt, 5) == [6, 2, 0, 3, 0]
        assert device(index, [*prompt, *other], 5) == [6, 2, 0, 3, 0]
        assert device(index, prompt[:1], 5) == [1, 1, 0, 1, 0]
        assert device(index, [], 5) == [0] * 5
        assert index.blocks == 6 + 2 + 5 + 5 + 3


def test_a_match_does_not_change_with_the_index() -> None:
    prompt = chain("a", 3)
    with index_of(1) as index:
        store(index, 0, prompt)
        match = index.match(prompt)
        index.leave(0)
        assert match.device[0] == 3
        with pytest.raises(ValueError, match="read-only"):
            match.device[0] = 1


def test_more_prefix_lengths_than_a_byte_counts() -> None:
    prompt = chain("a", 300)
    index = PrefixIndex()
    for row in range(300):
        index.join(row, {Tier.DEVICE: 300})
        store(index, row, prompt[:row])
    assert device(index, prompt, 300) == list(range(300))


def test_a_slower_tier_continues_what_faster_ones_begin() -> None:
    prompt = chain("a", 6)
    with index_of(3) as index:
        store(index, 0, prompt[:2])
        store(index, 0, prompt[2:5], Tier.HOST)
        store(index, 1, prompt, Tier.HOST)
        store(index, 2, prompt[2:])
        match = index.match(prompt)
        assert match.tiers[Tier.DEVICE].tolist()[:3] == [2, 0, 0]
        assert match.tiers[Tier.HOST].tolist()[:3] == [5, 6, 0]
        assert match.tiers[Tier.DISK].tolist()[:3] == [5, 6, 0]
        assert set(match.tiers) == set(Tier)


def test_a_block_that_moves_to_another_tier_is_only_there() -> None:
    prompt = chain("a", 3)
    with index_of(1) as index:
        store(index, 0, prompt)
        remove(index, 0, prompt[1:])
        store(index, 0, prompt[1:], Tier.HOST)
        match = index.match(prompt)
        assert (match.device[0], match.tiers[Tier.HOST][0], index.blocks) == (1, 3, 3)


def test_saying_the_same_twice_changes_nothing() -> None:
    prompt = chain("a", 3)
    with index_of(1) as index:
        for _ in range(2):
            assert store(index, 0, [*prompt, *prompt])
            assert index.blocks == 3
        for _ in range(2):
            remove(index, 0, prompt[:1])
            assert index.blocks == 2


@pytest.mark.parametrize("swept", [False, True])
def test_the_next_worker_of_a_row_has_nothing_of_the_last(swept: bool) -> None:
    prompt = chain("a", 4)
    with index_of(2) as index:
        store(index, 0, prompt)
        store(index, 1, prompt[:1])
        index.expect(0, chain("b", 2), 0.0)
        index.leave(0)
        assert device(index, prompt, 2) == [0, 1]
        if swept:
            index.sweep(10_000)
        index.join(0, CAPACITY)
        assert device(index, prompt, 2) == [0, 1]
        assert device(index, chain("b", 2), 2) == [0, 0]
        assert (index.blocks, index.expected) == (1, 0)
        store(index, 0, prompt[:2])
        assert device(index, prompt, 2) == [2, 1]


def test_a_row_that_nobody_has_matches_nothing() -> None:
    prompt = chain("a", 2)
    index = PrefixIndex()
    index.join(3, CAPACITY)
    store(index, 3, prompt)
    assert device(index, prompt, 4) == [0, 0, 0, 2]
    with pytest.raises(ValueError, match="row 3"):
        index.join(3, CAPACITY)


def test_a_worker_that_tells_anew_has_only_what_it_tells() -> None:
    prompt = chain("a", 4)
    with index_of(2) as index:
        store(index, 0, prompt)
        store(index, 1, prompt[:3])
        index.clear(0)
        assert device(index, prompt, 2) == [0, 3]
        store(index, 0, prompt[:1])
        index.sweep(10_000)
        assert device(index, prompt, 2) == [1, 3]


@pytest.mark.parametrize(("tier", "room"), [(Tier.DEVICE, 100), (Tier.HOST, 100), (Tier.DISK, 0)])
def test_more_blocks_than_a_worker_has_room_for_are_refused(tier: Tier, room: int) -> None:
    with index_of(1) as index:
        assert store(index, 0, chain("a", room), tier)
        assert not store(index, 0, chain("b", 1), tier)
        index.clear(0)
        assert index.blocks == 0
        assert not store(index, 0, chain("c", 1_000), tier)
        assert index.blocks == 0


@pytest.mark.parametrize("hashes", [b"short", bytes(17), bytes(15)])
def test_bytes_that_are_no_hashes_are_refused_whole(hashes: bytes) -> None:
    with index_of(1) as index:
        for call in (index.store, index.remove):
            with pytest.raises(ValueError, match="no block hashes"):
                call(0, Tier.DEVICE, hashes)
        assert index.blocks == 0


def test_siblings_of_a_placed_prompt_find_it_before_the_worker_has_said_anything() -> None:
    prompt = chain("a", 6)
    with index_of(3) as index:
        store(index, 1, prompt[:2])
        index.expect(1, prompt, 0.0)
        assert device(index, prompt, 3) == [0, 6, 0]
        assert (index.blocks, index.expected) == (2, 4)
        store(index, 1, prompt[2:4])
        assert device(index, prompt, 3) == [0, 6, 0]
        assert (index.blocks, index.expected) == (4, 2)


def test_expectations_end_in_time_and_what_came_true_stays() -> None:
    prompt = chain("a", 4)
    with index_of(1) as index:
        index.expect(0, prompt, 0.0)
        index.expire(9.0)
        index.expect(0, prompt[3:], 9.0)
        store(index, 0, prompt[:2])
        index.expire(10.0)
        assert device(index, prompt, 1) == [2]
        assert index.expected == 1, "the block expected again later has time left"
        index.expire(19.0)
        assert index.expected == 0


def test_the_workers_own_word_ends_an_expectation_and_touches_nobody_elses() -> None:
    prompt = chain("a", 4)
    with index_of(2) as index:
        for row in range(2):
            index.expect(row, prompt, 0.0)
        remove(index, 0, prompt[2:])
        assert device(index, prompt, 2) == [2, 4]
        store(index, 0, prompt[:1])
        remove(index, 0, prompt[:1])
        assert device(index, prompt, 2) == [0, 4]
        index.leave(1)
        assert device(index, prompt, 2) == [0, 0]


def test_expectations_survive_a_new_account_of_the_cache() -> None:
    prompt = chain("a", 4)
    with index_of(2) as index:
        store(index, 0, prompt[:2])
        for row in range(2):
            index.expect(row, prompt, 0.0)
        index.clear(0)
        assert device(index, prompt[2:], 2) == [2, 2]
        store(index, 0, prompt[:2])
        assert device(index, prompt, 2) == [4, 4]


def test_no_more_is_expected_of_a_worker_than_it_could_hold() -> None:
    with index_of(1) as index:
        early, late = chain("a", 60), chain("b", 60)
        index.expect(0, early, 0.0)
        index.expect(0, late, 1.0)
        assert index.expected == 100
        assert device(index, late, 1) == [60]
        assert device(index, early, 1) == [0], "the oldest go first"


def test_workers_that_come_and_go_leave_no_memory_behind() -> None:
    """After a sweep each, a thousand incarnations take no more room than the first few."""
    index = PrefixIndex()
    sizes = []
    tracemalloc.start()
    for turn in range(60):
        index.join(0, CAPACITY)
        store(index, 0, chain(f"turn {turn}", 100))
        index.leave(0)
        index.sweep(10_000)
        if turn in (9, 59):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] < sizes[0] + 50_000
    assert index.check_integrity() == []


def test_a_block_costs_less_than_150_bytes() -> None:
    workers, blocks, run = 1000, 200_000, 100
    index = PrefixIndex()
    tracemalloc.start()
    for row in range(workers):
        index.join(row, {Tier.DEVICE: blocks})
    for number in range(blocks // run):
        store(index, number % workers, chain(str(number), run))
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert index.blocks == blocks
    assert used / blocks < 150
