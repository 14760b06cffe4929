"""What the router does with KV events that are lost, malformed, too many, or of a worker that it does not know."""

from __future__ import annotations

from typing import Any

import pytest
from membership_rig import PROMPT, Bench, offer

from bascule.kv.hashing import BlockHasher
from bascule.router.kv_feed import ASK_AGAIN_S
from bascule.types import Epoch, Placement, WorkerId, WorkerLoad
from bascule.wire import (
    Goodbye,
    Heartbeat,
    KvEvents,
    TierChanges,
)


def events(sequence: int, stored: bytes = b"", removed: bytes = b"", **changes: Any) -> KvEvents:
    values: dict[str, Any] = {
        "worker": WorkerId("a"),
        "epoch": Epoch("a-1"),
        "sequence": sequence,
        "anew": False,
        "changes": (TierChanges("device", stored, removed),),
    }
    return KvEvents(**(values | changes))


def packed(start: int, end: int) -> bytes:
    return b"".join(PROMPT[start:end])


def beat(sequence: int) -> Heartbeat:
    return Heartbeat(WorkerId("a"), Epoch("a-1"), WorkerLoad(), sequence)


def test_events_in_order_are_applied_and_nothing_is_asked() -> None:
    bench = Bench("b", "a")
    bench.hear(events(1, packed(0, 2), anew=True))
    bench.hear(events(2, packed(2, 5)))
    bench.hear(events(3, b"", packed(4, 5)))
    bench.hear(beat(3))
    assert bench.device() == [0, 4]
    assert bench.resyncs() == []
    assert not bench.view.kv_faults


def test_a_gap_is_noticed_once_and_healed_by_a_new_account() -> None:
    bench = Bench("a")
    bench.hear(events(1, packed(0, 4), anew=True))
    bench.hear(events(3, packed(4, 6)))
    assert bench.resyncs() == ["a-1"]
    assert bench.device() == [6], "what came after the gap is true all the same"
    bench.hear(events(4, packed(6, 7)))
    assert bench.view.kv_faults == {"gap": 1}
    bench.hear(events(5, packed(0, 2), anew=True))
    bench.hear(events(6, packed(2, 3)))
    bench.clock.advance(ASK_AGAIN_S)
    bench.hear(beat(6))
    assert bench.device() == [3]
    assert bench.resyncs() == []


def test_what_is_placed_is_expected_where_it_is_computed_and_not_where_it_is_handed_over_to() -> None:
    bench = Bench("a", "b")
    bench.view.expect(Placement(WorkerId("a"), WorkerId("b")), PROMPT, bench.clock.now())
    assert bench.device() == [len(PROMPT), 0]


def test_a_lost_last_message_is_noticed_at_the_next_heartbeat() -> None:
    bench = Bench("a")
    bench.hear(beat(0))
    assert bench.resyncs() == []
    bench.hear(beat(1))
    assert bench.resyncs() == ["a-1"]


def test_a_lost_answer_is_asked_for_again_but_not_at_every_message() -> None:
    bench = Bench("a")
    for sequence in range(2, 100):
        bench.hear(events(sequence))
    assert bench.resyncs() == ["a-1"]
    bench.clock.advance(ASK_AGAIN_S)
    bench.hear(beat(99))
    assert bench.resyncs() == ["a-1"]


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (events(2, b"not sixteen"), "malformed"),
        (events(2, b"", bytes(17)), "malformed"),
        (events(2, changes=(TierChanges("moon", bytes(16), b""),)), "malformed"),
        (events(-1, packed(0, 8)), "malformed"),
        (events(0, packed(0, 8)), "malformed"),
        (events(2, bytes(16 * 101)), "overflow"),
        (events(2, changes=(TierChanges("host", bytes(16), b""),)), "overflow"),
        (events(2**63, packed(0, 1)), "gap"),
    ],
)
def test_events_that_cannot_be_right_are_counted_and_everything_is_asked_for(bad: KvEvents, fault: str) -> None:
    bench = Bench("a")
    bench.hear(events(1, packed(0, 2), anew=True))
    bench.hear(bad)
    assert bench.view.kv_faults == {fault: 1}
    assert bench.resyncs() == ["a-1"]
    bench.hear(events(3, packed(0, 5), anew=True))
    assert bench.device() == [5]
    assert bench.view.index.check_integrity() == []


def test_more_blocks_than_the_worker_registered_void_all_that_it_said() -> None:
    many = BlockHasher("model", 1).chain(range(100))
    bench = Bench("a")
    bench.hear(events(1, b"".join(many), anew=True))
    assert bench.device() == [8]
    bench.hear(events(2, bytes(range(16))))
    assert bench.view.kv_faults == {"overflow": 1}
    assert bench.device() == [0]
    assert bench.view.index.blocks == 0


@pytest.mark.parametrize(
    "stranger",
    [
        events(1, packed(0, 8), worker=WorkerId("z"), epoch=Epoch("z-1")),
        events(1, packed(0, 8), epoch=Epoch("a-0")),
    ],
)
def test_events_of_strangers_and_of_earlier_epochs_are_counted_and_ignored(stranger: KvEvents) -> None:
    bench = Bench("a")
    bench.hear(stranger)
    assert bench.view.kv_faults == {"stranger": 1}
    assert bench.device() == [0]
    assert bench.resyncs() == []


def test_events_that_another_worker_sends_in_its_name_are_ignored() -> None:
    bench = Bench("a", "b")
    bench.membership.apply(Epoch("b-1"), events(1, packed(0, 8)))
    assert bench.device() == [0, 0]


def test_a_worker_that_leaves_or_restarts_takes_its_blocks_along() -> None:
    bench = Bench("a", "b")
    bench.hear(events(1, packed(0, 8), anew=True))
    bench.clock.advance(2.0)  # the first one is silent: its name is free
    bench.hear(offer("a", "a-2"))
    assert bench.device() == [0, 0]
    bench.hear(events(1, packed(0, 3), anew=True, epoch=Epoch("a-2")))
    assert bench.view.members[WorkerId("a")].row == 0
    assert bench.device() == [3, 0]
    bench.hear(Goodbye(WorkerId("a"), Epoch("a-2")))
    assert bench.device() == [0]
    bench.hear(offer("c"))
    rows = {str(member.id): member.row for member in bench.view.members.values()}
    assert rows == {"b": 1, "c": 0}
    assert bench.device() == [0, 0]
