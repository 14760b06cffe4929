"""Engine, books and reporter at one end, the router's index at the other: they agree after real work and real loss."""

from __future__ import annotations

from random import Random

import pytest
from engine_rig import BLOCK, CARD, Rig, greedy, work
from membership_rig import Bench
from worker_rig import EPOCH, NAME, Cluster, over_sockets

from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.router.view import ClusterView
from bascule.types import BlockHash
from bascule.wire import KvEvents, Resync
from bascule.worker import kv_events
from bascule.worker.kv_events import KvReporter


def assert_index_is(view: ClusterView, names: list[BlockHash]) -> None:
    """The index has these blocks and no others, all at the worker."""
    row = view.members[NAME].row
    assert [name for name in names if view.index.match([name]).device[row] != 1] == []
    assert view.index.blocks == len(names)
    assert view.index.check_integrity() == []
    if view.members[NAME].kv.digest is not None:
        view.audit_index(1 << 20)
        assert view.audit.violations == [], "the worker has the same"


@pytest.mark.parametrize("lost", [0.0, 0.3])
@pytest.mark.parametrize("part", [3, 4096])
def test_after_work_with_evictions_the_index_is_what_the_books_find(
    lost: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "MOST_BLOCKS", part)
    random = Random(1)
    rig, bench = Rig(blocks=24), Bench("a")

    def send(message: KvEvents) -> None:
        if random.random() >= lost:
            bench.hear(message)

    reporter = KvReporter(NAME, EPOCH, rig.books, send)
    reporter.tell_all()
    for number in range(30):
        family = random.randrange(3)
        prompt = [family] * 12 + [100 + number] * random.randrange(20)
        rig.engine.submit(work(str(number), prompt, greedy(4)))
        while rig.engine.has_work():
            rig.step()
            reporter.tell_changes()
            if not lost:
                bench.view.members[NAME].kv.claims(*reporter.told)
                assert_index_is(bench.view, list(rig.books._by_hash))
    assert rig.books.evictions > 20
    assert bool(bench.view.kv_faults) == bool(lost)
    for _ in range(50):
        bench.clock.advance(1.0)
        bench.view.members[NAME].kv.claims(*reporter.told)
        if not bench.view.members[NAME].kv.should_ask(bench.clock.now()):
            break
        reporter.tell_all()
    assert bench.view.members[NAME].kv.digest is not None
    assert_index_is(bench.view, list(rig.books._by_hash))
    rig.arena.close()


def test_a_reporter_says_nothing_unasked_and_nothing_without_news() -> None:
    sent: list[KvEvents] = []
    rig = Rig()
    reporter = KvReporter(NAME, EPOCH, rig.books, sent.append)
    rig.engine.submit(work("r", range(1, 3 * BLOCK + 1), greedy(1)))
    rig.run()
    reporter.tell_changes()
    assert sent == []
    reporter.tell_all()
    reporter.tell_changes()
    assert [(one.sequence, one.anew, len(one.changes[0].stored)) for one in sent] == [(1, True, 3 * 16)]
    reporter.pause()
    rig.engine.submit(work("s", range(50, 50 + 3 * BLOCK), greedy(1)))
    rig.run()
    reporter.tell_changes()
    assert len(sent) == 1
    rig.arena.close()


def test_whoever_saves_blocks_hears_of_each_once_however_often_the_router_asks() -> None:
    heard: list[BlockHash] = []
    rig = Rig()
    reporter = KvReporter(NAME, EPOCH, rig.books, lambda _: None, heard.extend)
    rig.engine.submit(work("r", range(1, 3 * BLOCK + 1), greedy(1)))
    rig.run()
    reporter.tell_all()
    reporter.tell_all()
    rig.engine.submit(work("s", range(50, 50 + 2 * BLOCK), greedy(1)))
    rig.run()
    reporter.tell_all()
    reporter.tell_changes()
    assert len(heard) == len(set(heard)) == 5
    rig.arena.close()


def test_an_empty_cache_is_told_too() -> None:
    sent: list[KvEvents] = []
    KvReporter(NAME, EPOCH, Books(4, BLOCK), sent.append).tell_all()
    assert [(one.anew, one.sequence) for one in sent] == [(True, 1)]


def test_the_index_has_a_requests_blocks_by_the_time_that_its_output_ends() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        names = BlockHasher(CARD.fingerprint, BLOCK).chain([5] * 40)
        assert cluster.view.index.match(names).device[0] == 10
        await cluster.complete([6] * 80)
        await cluster.wait(cluster.in_step)
        assert cluster.books.evictions > 0

    over_sockets(scenario)


def test_blocks_that_go_without_a_request_ending_are_told_too() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        await cluster.wait(cluster.in_step)
        lease = cluster.books.acquire([], [], 20)
        assert lease is not None and not cluster.in_step()
        await cluster.wait(cluster.in_step)
        lease.release()

    over_sockets(scenario)


def test_a_worker_tells_anew_when_the_router_missed_its_last_words() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        cluster.link.losing = True
        await cluster.complete([6] * 80)
        assert cluster.link.lost > 0 and not cluster.in_step()
        cluster.link.losing = False
        await cluster.wait(cluster.in_step)
        assert cluster.view.kv_faults["gap"] == 1

    over_sockets(scenario)


def test_a_worker_that_is_asked_tells_all() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.complete([5] * 40)
        await cluster.wait(cluster.in_step)
        cluster.view.index.clear(0)
        assert not cluster.in_step()
        cluster.router.send(EPOCH, Resync())
        await cluster.wait(cluster.in_step)

    over_sockets(scenario)
