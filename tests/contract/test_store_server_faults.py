"""What the remote tier must survive: servers absent, killed, hung, full, locked, shared and mad."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from itertools import takewhile
from pathlib import Path
from time import monotonic, sleep

import pytest
from store_rig import PATIENT, MadServer, name_of, open_remote, value_of

from bascule.errors import ConfigError
from bascule.kv.store import server as server_module
from bascule.kv.store.base import Fault, Store, Use
from bascule.kv.store.record import InvalidRecord, unpack
from bascule.kv.store.remote import RemoteStore
from bascule.kv.store.shelves import ServerShelf
from bascule.kv.store.targets import parse_remote
from support.redis_server import RedisProcess, redis_process, wait_until

A, B, C = (name_of(number) for number in range(1, 4))
TIMEOUT = 1.0
TOKENS = tuple(range(16))
UNFINISHED = (b"$-5\r\n", b"$1000000000\r\nx", b"*1000000000\r\n", bytes(range(256)) * 50)
"""Answers of which the rest is waited for, to the end of the timeout."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def latency(store: Store) -> float:
    """Seconds that a miss takes."""
    began = monotonic()
    assert store.get([A, B]) == [None, None]
    return monotonic() - began


def test_a_server_that_is_absent_at_the_start_is_used_when_it_comes(stack: ExitStack) -> None:
    process = stack.enter_context(redis_process())
    process.stop()
    store = open_remote(stack, process.url)
    assert store.put({A: b"a"}) == 0
    assert store.get([A]) == [None]
    assert store.stats().errors == {Fault.GONE: 1, Fault.SKIPPED: 1}
    process.start()
    wait_until(lambda: store.put({A: b"a"}), "the server to be found")
    assert store.get([A]) == [b"a"]


def test_a_server_that_is_gone_is_counted_though_no_block_was_asked_for(stack: ExitStack) -> None:
    process = stack.enter_context(redis_process())
    process.stop()
    store = open_remote(stack, process.url)
    assert store.stats().errors == {Fault.GONE: 1}
    assert store.stats().errors == {Fault.GONE: 1}, "it is left alone"


def test_a_killed_server_is_missed_and_found_again(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    process = stack.enter_context(redis_process())
    store = open_remote(stack, process.url)
    assert store.put({A: b"a"}) == 1
    process.stop()
    assert store.get([A]) == [None]
    assert "is gone (" in caplog.text and "; doing without it until it answers again" in caplog.text
    assert store.put({B: b"b"}) == 0
    assert store.holds([A]) == [False]
    store.drop([A])
    store.clear()
    assert store.stats().blocks == 0
    assert store.stats().errors[Fault.GONE] == 1
    process.start()
    wait_until(lambda: store.put({A: b"new"}), "the server to be found")
    assert store.get([A]) == [b"new"]


def test_a_hung_server_costs_one_timeout_and_is_found_again(stack: ExitStack) -> None:
    process = stack.enter_context(redis_process())
    store = open_remote(stack, process.url, timeout_s=TIMEOUT)
    store.put({C: b"c"})
    process.pause()
    try:
        first = latency(store)
        rest = [latency(store) for _ in range(20)]
    finally:
        process.resume()
    assert TIMEOUT / 2 < first < PATIENT
    assert sum(rest) < len(rest) * TIMEOUT / 4
    assert store.stats().errors[Fault.SLOW] == 2
    assert store.stats().errors[Fault.SKIPPED] >= 40
    wait_until(lambda: store.get([C]) == [b"c"], "the server to be found")


def test_calls_that_a_hung_server_is_given_up_for_are_not_called_broken(stack: ExitStack) -> None:
    """One is late, and the connections of the others are closed under them, in the midst of an answer perhaps."""
    process = stack.enter_context(redis_process())
    pool = stack.enter_context(ThreadPoolExecutor(4))
    values = {name_of(number): value_of(number, 200_000) for number in range(40)}
    assert open_remote(stack, process.url).put(values) == 40
    for _ in range(5):
        store = open_remote(stack, process.url, timeout_s=TIMEOUT)
        calls = [pool.submit(store.get, list(values)) for _ in range(4)]
        process.pause()
        try:
            wait(calls)
        finally:
            process.resume()
        assert store.stats().errors.keys() <= {Fault.SLOW, Fault.BUSY, Fault.SKIPPED}


def test_probes_of_a_hung_server_are_not_waited_for(stack: ExitStack) -> None:
    process = stack.enter_context(redis_process())
    store = open_remote(stack, process.url, timeout_s=TIMEOUT)
    process.pause()
    try:
        latency(store)
        for _ in range(3):
            sleep(1.1)
            assert sum(latency(store) for _ in range(20)) < TIMEOUT
    finally:
        process.resume()


def test_a_full_server_refuses_and_goes_on_answering(stack: ExitStack) -> None:
    process = stack.enter_context(redis_process("--maxmemory", "4mb", "--maxmemory-policy", "noeviction"))
    store = open_remote(stack, process.url)
    names = [name_of(number) for number in range(40)]
    taken = sum(store.put({name: value_of(1, 400_000)}) for name in names)
    assert 0 < taken < 20
    stats = store.stats()
    assert stats.errors == {Fault.FULL: 40 - taken}
    assert stats.capacity_bytes == 4 << 20
    answers = store.get(names)
    assert [answer for answer in answers if answer is not None] == [value_of(1, 400_000)] * taken
    assert store.stats().errors == {Fault.FULL: 40 - taken}


def test_a_full_server_that_evicts_takes_everything(stack: ExitStack) -> None:
    process = stack.enter_context(redis_process("--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru"))
    store = open_remote(stack, process.url)
    names = [name_of(number) for number in range(40)]
    assert store.stats().evictions == 0
    assert sum(store.put({name: value_of(1, 400_000)}) for name in names) == 40
    assert store.get([names[-1]]) == [value_of(1, 400_000)]
    assert store.stats().evictions > 0
    assert open_remote(stack, process.url).stats().evictions == 0, "what was before it is none of its own"


def test_what_servers_evict_counts_from_the_first_look_and_never_falls(stack: ExitStack) -> None:
    store = open_remote(stack, "redis://127.0.0.1:1")
    [server] = store._servers.values()
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        for evicted in (5000, 5003, None, 5010, 0, 4):  # unreachable once, and started anew
            reply = [7, {"used_memory": 8}, {"evicted_keys": evicted}]
            patch.setattr(server, "pipeline", lambda _, reply=reply: reply)
            counts.append(store.stats().evictions)
    assert counts == [0, 3, 3, 10, 10, 14]


def test_a_wrong_password_is_a_counted_miss(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    process = stack.enter_context(redis_process("--requirepass", "right"))
    wrong = open_remote(stack, process.url.replace("//", "//:hunter2@"))
    assert wrong.get([A]) == [None]
    assert wrong.stats().errors[Fault.DENIED] == 1
    assert "hunter2" not in caplog.text
    without = open_remote(stack, process.url)
    assert without.get([A]) == [None]
    assert without.stats().errors[Fault.DENIED] == 1
    right = open_remote(stack, process.url.replace("//", "//:right@"))
    assert right.put({A: b"a"}) == 1


def test_a_server_that_tells_nothing_of_itself_is_used_all_the_same(stack: ExitStack) -> None:
    process = stack.enter_context(redis_process())
    store = open_remote(stack, process.url)
    process.client().execute_command("ACL", "SETUSER", "default", "-info", "-dbsize", "-scan")
    assert store.put({A: b"a"}) == 1
    for _ in range(3):
        assert (store.stats().blocks, store.stats().capacity_bytes) == (0, None)
        assert [name for page in store.names() for name in page] == []
        assert store.get([A]) == [b"a"]
    assert store.stats().errors == {}


@pytest.mark.parametrize("number", [-1, 1 << 64, 10**30])
def test_numbers_that_cannot_be_are_not_passed_on(stack: ExitStack, number: int) -> None:
    """A message to the router has no room for them."""
    store = open_remote(stack, "redis://127.0.0.1:1")
    [server] = store._servers.values()
    good = [7, {"used_memory": 8, "maxmemory": 9}, {"evicted_keys": 0}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "pipeline", lambda _: good)
        assert store.stats().capacity_bytes == 9
        patch.setattr(server, "pipeline", lambda _: [good[0], {"used_memory": 8, "maxmemory": number}, good[2]])
        assert (store.stats().blocks, store.stats().capacity_bytes) == (0, None)


def test_blocks_expire_and_use_renews_them(server: RedisProcess, stack: ExitStack) -> None:
    store = stack.enter_context(closing(RemoteStore(parse_remote(server.url), ttl_s=1000, timeout_s=PATIENT)))
    store.put({A: b"a"})
    client = server.client()
    key = f"bascule:1:{A.hex()}"
    assert 990 < client.ttl(key) <= 1000
    client.expire(key, 10)
    now = monotonic()
    assert store.touch([Use(A, now, again=True), Use(B, now, again=True)]) == [True, False]
    assert client.ttl(key) > 990
    store.put({B: b"b"})
    store.touch([Use(A, now, again=False), Use(B, now - 0.01, again=False)])
    assert client.pttl(key) > client.pttl(f"bascule:1:{B.hex()}"), "what builds on a block does not outlive it"


def test_what_is_used_again_lives_longer_and_what_lies_deeper_less_long(server: RedisProcess, stack: ExitStack) -> None:
    store = open_remote(stack, server.url)
    store.put({A: b"a", B: b"b", C: b"c"})
    now = monotonic()
    store.touch([Use(A, now, True, 100), Use(B, now, False, 100), Use(C, now, False, 200)])
    lives = [server.client().pttl(f"bascule:1:{name.hex()}") / 1000 for name in (A, B, C)]
    assert lives == pytest.approx([86_400 + 120 - 25, 86_400 - 25, 86_400 - 50], abs=PATIENT)


def test_a_full_server_evicts_ends_before_beginnings(stack: ExitStack) -> None:
    """Of prompts that were all used at about the same time."""
    limits = ("--maxmemory", "8mb", "--maxmemory-policy", "volatile-ttl", "--maxmemory-samples", "10")
    process = stack.enter_context(redis_process(*limits))
    store = open_remote(stack, process.url)
    prompts = [[name_of(100 * number + place) for place in range(60)] for number in range(40)]
    for prompt in prompts:
        store.put({name: value_of(1, 10_000) for name in prompt})
        store.touch([Use(name, monotonic(), False, place) for place, name in enumerate(prompt)])
    held = [store.holds(prompt) for prompt in prompts]
    usable = sum(len(list(takewhile(bool, places))) for places in held)
    assert 200 < sum(map(sum, held)) < 1200
    assert usable > 0.7 * sum(map(sum, held)), "by use alone next to nothing lies unbroken from a beginning"


def test_foreign_keys_are_left_alone_and_foreign_types_are_misses(server: RedisProcess, stack: ExitStack) -> None:
    store = open_remote(stack, server.url)
    client = server.client()
    client.flushall()
    client.set("mine", "x")
    client.lpush(f"bascule:1:{A.hex()}", "not a string")
    store.put({B: b"b"})
    assert store.get([A, B]) == [None, b"b"]
    assert store.stats().errors == {Fault.BROKEN: 1}
    store.clear()
    assert client.keys("*") == [b"mine"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"+OK\r\n+PONG\r\n" * 20,
        b":7\r\n" * 20,
        b"*2\r\n$1\r\na\r\n$1\r\nb\r\n" * 20,
        b"$99999999999999999999\r\nx",
        *UNFINISHED,
        b"-ERR unknown command\r\n" * 20,
        b"-MOVED 1 127.0.0.1:1\r\n" * 20,
        b"\r\n" * 100,
    ],
)
def test_a_server_that_answers_garbage_is_a_counted_miss(stack: ExitStack, answer: bytes) -> None:
    mad = stack.enter_context(closing(MadServer(answer)))
    store = open_remote(stack, mad.url, timeout_s=TIMEOUT if answer in UNFINISHED else PATIENT)
    for _ in range(3):
        [found] = store.get([A])
        if found is not None:
            with pytest.raises(InvalidRecord):
                unpack(A, "model", TOKENS, found)
        store.holds([A])
        store.drop([A])
        store.clear()
        store.stats()
    assert sum(store.stats().errors.values()) > 0


def test_a_server_whose_keys_have_no_end_is_not_asked_for_ever(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked = open_remote(stack, "redis://127.0.0.1:1"), list[object]()
    [one] = store._servers.values()

    def endless(commands: list[tuple[object, ...]]) -> list[object]:
        asked.extend(commands)
        assert len(asked) < 1000
        return [(len(asked) % 3 + 1, []) if command[0] == "SCAN" else 0 for command in commands]

    monkeypatch.setattr(one, "pipeline", endless)
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "_WALK_S", 0.0)
        assert list(store.names()) == [[]] and len(asked) == 1, "nor for long"
    monkeypatch.setattr(server_module, "_MOST_STEPS", 50)
    assert all(page == [] for page in store.names()) and len(asked) == 51
    shelf = stack.enter_context(closing(ServerShelf(parse_remote("redis://127.0.0.1:1")[0])))
    monkeypatch.setattr(shelf._server, "pipeline", endless)
    with pytest.raises(ConfigError, match=r"--remote.*no end"):
        list(shelf.names())
    store.clear()
    assert len(asked) == 151


def test_what_a_server_announces_takes_no_memory_before_it_comes(stack: ExitStack) -> None:
    """Taking it is cheap, but giving gigabytes back stops every thread of the worker for seconds."""
    before = most_mapped()
    mad = stack.enter_context(closing(MadServer(b"*1000000000\r\n")))
    assert open_remote(stack, mad.url, timeout_s=TIMEOUT).get([A]) == [None]
    assert most_mapped() < before + (4 << 30)


def most_mapped() -> int:
    """The most bytes of address space that this process has ever had."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak:")]
    return int(line.split()[1]) << 10


def test_a_server_that_drips_its_answer_costs_one_timeout(stack: ExitStack) -> None:
    mad = stack.enter_context(closing(MadServer(b"+OK\r\n$1000\r\n" + bytes(1000), drip_s=0.05)))
    store = open_remote(stack, mad.url, timeout_s=TIMEOUT)
    assert latency(store) < PATIENT
    assert sum(latency(store) for _ in range(20)) < 20 * TIMEOUT / 4
    assert store.stats().errors[Fault.SLOW] == 2
