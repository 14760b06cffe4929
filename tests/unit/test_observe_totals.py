"""What the metrics say of what workers have counted: right sums of known loads, and no total that falls."""

from __future__ import annotations

from membership_rig import Bench, offer
from msgspec.structs import replace
from test_api_service import samples

from bascule.observe.metrics import Metrics
from bascule.observe.totals import HITS, Totals
from bascule.types import Epoch, FetchLoad, StoreLoad, Tier, WorkerId, WorkerLoad
from bascule.wire import Heartbeat, StorePlace

KNOWN = WorkerLoad(
    hit_tokens=100,
    computed_tokens=640,
    handoff_bytes={"shm": 4096},
    handoff_refused={"checksum": 1},
    fetches=FetchLoad(hit_tokens=8, bytes=512, fetch_s=0.25, spared_s=0.5, failed={"late": 2}),
    stores={
        Tier.DISK: StoreLoad(
            blocks=30,
            evictions=3,
            hit_tokens=32,
            loaded_bytes=2000,
            saved_bytes=5000,
            load_s=0.5,
            spared_s=1.25,
            errors={"slow": 2},
            invalid={"checksum": 1},
        ),
        Tier.REMOTE: StoreLoad(blocks=70, evictions=6, load_s=2.0),
    },
)
"""What a worker of the rack has counted; nothing of it is zero."""


def twice(load: WorkerLoad) -> WorkerLoad:
    """The same worker, which has done as much again."""
    disk, remote = load.stores[Tier.DISK], load.stores[Tier.REMOTE]
    return WorkerLoad(
        hit_tokens=2 * load.hit_tokens,
        computed_tokens=2 * load.computed_tokens,
        handoff_bytes={"shm": 8192},
        handoff_refused={"checksum": 2},
        fetches=FetchLoad(hit_tokens=16, bytes=1024, fetch_s=0.5, spared_s=1.0, failed={"late": 4}),
        stores={
            Tier.DISK: replace(
                disk,
                evictions=6,
                hit_tokens=64,
                loaded_bytes=4000,
                saved_bytes=10000,
                load_s=1.0,
                spared_s=2.5,
                errors={"slow": 4},
                invalid={"checksum": 2},
            ),
            Tier.REMOTE: replace(remote, evictions=12, load_s=4.0),
        },
    )


class Rack:
    """A router whose workers have a disk each, by default, and all the same servers."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.metrics = Metrics(self.bench.service.state, self.bench.clock)

    def join(self, name: str, disk: str = "") -> None:
        stores = {Tier.DISK: StorePlace(disk or f"disk of {name}", 100), Tier.REMOTE: StorePlace("servers", 0)}
        self.bench.hear(replace(offer(name), stores=stores))
        self.beat(name, WorkerLoad())

    def beat(self, name: str, load: WorkerLoad) -> None:
        self.bench.hear(Heartbeat(WorkerId(name), Epoch(f"{name}-1"), load))

    def read(self) -> dict[str, float]:
        return samples(self.metrics.exposition().decode())

    def counters(self) -> dict[str, float]:
        """Of workers' counts, those that are not zero."""
        kinds = ("bascule_kv_store_", "bascule_kv_fetch_", "bascule_kv_hit_", "bascule_handoff_", "bascule_prompt_")
        read = self.read()
        return {name: read[name] for name in read if name.startswith(kinds) and "_total" in name and read[name]}


ONE = {
    'bascule_handoff_bytes_total{transport="shm"}': 4096,
    'bascule_handoff_refused_total{reason="checksum"}': 1,
    "bascule_prompt_tokens_computed_total": 640,
    'bascule_kv_store_bytes_total{tier="disk",way="loaded"}': 2000,
    'bascule_kv_store_bytes_total{tier="disk",way="saved"}': 5000,
    'bascule_kv_store_load_seconds_total{tier="disk"}': 0.5,
    'bascule_kv_store_load_seconds_total{tier="remote"}': 2.0,
    'bascule_kv_store_spared_seconds_total{tier="disk"}': 1.25,
    'bascule_kv_store_evictions_total{tier="disk"}': 3,
    'bascule_kv_store_evictions_total{tier="remote"}': 6,
    'bascule_kv_store_faults_total{reason="slow",tier="disk"}': 2,
    'bascule_kv_store_invalid_total{reason="checksum",tier="disk"}': 1,
    "bascule_kv_fetch_bytes_total": 512,
    "bascule_kv_fetch_seconds_total": 0.25,
    "bascule_kv_fetch_spared_seconds_total": 0.5,
    'bascule_kv_fetch_failed_total{reason="late"}': 2,
}
"""What the metrics say of one worker that has counted `KNOWN`: hits are counted by requests."""
SERVERS_EVICTED = 'bascule_kv_store_evictions_total{tier="remote"}'


def test_the_metrics_say_what_workers_have_counted() -> None:
    rack = Rack()
    rack.join("a")
    assert rack.counters() == {}
    rack.beat("a", KNOWN)
    assert rack.counters() == ONE
    rack.beat("a", KNOWN)
    assert rack.counters() == ONE, "a heartbeat says it all anew"


def test_workers_counts_add_up_but_for_what_all_see_of_the_same_servers() -> None:
    rack = Rack()
    for name in "abc":
        rack.join(name)
    for name in "abc":
        rack.beat(name, KNOWN)
    assert rack.counters() == {name: (1 if name == SERVERS_EVICTED else 3) * count for name, count in ONE.items()}


def test_no_total_falls_when_a_worker_is_lost_and_what_it_told_of_the_servers_is_told_on() -> None:
    rack = Rack()
    rack.join("a")
    rack.join("b")
    rack.beat("a", KNOWN)
    rack.beat("b", KNOWN)
    before = rack.counters()
    rack.bench.membership.lost(WorkerId("a"), "was killed")
    assert rack.counters() == before
    rack.beat("b", twice(KNOWN))
    assert rack.counters() == {name: (2 if name == SERVERS_EVICTED else 3) * count for name, count in ONE.items()}


def test_what_a_worker_counted_before_it_joined_is_not_counted_now() -> None:
    """Workers outlive their router: a new one would tell of all that they have ever done as if it were of a moment."""
    rack = Rack()
    rack.bench.hear(offer("a"))
    rack.beat("a", KNOWN)
    assert rack.counters() == {}
    rack.beat("a", twice(KNOWN))
    told = rack.counters()
    assert told['bascule_kv_store_load_seconds_total{tier="disk"}'] == 0.5


def test_a_count_that_is_taken_back_stands_still_until_it_has_caught_up() -> None:
    """Servers that are started anew have evicted nothing."""
    rack = Rack()
    rack.join("a")
    seen = []
    for evictions in (100, 40, 70, 140):
        rack.beat("a", WorkerLoad(stores={Tier.REMOTE: StoreLoad(evictions=evictions)}))
        seen.append(rack.read()[SERVERS_EVICTED])
    assert seen == [100, 100, 100, 140]


def test_a_prompts_tokens_are_found_once_and_no_more_of_them_than_there_are() -> None:
    totals = Totals()
    totals.found(100, 60, {"disk": 32, "peer": 8})
    totals.found(50, 0, {})
    totals.found(10, 80, {"host": 4, "disk": 64})
    read = totals.read()
    found = {key[1]: count for key, count in read.items() if key[0] == HITS}
    assert found == {"device": 20, "host": 4, "disk": 32 + 6, "peer": 8}
    assert read["bascule_prompt_tokens",] == 160


def test_blocks_of_a_tier_are_those_of_all_its_places_each_counted_once() -> None:
    rack = Rack()
    rack.join("a", disk="shared")
    rack.join("b", disk="shared")
    rack.join("c")
    for name, blocks in (("a", 30), ("b", 31), ("c", 12)):
        rack.beat(name, WorkerLoad(stores={Tier.DISK: StoreLoad(blocks=blocks), Tier.REMOTE: StoreLoad(blocks=70)}))
    assert rack.read()['bascule_kv_store_blocks{tier="disk"}'] == 31 + 12
    assert rack.read()['bascule_kv_store_blocks{tier="remote"}'] == 70


def test_reasons_that_a_worker_invents_without_end_are_not_all_kept() -> None:
    rack = Rack()
    rack.join("a")
    for start in range(0, 3000, 500):
        rack.beat("a", WorkerLoad(handoff_refused={str(start + number): 1 for number in range(500)}))
    assert 500 < len(rack.counters()) <= 1000
    rack.beat("a", KNOWN)
    assert rack.counters()["bascule_kv_fetch_bytes_total"] == 512, "those known before are counted on"
