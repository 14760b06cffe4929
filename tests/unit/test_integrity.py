"""A lie in any book of a cluster at rest is found, and told where operators look: each is damaged here once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from membership_rig import PROMPT, Bench
from store_side_rig import Node, prompt_of
from worker_rig import Cluster, over_sockets

from bascule.clock import VirtualClock
from bascule.kv.hashing import BlockDigest
from bascule.kv.index_audit import IndexAudit
from bascule.kv.store import keeper
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.memory import MemoryStore
from bascule.observe.metrics import Metrics
from bascule.types import Epoch, Tier, WorkerId, WorkerLoad
from bascule.wire import Heartbeat, KvEvents, TierChanges
from bascule.worker import store_side

ALL = 1 << 20


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def told(bench: Bench, names: list[bytes], sequence: int = 1) -> None:
    """Worker `a` tells what it has, and says so again in a heartbeat."""
    digest = BlockDigest()
    digest.toggle(names)
    changes = (TierChanges("device", b"".join(names), b""),)
    worker, epoch = WorkerId("a"), Epoch("a-1")
    bench.hear(KvEvents(worker=worker, epoch=epoch, sequence=sequence, anew=True, changes=changes))
    bench.hear(Heartbeat(worker, epoch, WorkerLoad(), sequence, kv_digest=digest.value))


def exported(bench: Bench) -> float:
    """The metric, which is the admin state's figure, too."""
    state = bench.membership._service.state
    text = Metrics(state, VirtualClock()).exposition().decode()
    [value] = [line.split()[1] for line in text.splitlines() if line.startswith("bascule_integrity_violations ")]
    assert float(value) == state().integrity_violations
    return float(value)


def loses_a_block(bench: Bench) -> None:
    index = bench.view.index
    shard = index._tiers[Tier.DEVICE][PROMPT[0][0]]
    del shard[PROMPT[0]]


def counts_one_too_many(bench: Bench) -> None:
    bench.view.index._holders[0].held[Tier.DEVICE] += 1


def takes_one_block_for_another(bench: Bench) -> None:
    """Every count adds up; only the worker knows better."""
    bench.view.index.remove(0, Tier.DEVICE, PROMPT[0])
    bench.view.index.store(0, Tier.DEVICE, PROMPT[7])


@pytest.mark.parametrize("damage", [loses_a_block, counts_one_too_many, takes_one_block_for_another])
def test_a_damaged_index_is_found_exported_and_mended(damage: Callable[[Bench], None]) -> None:
    bench = Bench("a")
    told(bench, list(PROMPT[:5]))
    bench.view.audit_index(ALL)
    assert exported(bench) == 0
    damage(bench)
    bench.view.index.changes += 1
    bench.view.audit_index(ALL)
    assert exported(bench) > 0
    assert bench.view.kv_faults == {"strayed": 1}
    bench.hear(Heartbeat(WorkerId("a"), Epoch("a-1"), WorkerLoad(), 1))
    assert bench.resyncs() == ["a-1"]
    told(bench, list(PROMPT[:5]), sequence=2)
    bench.view.audit_index(ALL)
    assert exported(bench) == 0


def test_an_audit_goes_a_little_at_a_time_and_begins_anew_when_something_changes() -> None:
    bench = Bench("a")
    told(bench, list(PROMPT[:5]))
    audit = IndexAudit(bench.view.index)
    steps = 1
    while not audit.step(0, {}):
        steps += 1
    assert steps > 100
    assert not audit.step(ALL, {}), "nothing has changed since"
    bench.view.index.remove(0, Tier.DEVICE, PROMPT[4])
    assert not audit.step(0, {})
    bench.view.index.store(0, Tier.DEVICE, PROMPT[4])
    while not audit.step(1, {}):
        pass
    assert audit.violations == []


def test_a_router_with_requests_does_not_audit_and_one_without_does() -> None:
    bench = Bench("a")
    told(bench, list(PROMPT[:5]))
    bench.view.index._holders[0].held[Tier.DEVICE] += 1

    async def run(busy: bool) -> int:
        service = bench.membership._service
        if busy:
            service._flights["r"] = None  # type: ignore[index,assignment]
        watch = asyncio.create_task(bench.membership._watch())
        turns = range(50 if busy else 2000)
        for _ in turns:
            await asyncio.sleep(0.01)
            if bench.view.audit.violations:
                break
        watch.cancel()
        service._flights.clear()
        return len(bench.view.audit.violations)

    bench.membership._service.tick = lambda: None  # type: ignore[method-assign]
    assert asyncio.run(run(True)) == 0
    assert asyncio.run(run(False)) > 0


def test_a_stored_block_that_is_not_whole_is_found_without_being_asked_for(stack: ExitStack) -> None:
    host, disk = MemoryStore(1 << 20), MemoryStore(1 << 20, Tier.DISK)

    async def run() -> None:
        node = Node([host, disk], stack)
        await node.complete(prompt_of(1))
        [names] = host.names()
        spoilt = names[3]
        host._blocks[spoilt] = host._blocks[spoilt][:-1] + b"?"
        hits = host.stats().hits
        dropped = [node.tiers.scrub(4) for _ in range(len(names))]
        assert [each for each in dropped if each] == [{Tier.HOST: [spoilt]}]
        assert node.tiers.figures[Tier.HOST].invalid == {"checksum": 1} and not node.tiers.figures[Tier.DISK].invalid
        assert host.holds([spoilt]) == [False] and host.stats().hits == hits

    asyncio.run(run())


def test_a_leak_in_a_tiers_accounts_is_in_the_workers_figure_and_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_side, "_LOOK_S", 0.05)
    monkeypatch.setattr(keeper, "LEFT_OVER_S", 0.1)
    disk = DirectoryStore(tmp_path, 1 << 20)

    def figure(cluster: Cluster) -> int:
        return cluster.service.state().integrity_violations

    async def scenario(cluster: Cluster) -> None:
        await cluster.complete(list(range(100, 164)))
        await cluster.wait(lambda: disk.stats().blocks > 0)
        await asyncio.sleep(1.0)
        assert figure(cluster) == 0
        assert disk._keeper.reserve("lost", 77, time.monotonic() + 1)
        await cluster.wait(lambda: figure(cluster) == 1)
        disk._keeper.failed("lost", 77)
        await cluster.wait(lambda: figure(cluster) == 0)

    over_sockets(scenario, stores=[disk])
    said = [record.getMessage() for record in caplog.records if "integrity" in record.getMessage()]
    assert said == ["integrity: the disk tier: 77 bytes are reserved and 0 waited for, and nobody writes"]
