"""A tier by which handoffs have come to nothing is left out while there is another way, and the decision says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from routing_rig import Cluster
from test_policies_handoff import FAST, SHARED, SLOW, TOKENS, snapshot_of

from bascule.policies.handoff import handoffs
from bascule.policies.route import adaptive, priced
from bascule.policies.snapshot import STORE_TIERS, Decision, Snapshot, StoreColumns
from bascule.router.policy import policy_named
from bascule.types import Placement, Role, Slo, Tier, WorkerId

SPLIT = Placement(WorkerId("p"), WorkerId("d"))
REMOTE = {name: {Tier.REMOTE: 4} for name in "pd"}


def shunning(snapshot: Snapshot, shunned: dict[tuple[str, Tier], float]) -> Snapshot:
    """The same with these workers leaving these tiers out for so many seconds."""
    stores = snapshot.stores
    assert stores is not None
    seconds = np.zeros(stores.place.shape)
    for (name, tier), wait_s in shunned.items():
        seconds[snapshot.row_of(WorkerId(name)), STORE_TIERS.index(tier)] = wait_s
    return replace(snapshot, stores=replace(stores, shunned_s=seconds))


@pytest.mark.parametrize("at", ["p", "d"])
@pytest.mark.parametrize(
    ("asked", "link", "places", "tier", "instead"),
    [
        ("store", FAST, SHARED, Tier.HOST, Tier.DISK),
        ("auto", SLOW, SHARED, Tier.HOST, Tier.DISK),
        ("store", FAST, REMOTE, Tier.REMOTE, None),
        ("auto", SLOW, REMOTE, Tier.REMOTE, None),
    ],
)
def test_another_tier_or_the_link_is_taken_while_one_worker_leaves_a_tier_out(
    at: str, asked: str, link: Any, places: dict[str, dict[Tier, int]], tier: Tier, instead: Tier | None
) -> None:
    snapshot, cluster = snapshot_of(places, link)
    query = cluster.query(TOKENS, handoff=asked)
    assert priced(snapshot, query, SPLIT).handed_by is tier
    aside = shunning(snapshot, {(at, tier): 12.0})
    candidate = priced(aside, query, SPLIT)
    assert candidate.handed_by is instead
    if instead is None:
        pushed = priced(snapshot, cluster.query(TOKENS, handoff="push"), SPLIT)
        assert candidate.predicted == pushed.predicted, "a dead tier behind a slow link makes the link no quicker"
    told = f"by way of the {tier} tier (again in 12 s) handoffs have come to nothing"
    assert told in policy_named("disaggregated", "least-loaded")(aside, query).reason
    assert told in adaptive(aside, query).reason
    assert "nothing" not in policy_named("disaggregated", "least-loaded")(snapshot, query).reason
    assert priced(shunning(snapshot, {(at, tier): 0.0}), query, SPLIT) == priced(snapshot, query, SPLIT)


def apart(*roles: tuple[str, Role], streams: int = 0) -> tuple[Snapshot, Cluster]:
    """Workers of which the first reaches no other, and which have the remote tier in common, left out for 12 s."""
    cluster = Cluster()
    for number, (name, role) in enumerate(roles):
        cluster.add(name, role, streams=(300,) * streams if number else ())
    cluster.columns.reaches(0, frozenset(range(1, len(roles))))
    shape = (len(cluster.columns.ids), len(STORE_TIERS))
    place = np.full(shape, -1)
    place[: len(roles), STORE_TIERS.index(Tier.REMOTE)] = 4
    stores = StoreColumns(place, np.full(shape, 0.001), np.full(shape, 1e-8))
    snapshot = replace(cluster.snapshot(), stores=stores)
    return shunning(snapshot, {(name, Tier.REMOTE): 12.0 for name, _ in roles}), cluster


def split(snapshot: Snapshot, cluster: Cluster, turn: int = 0) -> Decision:
    query = cluster.query(TOKENS, handoff="store")
    return policy_named("disaggregated", "round-robin")(replace(snapshot, turn=turn), query)


def test_where_there_is_no_other_way_it_goes_by_that_tier_still() -> None:
    snapshot, cluster = apart(("p", Role.PREFILL), ("d", Role.DECODE))
    decision = split(snapshot, cluster)
    assert decision.placement == SPLIT
    assert "by way of the remote tier (again in 12 s)" in decision.reason
    query = cluster.query(TOKENS, handoff="store")
    assert priced(snapshot, query, SPLIT).handed_by is Tier.REMOTE
    ends = np.array([0]), np.array([1]), np.array([512.0])
    assert handoffs(snapshot, query, *ends).twice.all()
    assert not handoffs(shunning(snapshot, {}), query, *ends).twice.any()


def test_who_decodes_too_keeps_what_would_go_by_that_tier() -> None:
    snapshot, cluster = apart(("m", Role.MIXED), ("d", Role.DECODE))
    placements = {split(snapshot, cluster, turn).placement for turn in range(8)}
    at_home = Placement(WorkerId("m"), WorkerId("m"))
    assert placements == {at_home}
    assert "by way of the remote tier (again in 12 s)" in split(snapshot, cluster).reason
    trusting = {split(shunning(snapshot, {}), cluster, turn).placement for turn in range(8)}
    assert len(trusting) == 2 and at_home in trusting


def test_who_is_reached_goes_before_who_has_that_tier_only() -> None:
    snapshot, cluster = apart(("p", Role.PREFILL), ("d", Role.DECODE), ("e", Role.DECODE))
    cluster.columns.reaches(0, frozenset([1]))
    snapshot = replace(snapshot, unreached=cluster.columns.unreached)
    assert {split(snapshot, cluster, turn).placement for turn in range(8)} == {Placement(WorkerId("p"), WorkerId("e"))}


def test_a_prompt_that_would_be_computed_twice_has_its_price() -> None:
    snapshot, cluster = apart(("p", Role.PREFILL), ("d", Role.DECODE), streams=12)
    query = cluster.query(TOKENS, handoff="store", slo=Slo(2.0, 0.06, 0.2))
    twice, once = (priced(each, query, SPLIT) for each in (snapshot, shunning(snapshot, {})))
    assert twice.predicted.transfer_s - once.predicted.transfer_s > 1.0
    assert adaptive(shunning(snapshot, {}), query).placement == SPLIT
    decision = adaptive(snapshot, query)
    assert decision.placement is not None and not decision.placement.remote
    assert "by way of the remote tier (again in 12 s)" in decision.reason
