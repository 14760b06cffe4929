"""What the router makes of the tiers that its workers tell of: who shares them, what is in them, what loading takes."""

from __future__ import annotations

import numpy as np
from membership_rig import PROMPT, Bench, offer
from msgspec.structs import replace

from bascule.types import Epoch, LinkCost, StoreLoad, Tier, WorkerId, WorkerLoad
from bascule.wire import Heartbeat, KvEvents, StorePlace, TierChanges

SIZE = 16
HOST, DISK = StorePlace("rack 7", 50), StorePlace("mount", 0)


def events(name: str, sequence: int, *changes: TierChanges, anew: bool = False) -> KvEvents:
    return KvEvents(
        worker=WorkerId(name), epoch=Epoch(f"{name}-1"), sequence=sequence, anew=anew, changes=tuple(changes)
    )


def packed(start: int, end: int) -> bytes:
    return b"".join(PROMPT[start:end])


def bench() -> Bench:
    """`a` and `b` share a host, `c` has one of its own; all share a disk; `d` has no store."""
    made = Bench()
    elsewhere = replace(HOST, id="rack 8")
    for name, stores in (
        ("a", {Tier.HOST: HOST, Tier.DISK: DISK}),
        ("b", {Tier.HOST: HOST, Tier.DISK: DISK}),
        ("c", {Tier.HOST: elsewhere, Tier.DISK: DISK}),
        ("d", {}),
    ):
        made.hear(replace(offer(name), stores=stores))
        made.hear(events(name, 1, TierChanges("device", b"", b""), anew=True))
    return made


def stored(made: Bench) -> list[int]:
    """Blocks of the prompt that each worker has or can load."""
    tokens = made.view.found(PROMPT).stored
    assert tokens is not None
    return (tokens[: len(made.view.members)] // SIZE).tolist()


def test_what_one_worker_saves_all_that_share_the_tier_can_load() -> None:
    made = bench()
    made.hear(events("a", 2, TierChanges("host", packed(0, 4), b"")))
    assert stored(made) == [4, 4, 0, 0]
    made.hear(events("c", 2, TierChanges("disk", packed(0, 6), b"")))
    assert stored(made) == [6, 6, 6, 0]
    assert made.device() == [0, 0, 0, 0]
    assert not made.view.kv_faults
    assert made.view.index.check_integrity() == []


def test_what_is_found_missing_is_missing_for_all_that_share_the_tier() -> None:
    made = bench()
    made.hear(events("a", 2, TierChanges("host", packed(0, 8), b"")))
    made.hear(events("b", 2, TierChanges("host", b"", packed(3, 5))))
    assert stored(made) == [3, 3, 0, 0]


def test_a_prefix_may_lie_in_several_tiers() -> None:
    made = bench()
    made.hear(events("a", 2, TierChanges("device", packed(0, 2), b""), TierChanges("host", packed(2, 5), b"")))
    made.hear(events("c", 2, TierChanges("disk", packed(4, 8), b"")))
    assert stored(made) == [8, 0, 0, 0], "only a has the beginning"


def test_loading_costs_what_the_workers_measure_and_nothing_where_nothing_is_loaded() -> None:
    made = bench()
    row = made.view.members[WorkerId("a")].row
    token_bytes = made.view.card.layout.block_bytes // SIZE if made.view.card else 0
    load = WorkerLoad(
        stores={
            Tier.HOST: StoreLoad(cost=LinkCost(0.5, 1e6)),
            Tier.DISK: StoreLoad(cost=LinkCost(2.0, 1e5)),
        }
    )
    made.hear(Heartbeat(WorkerId("a"), Epoch("a-1"), load, 1))
    made.hear(events("a", 2, TierChanges("device", packed(0, 2), b"")))
    found = made.view.found(PROMPT)
    tokens, seconds = found.stored, found.load_s
    assert tokens is not None and seconds is not None
    assert (tokens[row], seconds[row]) == (2 * SIZE, 0.0)
    made.hear(events("a", 3, TierChanges("host", packed(0, 5), b""), TierChanges("disk", packed(0, 8), b"")))
    seconds = made.view.found(PROMPT).load_s
    assert seconds is not None
    expected = 0.5 + 3 * SIZE * token_bytes / 1e6 + 2.0 + 3 * SIZE * token_bytes / 1e5
    assert np.isclose(seconds[row], expected)


def test_a_worker_that_leaves_takes_its_share_and_no_more() -> None:
    made = bench()
    made.hear(events("a", 2, TierChanges("host", packed(0, 4), b"")))
    made.membership.lost(WorkerId("a"), "ended")
    made.hear(events("b", 2, TierChanges("host", packed(4, 6), b"")))
    row = made.view.members[WorkerId("b")].row
    tokens = made.view.found(PROMPT).stored
    assert tokens is not None and tokens[row] == 6 * SIZE
    for name in "bcd":
        made.membership.lost(WorkerId(name), "ended")
    assert made.view.found(PROMPT).stored is None


def test_a_tier_that_seems_fuller_than_it_can_be_is_told_anew_now_and_then_and_costs_nothing_else() -> None:
    """Nobody tells what it evicts. A storm of accounts of everything, the device included, must not come of that."""
    made = bench()
    made.hear(events("a", 2, TierChanges("device", packed(0, 3), b"")))
    made.hear(events("a", 3, TierChanges("host", b"".join(bytes([number]) * 16 for number in range(90)), b"")))
    asked = []
    for sequence in range(4, 104):
        made.clock.advance(1.0)
        names = b"".join(bytes([100, sequence, number, 0]) * 4 for number in range(20))
        made.hear(events("a", sequence, TierChanges("host", names, b"")))
        asked += made.resyncs()
    assert 2 <= asked.count("a-1") <= 4
    assert made.device()[0] == 3
    assert not made.view.kv_faults
    assert made.view.index.check_integrity() == []
    made.hear(events("a", 104, TierChanges("device", packed(0, 3), b""), anew=True))
    made.hear(events("a", 105, TierChanges("host", packed(3, 8), b"")))
    assert stored(made)[0] == 8


def test_tiers_of_no_known_name_and_of_workers_without_a_store_do_no_harm() -> None:
    made = bench()
    made.hear(events("d", 2, TierChanges("host", packed(0, 4), b"")))
    assert made.view.kv_faults == {"overflow": 1}
    made.hear(events("a", 2, TierChanges("attic", packed(0, 4), b"")))
    assert made.view.kv_faults == {"overflow": 1, "malformed": 1}
    assert stored(made) == [0, 0, 0, 0]
