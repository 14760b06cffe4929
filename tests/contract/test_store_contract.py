"""What every tier of the store must keep: exact bytes by name, a bound, misses and never an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from threading import Thread
from time import monotonic, sleep

import pytest
from store_rig import Place, make_place, name_of, value_of

from bascule.kv.store.base import Fault, Use
from bascule.types import Tier
from support.redis_server import RedisProcess, redis_process

A, B, C, D, E, F = (name_of(number) for number in range(1, 7))
LARGE = 400_000

bounded = pytest.mark.parametrize("place", ["memory", "host", "disk"], indirect=True)
"""A server's bound, and what it evicts, are its own."""
lasting = pytest.mark.parametrize("place", ["host", "disk", "remote"], indirect=True)
"""A dict has no second user and ends with its process."""


@pytest.fixture(scope="module")
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def started() -> list[RedisProcess]:
    return []


@pytest.fixture(params=["memory", "host", "disk", "remote"])
def place(request: pytest.FixtureRequest, servers: ExitStack, started: list[RedisProcess]) -> Iterator[Place]:
    def server() -> RedisProcess:
        if not started:
            started.append(servers.enter_context(redis_process()))
        return started[0]

    with ExitStack() as stack:
        yield make_place(request.param, stack, server)


def test_a_store_says_which_tier_it_is(place: Place) -> None:
    expected = {"memory": Tier.HOST, "host": Tier.HOST, "disk": Tier.DISK, "remote": Tier.REMOTE}
    assert place.open().tier is expected[place.kind]


@pytest.mark.parametrize("size", [0, 1, 4096, LARGE])
def test_what_was_put_is_got(place: Place, size: int) -> None:
    store = place.open()
    values = {A: bytes(range(256)) * (size // 256) + bytes(size % 256), B: value_of(7, size)}
    assert store.put(values) == 2
    assert store.get([A, B]) == [values[A], values[B]]


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_any_bytes_can_be_put(place: Place, form: type) -> None:
    store = place.open()
    assert store.put({A: form(b"\r\n\x00$-1\r\n")}) == 1
    assert store.get([A]) == [b"\r\n\x00$-1\r\n"]


def test_answers_come_in_the_order_of_the_names_with_none_for_what_is_missing(place: Place) -> None:
    store = place.open()
    store.put({A: b"a", B: b"b", C: b"c"})
    assert store.get([C, D, A, A, E, B]) == [b"c", None, b"a", b"a", None, b"b"]
    assert store.holds([C, D, A]) == [True, False, True]
    assert store.get([]) == []
    assert store.holds([]) == []


def test_many_blocks_in_one_call(place: Place) -> None:
    store = place.open()
    values = {name_of(number): value_of(number, 20_000) for number in range(600)}
    assert store.put(values) == 600
    assert store.get(list(values)) == list(values.values())
    assert store.stats().errors == {}


def test_putting_again_replaces(place: Place) -> None:
    store = place.open()
    store.put({A: b"first", B: b"b"})
    assert store.put({A: b"the second one"}) == 1
    assert store.get([A, B]) == [b"the second one", b"b"]
    if place.bounded:
        assert (store.stats().blocks, store.stats().bytes) == (2, 15)


def test_what_is_dropped_is_gone_and_the_rest_is_not(place: Place) -> None:
    store = place.open()
    store.put({A: b"a", B: b"b", C: b"c"})
    store.drop([A, C, D])
    assert store.get([A, B, C]) == [None, b"b", None]
    assert store.holds([A, B]) == [False, True]
    assert store.stats().blocks == 1
    assert store.stats().errors == {}


def test_a_cleared_store_is_empty_and_can_be_used(place: Place) -> None:
    store = place.open()
    names = [name_of(number) for number in range(50)]
    store.put(dict.fromkeys(names, b"x"))
    store.clear()
    assert store.get(names) == [None] * 50
    assert store.stats().blocks == 0
    assert store.put({A: b"a"}) == 1
    assert store.get([A]) == [b"a"]


def test_hits_and_misses_are_counted_and_contents_are_told(place: Place) -> None:
    store = place.open()
    store.put({A: value_of(1), B: value_of(2)})
    store.get([A, B, C])
    store.get([D])
    store.holds([A, D])
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.blocks) == (2, 2, 0, 2)
    assert stats.errors == {}
    if place.bounded:
        assert stats.bytes == 2000
        assert stats.capacity_bytes is not None


@bounded
def test_a_full_store_lets_the_least_recently_used_go(place: Place) -> None:
    store = place.open(capacity=4500)
    for name in (A, B, C, D):
        assert store.put({name: value_of(1)}) == 1
        sleep(0.02)
    assert store.touch([Use(A, monotonic(), again=False), Use(C, monotonic(), again=False)]) == [True, True]
    sleep(0.02)
    assert store.put({E: value_of(1)}) == 1
    assert store.holds([A, B, C, D, E]) == [True, False, True, True, True]
    assert store.put({F: value_of(1)}) == 1
    assert store.holds([A, B, C, D, E, F]) == [True, False, True, False, True, True]
    stats = store.stats()
    assert stats.evictions == 2
    assert stats.bytes == 4000


@pytest.mark.parametrize("place", ["host", "disk"], indirect=True)
def test_what_was_used_again_outlives_a_scan_and_a_restart(place: Place) -> None:
    first = place.open(capacity=50_000)
    hot, now = [name_of(1000 + number) for number in range(12)], monotonic()
    first.put({name: value_of(1) for name in hot})
    first.touch([Use(name, now - number, again=True) for number, name in enumerate(hot)])
    for number in range(100):
        assert first.put({name_of(number): value_of(number)}) == 1
        first.touch([Use(name_of(number), now + 1, again=False)])
    first.close()
    second = place.open(capacity=50_000)
    for number in range(100, 200):
        assert second.put({name_of(number): value_of(number)}) == 1
    # A fifth is protected, of which a prefix keeps its beginning.
    assert second.holds(hot) == [True] * 10 + [False] * 2


@bounded
def test_the_bound_is_kept_whatever_is_put(place: Place) -> None:
    store = place.open(capacity=100_000)
    for first in range(0, 300, 10):
        values = {name_of(number): value_of(number, number * 37 % 9000) for number in range(first, first + 10)}
        assert store.put(values) == 10
        assert store.stats().bytes <= 100_000
    held = [name_of(number) for number in range(300)]
    answers = [answer for answer in store.get(held) if answer is not None]
    assert 50_000 < sum(map(len, answers)) <= 100_000


@bounded
def test_a_block_larger_than_the_bound_is_not_taken_and_evicts_nothing(place: Place) -> None:
    store = place.open(capacity=2000)
    store.put({A: value_of(1)})
    assert store.put({B: value_of(2, 2001)}) == 0
    assert store.get([A, B]) == [value_of(1), None]
    assert store.stats().errors == {Fault.FULL: 1}


def test_eight_threads_at_once_see_whole_blocks_only(place: Place) -> None:
    store = place.open()
    names = [name_of(number) for number in range(16)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for turn in range(12):
                mine = names[(seed + turn) % 16]
                store.put({mine: value_of(seed, 50_000), names[turn]: value_of(seed + 1, 30_000)})
                for answer in store.get(names):
                    if answer is not None and (len(set(answer)) != 1 or len(answer) not in (30_000, 50_000)):
                        wrong.append(answer)
                if turn % 4 == seed % 4:
                    store.drop([names[seed]])
                    store.holds(names)
                    store.stats()
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.stats().errors == {}


@lasting
def test_stores_on_one_place_have_its_name_and_tell_what_is_there(place: Place) -> None:
    one, other = place.open(), place.open()
    assert one.place == other.place != ""
    names = {name_of(number) for number in range(300)}
    one.put({name: value_of(1, 10) for name in names})
    assert {name for page in other.names() for name in page} == names
    other.close()
    assert list(other.names()) in ([], [[]])


@lasting
def test_two_stores_on_one_place_see_each_others_blocks(place: Place) -> None:
    one, other = place.open(), place.open()
    one.put({A: b"a"})
    other.put({B: b"b"})
    assert one.get([A, B]) == other.get([A, B]) == [b"a", b"b"]
    other.drop([A])
    assert one.get([A]) == [None]
    one.clear()
    assert other.get([B]) == [None]


@lasting
def test_a_restart_finds_the_blocks(place: Place) -> None:
    first = place.open()
    first.put({A: value_of(1, LARGE), B: b""})
    first.close()
    second = place.open()
    assert second.stats().blocks == 2
    assert second.get([A, B]) == [value_of(1, LARGE), b""]


def test_calls_after_close_are_misses(place: Place) -> None:
    store = place.open()
    store.put({A: b"a"})
    store.close()
    store.close()
    assert store.put({B: b"b", C: b"c"}) == 0
    assert store.get([A]) == [None]
    assert store.holds([A]) == [False]
    store.drop([A])
    store.clear()
    stats = store.stats()
    assert stats.misses == 1
    assert stats.errors[Fault.CLOSED] >= 3
    store.close()


def test_a_look_at_a_block_is_what_a_get_gives_and_no_use_of_it(place: Place) -> None:
    store = place.open()
    store.put({A: value_of(1), B: value_of(2)})
    before = store.stats()
    assert store.peek([A, C, B]) == [value_of(1), None, value_of(2)]
    assert (store.stats().hits, store.stats().misses) == (before.hits, before.misses)
