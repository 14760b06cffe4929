"""Who of the workers is asked for KV that another one lacks: one that has said to have it, never one that only may."""

from __future__ import annotations

import pytest
from membership_rig import CARD, Bench, offer
from msgspec.structs import replace

from bascule.kv.hashing import BlockHasher
from bascule.router.found import Peer
from bascule.types import Epoch, LinkCost, Placement, Tier, WorkerId, WorkerLoad
from bascule.wire import Heartbeat, KvEvents, StorePlace, TierChanges

SIZE = CARD.layout.block_size
PROMPT = BlockHasher("model", 1).chain(range(20))
ELSEWHERE = StorePlace("rack 8", 90)


def events(name: str, sequence: int, *changes: TierChanges, anew: bool = False) -> KvEvents:
    return KvEvents(
        worker=WorkerId(name), epoch=Epoch(f"{name}-1"), sequence=sequence, anew=anew, changes=tuple(changes)
    )


def has(made: Bench, name: str, blocks: int, tier: str = "device") -> None:
    made.hear(events(name, 2, TierChanges(tier, b"".join(PROMPT[:blocks]), b"")))


@pytest.fixture
def made() -> Bench:
    """`a`, `b` and `c` lend; `b` has memory on a host of its own; `d` does not lend."""
    bench = Bench()
    for name in "abcd":
        stores = {Tier.HOST: ELSEWHERE} if name == "b" else {}
        bench.hear(replace(offer(name), lends=name != "d", stores=stores))
        bench.hear(events(name, 1, TierChanges("device", b"", b""), anew=True))
    return bench


def row(made: Bench, name: str) -> int:
    return made.view.members[WorkerId(name)].row


def test_the_peer_is_the_worker_that_has_most(made: Bench) -> None:
    has(made, "a", 6)
    has(made, "c", 9)
    assert made.view.found(PROMPT).peer == Peer(row(made, "c"), 9 * SIZE)


def test_a_worker_that_does_not_lend_or_is_suspect_is_no_peer(made: Bench) -> None:
    has(made, "d", 9)
    assert made.view.found(PROMPT).peer == Peer()
    has(made, "a", 6)
    assert made.view.found(PROMPT).peer.row == row(made, "a")
    made.view.columns.placeable[row(made, "a")] = False
    assert made.view.found(PROMPT).peer == Peer()


def test_a_few_blocks_are_not_worth_asking_for(made: Bench) -> None:
    has(made, "a", 3)
    assert made.view.found(PROMPT).peer == Peer()


def test_what_a_worker_is_only_expected_to_have_cannot_be_fetched(made: Bench) -> None:
    made.view.expect(Placement(WorkerId("a"), WorkerId("a")), PROMPT, 0.0)
    found = made.view.found(PROMPT)
    assert found.cached[row(made, "a")] == len(PROMPT) * SIZE
    assert found.peer == Peer()
    has(made, "c", 8)
    assert made.view.found(PROMPT).peer == Peer(row(made, "c"), 8 * SIZE)


def test_a_peer_lends_from_its_hosts_memory_too_and_that_takes_time(made: Bench) -> None:
    has(made, "b", 12, "host")
    peer = made.view.found(PROMPT).peer
    assert (peer.row, peer.tokens) == (row(made, "b"), 12 * SIZE)
    assert peer.load_s > 0


def test_of_equals_the_one_with_most_on_its_device_is_asked(made: Bench) -> None:
    has(made, "b", 9, "host")
    has(made, "c", 9)
    assert made.view.found(PROMPT).peer == Peer(row(made, "c"), 9 * SIZE)


def test_a_worker_that_has_left_is_no_peer(made: Bench) -> None:
    has(made, "a", 9)
    made.membership.lost(WorkerId("a"), "ended")
    assert made.view.found(PROMPT).peer == Peer()


def test_a_link_that_its_worker_has_forgotten_is_forgotten(made: Bench) -> None:
    def beat(**links: LinkCost) -> None:
        load = WorkerLoad(links={WorkerId(name): link for name, link in links.items()})
        made.hear(Heartbeat(WorkerId("a"), Epoch("a-1"), load, 1))

    beat(b=LinkCost(0.1, 1e6), c=LinkCost(0.2, 1e7))
    beat(c=LinkCost(0.3, 1e8))
    assert made.view.links == {(WorkerId("a"), WorkerId("c")): LinkCost(0.3, 1e8)}
    beat()
    assert not made.view.links
