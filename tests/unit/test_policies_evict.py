"""The order of eviction: what was used again outlives what was used once; against a naive model of two lists."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from msgspec import Struct

from bascule.policies.evict import EvictionOrder, first_to_go

CAPACITY = 10
BOUND = 3


@pytest.fixture
def order() -> EvictionOrder:
    return EvictionOrder(CAPACITY, share=BOUND / CAPACITY)


def use_and_offer(order: EvictionOrder, *run: int) -> None:
    order.use(run)
    order.offer(run)


def test_what_was_used_once_goes_in_the_order_in_which_it_was_offered(order: EvictionOrder) -> None:
    order.offer([4, 2])
    order.offer([7])
    assert list(order) == [4, 2, 7]
    assert order.pop(2) == [4, 2]
    assert order.pop(2) == [7]
    assert order.pop(1) == []


def test_what_was_used_again_goes_after_what_was_used_once(order: EvictionOrder) -> None:
    order.offer([0, 1])
    use_and_offer(order, 0)
    order.offer([2, 3])
    assert order.pop(4) == [1, 2, 3, 0]


def test_what_is_used_is_not_evicted(order: EvictionOrder) -> None:
    order.offer([0, 1, 2])
    order.use([1])
    assert 1 not in order and 0 in order
    assert len(order) == 2
    assert order.pop(3) == [0, 2]
    order.offer([1])
    assert order.pop(3) == [1]


def test_of_too_many_protected_the_longest_unused_are_as_if_just_used_once(order: EvictionOrder) -> None:
    order.offer([0, 1, 2, 3, 4, 5])
    use_and_offer(order, 0, 1, 2, 3, 4)
    assert list(order) == [5, 0, 1, 2, 3, 4]
    order.offer([6])
    assert order.pop(4) == [5, 0, 1, 6]


def test_what_was_put_back_is_protected_when_used_again(order: EvictionOrder) -> None:
    order.offer([0, 1, 2, 3])
    use_and_offer(order, 0, 1, 2, 3)
    use_and_offer(order, 0)
    order.offer([4])
    assert order.pop(5) == [1, 4, 2, 3, 0]


def test_an_evicted_block_is_new_when_it_comes_back(order: EvictionOrder) -> None:
    order.offer([0])
    use_and_offer(order, 0)
    assert order.pop(1) == [0]
    order.offer([0])
    order.offer([1])
    assert order.pop(1) == [0]


def test_the_beginning_of_what_was_used_again_is_protected_too(order: EvictionOrder) -> None:
    order.offer([2])
    order.use([2])
    order.offer([3, 2, 1])
    order.offer([4])
    assert order.pop(4) == [3, 4, 2, 1]


def test_a_scan_of_any_length_leaves_the_protected_alone(order: EvictionOrder) -> None:
    order.offer([0, 1])
    use_and_offer(order, 0, 1)
    for block in [2, 3, 4, 5, 6, 7, 8, 9] * 5:
        if block in order:
            assert order.pop(1) == [block]
        order.offer([block])
    assert 0 in order and 1 in order


def test_where_nothing_may_be_protected_it_is_plain_lru() -> None:
    order = EvictionOrder(3, share=0.2)
    order.offer([0, 1, 2])
    use_and_offer(order, 1)
    assert order.pop(3) == [0, 2, 1]


def test_every_kind_of_lie_is_found() -> None:
    def lie(tell: str) -> list[str]:
        order = EvictionOrder(CAPACITY, share=BOUND / CAPACITY)
        order.offer([0, 1, 2, 3])
        use_and_offer(order, 0, 1)
        exec(tell, {"order": order})
        return list(order.check_integrity([0, 1, 2, 3]))

    assert lie("") == []
    for tell in (
        "order._again[5] = 1",
        "order._where[2] = 0",
        "order._where[2] = 2",
        "order._where[0] = 1",
        "order._where[7] = 1",
        "order._count += 1",
        "order._protected -= 1",
        "order._bound = 1",
        "order._after[2] = 0",
        "order._after[2] = 2",
        "order._before[3] = 0",
        "order._append([2], order._ends, 1)",
    ):
        assert lie(tell), tell


class Model:
    """Two lists, searched from end to end."""

    def __init__(self) -> None:
        self.probation: list[int] = []
        self.protected: list[int] = []
        self.again: set[int] = set()
        self.held: set[int] = set()

    def use(self, blocks: list[int]) -> None:
        self.again.update(blocks)
        self.held.update(blocks)
        for block in blocks:
            for segment in (self.probation, self.protected):
                if block in segment:
                    segment.remove(block)

    def offer(self, run: list[int]) -> None:
        self.held.difference_update(run)
        protect = False
        for block in run:
            protect = protect or block in self.again
            (self.protected if protect else self.probation).append(block)
        while len(self.protected) > BOUND:
            self.probation.append(self.protected.pop(0))

    def pop(self, count: int) -> list[int]:
        gone = (self.probation + self.protected)[:count]
        self.probation, self.protected = (
            [block for block in segment if block not in gone] for segment in (self.probation, self.protected)
        )
        self.again.difference_update(gone)
        return gone


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_it_does_what_the_naive_model_does(data: st.DataObject) -> None:
    order, model = EvictionOrder(CAPACITY, share=BOUND / CAPACITY), Model()
    for _ in range(data.draw(st.integers(1, 30))):
        offered = model.probation + model.protected
        match data.draw(st.sampled_from(["new", "use", "offer", "pop"])):
            case "new" if fresh := set(range(CAPACITY)) - set(offered) - model.held:
                run = data.draw(st.lists(st.sampled_from(sorted(fresh)), unique=True))
                order.offer(run)
                model.offer(run)
            case "use" if offered or model.held:
                run = data.draw(st.lists(st.sampled_from(sorted({*offered, *model.held})), unique=True))
                order.use(run)
                model.use(run)
            case "offer" if model.held:
                run = data.draw(st.lists(st.sampled_from(sorted(model.held)), unique=True))
                order.offer(run)
                model.offer(run)
            case "pop":
                count = data.draw(st.integers(0, CAPACITY))
                assert order.pop(count) == model.pop(count)
        assert list(order) == model.probation + model.protected
        assert len(order) == len(model.probation) + len(model.protected)
        assert {block for block in range(CAPACITY) if block in order} == set(order)
        assert list(order.check_integrity([*order, *model.held])) == []


class File(Struct, frozen=True):
    used_ns: int
    again: bool = False
    size: int = 10


def times(files: list[File], protected: int) -> tuple[list[int], list[int]]:
    others, spared = first_to_go(files, protected)
    return [file.used_ns for file in others], [file.used_ns for file in spared]


def test_in_a_tier_what_was_used_again_latest_goes_last() -> None:
    files = [File(5), File(1, again=True), File(2), File(4, again=True), File(3, again=True), File(0)]
    assert times(files, 25) == ([0, 1, 2, 5], [3, 4])
    assert times(files, 9) == ([0, 1, 2, 3, 4, 5], [])
    assert times(files, 100) == ([0, 2, 5], [1, 3, 4])


def test_in_a_tier_nothing_older_is_protected_in_place_of_what_is_too_large() -> None:
    large, small = File(2, again=True, size=20), File(1, again=True, size=5)
    assert first_to_go([large, small], 15) == ([small, large], [])
