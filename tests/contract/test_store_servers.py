"""Several servers below one remote tier: what becomes of the share of one that is gone, or takes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic

import pytest
from store_rig import name_of, open_remote, value_of

from bascule.kv.store.base import Fault, Use
from support.redis_server import redis_process, wait_until


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_losing_one_of_three_servers_loses_only_its_share(stack: ExitStack) -> None:
    processes = [stack.enter_context(redis_process()) for _ in range(3)]
    store = open_remote(stack, *(process.url for process in processes))
    values = {name_of(number): value_of(number) for number in range(300)}
    assert store.put(values) == 300
    share = processes[1].client().dbsize()
    assert 50 < share < 150
    processes[1].stop()
    answers = store.get(list(values))
    assert answers.count(None) == share
    assert all(answer in (None, value) for answer, value in zip(answers, values.values(), strict=True))
    assert store.stats().errors[Fault.GONE] == share


def test_while_one_of_three_servers_is_gone_the_others_keep_its_share(stack: ExitStack) -> None:
    processes = [stack.enter_context(redis_process()) for _ in range(3)]
    store = open_remote(stack, *(process.url for process in processes))
    values = {name_of(number): value_of(number) for number in range(300)}
    store.put(values)
    others = [processes[0].client().dbsize(), processes[2].client().dbsize()]
    processes[1].stop()
    lost = [name for name, answer in zip(values, store.get(list(values)), strict=True) if answer is None]
    assert store.put({name: values[name] for name in lost}) == len(lost)
    assert store.get(list(values)) == list(values.values())
    assert all(store.holds(list(values))) and all(store.touch([Use(name, monotonic(), True) for name in values]))
    now = [processes[0].client().dbsize(), processes[2].client().dbsize()]
    assert sum(now) == 300 and all(later > before for later, before in zip(now, others, strict=True))

    processes[1].start()
    wait_until(lambda: store.put({lost[0]: values[lost[0]]}) and processes[1].client().dbsize(), "it to be used again")
    assert store.get(list(values)) == list(values.values()), "what the others kept is found there"
    store.drop(list(values))
    assert sum(process.client().dbsize() for process in processes) == 1, "a copy on the way"


@pytest.mark.parametrize("refusal", ["read-only", "full", "no permission", "cluster"])
def test_what_one_of_three_servers_refuses_the_others_keep(
    refusal: str, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"full": ["--maxmemory", "1"], "cluster": ["--cluster-enabled", "yes"]}.get(refusal, [])
    processes = [stack.enter_context(redis_process()) for _ in range(2)]
    bad = stack.enter_context(redis_process(*options))
    if refusal == "read-only":
        bad.client().replicaof("127.0.0.1", "1")
    elif refusal == "no permission":
        bad.client().execute_command("ACL", "SETUSER", "default", "-set")
    store = open_remote(stack, *(process.url for process in (*processes, bad)))
    values = {name_of(number): value_of(number) for number in range(300)}
    assert store.put(values) == 300, "the very call finds it another place"
    assert sum(process.client().dbsize() for process in processes) == 300
    assert store.get(list(values)) == list(values.values())
    assert all(store.holds(list(values))) and all(store.touch([Use(name, monotonic(), True) for name in values]))
    (line,) = [record.message for record in caplog.records if "takes no blocks" in record.message]
    assert bad.url.rpartition(":")[2].split("/")[0] in line
    counted = sum(store.stats().errors.values())
    assert store.put({name_of(number): value_of(number) for number in range(300, 400)}) == 100
    assert sum(store.stats().errors.values()) == counted, "it is left alone for a while"


def test_without_any_server_the_share_of_each_is_skipped(stack: ExitStack) -> None:
    processes = [stack.enter_context(redis_process()) for _ in range(2)]
    store = open_remote(stack, *(process.url for process in processes))
    values = {name_of(number): value_of(number) for number in range(40)}
    for process in processes:
        process.stop()
    assert store.put(values) == 0
    assert store.get(list(values)) == [None] * 40
    assert store.stats().errors == {Fault.GONE: 40, Fault.SKIPPED: 40}
