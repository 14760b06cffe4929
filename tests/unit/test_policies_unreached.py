"""Workers that cannot connect to each other: no policy lets KV go between them, nor waits for what is elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from membership_rig import Bench, offer
from msgspec.structs import replace
from routing_rig import Cluster

from bascule.policies.handoff import cut_off
from bascule.policies.route import adaptive
from bascule.policies.snapshot import STORE_TIERS, Decision, StoreColumns
from bascule.router.policy import policy_named
from bascule.types import Epoch, LinkCost, Role, Slo, Tier, WorkerId, WorkerLoad
from bascule.wire import Goodbye, Heartbeat

SPLITTING = ("disaggregated", "thresholds", "adaptive")
FAR = "tcp://10.0.0.9:1 (no answer within 2 s)"


def cut(cluster: Cluster, source: str, *targets: str) -> None:
    """`source` cannot connect to those."""
    row = cluster.columns.ids.index
    cluster.columns.reaches(row(WorkerId(source)), frozenset(row(WorkerId(target)) for target in targets))


def decide(cluster: Cluster, name: str = "disaggregated", turn: int = 0, **query: Any) -> Decision:
    return policy_named(name, "least-loaded")(cluster.snapshot(turn), cluster.query(**query))


def went(decision: Decision) -> str:
    return "" if decision.placement is None else f"{decision.placement.prefill}>{decision.placement.decode}"


def split(*prefills: str, decodes: str = "de") -> Cluster:
    cluster = Cluster()
    for name in prefills:
        cluster.add(name, Role.PREFILL)
    for name in decodes:
        cluster.add(name, Role.DECODE, slots=4)
    return cluster


# ------------------------------------------------------------ baselines


@pytest.mark.parametrize("balance", ["least-loaded", "round-robin"])
def test_each_prefill_worker_hands_over_to_those_that_it_reaches(balance: str) -> None:
    cluster = split("p", "q")
    cut(cluster, "p", "d")
    policy = policy_named("disaggregated", balance)
    places = {went(policy(cluster.snapshot(turn), cluster.query())) for turn in range(8)}
    assert "p>e" in places and {place[0] for place in places} == {"p", "q"}
    assert "p>d" not in places


def test_one_who_reaches_nobody_prefills_for_nobody() -> None:
    cluster = split("p", "q")
    cut(cluster, "p", "d", "e")
    assert {went(decide(cluster, turn=turn)).split(">")[0] for turn in range(4)} == {"q"}


def test_where_nobody_reaches_anybody_requests_stay_whole() -> None:
    cluster = split("p")
    cut(cluster, "p", "d", "e")
    decision = decide(cluster)
    assert decision.placement is not None and not decision.placement.remote
    assert "no prefill worker can connect to a decode worker" in decision.reason


def test_a_request_waits_for_a_slot_that_somebody_reaches_and_takes_one_that_is_reached() -> None:
    cluster = split("p")
    cut(cluster, "p", "d")
    cluster.columns.decoding[cluster.columns.ids.index(WorkerId("e"))] = 4
    decision = decide(cluster)
    assert decision.placement is None and "out of a prefill worker's reach" in decision.reason
    cluster.add("q", Role.PREFILL)
    assert {went(decide(cluster, turn=turn)) for turn in range(4)} == {"q>d"}


def test_a_mixed_worker_that_reaches_nobody_serves_whole_requests() -> None:
    cluster = Cluster()
    for name in "mn":
        cluster.add(name, Role.MIXED)
    cut(cluster, "m", "n")
    assert {went(decide(cluster, turn=turn)) for turn in range(8)} <= {"m>m", "n>m", "n>n"}
    assert went(decide(cluster, turn=0)).startswith("m")


# ------------------------------------------------------------ adaptive


def long_prompt(cluster: Cluster) -> str:
    return went(decide(cluster, "adaptive", tokens=2000, slo=Slo(2.0, 0.06, 0.2)))


def test_the_cheapest_placement_is_of_those_that_reach_each_other() -> None:
    cluster = Cluster()
    cluster.add("p", Role.PREFILL)
    for name in "de":
        cluster.add(name, Role.DECODE, streams=(300,) * (12 if name == "d" else 14))
    assert long_prompt(cluster) == "p>d"
    cut(cluster, "p", "d")
    assert long_prompt(cluster) == "p>e"
    cut(cluster, "p", "d", "e")
    assert long_prompt(cluster) in ("p>p", "d>d", "e>e")
    cut(cluster, "p")
    assert long_prompt(cluster) == "p>d"


def test_idle_workers_that_reach_nobody_do_not_crowd_out_one_that_does() -> None:
    """They are always the cheapest to prefill on, as nothing goes there."""
    cluster = Cluster()
    cluster.add("d", Role.DECODE, streams=(300,) * 12)
    cluster.add("p", Role.PREFILL, prompts=(200,))
    lonely = [f"lonely-{number}" for number in range(8)]
    for name in lonely:
        cluster.add(name, Role.PREFILL)
        cut(cluster, name, "d")
    assert long_prompt(cluster) == "p>d"


def test_the_best_homes_of_each_source_are_looked_for_where_it_reaches() -> None:
    """The six cheapest homes are all beyond the reach of the only prefill worker."""
    cluster = Cluster()
    cluster.add("p", Role.PREFILL)
    near = [f"near-{number}" for number in range(8)]
    for name in near:
        cluster.add(name, Role.DECODE, streams=(300,) * 12)
    cluster.add("far", Role.DECODE, streams=(300,) * 16)
    cut(cluster, "p", *near)
    assert long_prompt(cluster) == "p>far"


# ------------------------------------------------------------ all

workers = st.tuples(st.sampled_from(list(Role)), st.lists(st.integers(1, 2000), max_size=4), st.integers(0, 1500))


@given(
    st.lists(workers, min_size=1, max_size=9),
    st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8))),
    st.sampled_from(SPLITTING),
    st.integers(1, 3000),
    st.integers(0, 9),
)
def test_kv_goes_only_where_it_can_go(
    pool: list[tuple[Role, list[int], int]], apart: set[tuple[int, int]], name: str, tokens: int, turn: int
) -> None:
    cluster = Cluster()
    for number, (role, streams, cached) in enumerate(pool):
        cluster.add(f"w{number}", role, streams=tuple(streams), cached=cached, slots=4)
    rows = range(len(pool))
    for source in rows:
        targets = [f"w{target}" for target in rows if (source, target) in apart and source != target]
        cut(cluster, f"w{source}", *targets)
    free = decide(cluster, name, turn, tokens=tokens)
    for place in [free.placement, *(each.placement for each in free.candidates)]:
        if place is not None and place.remote:
            assert (int(place.prefill[1:]), int(place.decode[1:])) not in apart
    if name == "adaptive":
        cluster.columns.unreached.clear()
        assert (free.placement is None) == (decide(cluster, name, turn, tokens=tokens).placement is None)


def stores(cluster: Cluster, *sharing: str) -> StoreColumns:
    """A tier in the host's memory that those share, as quick as the link."""
    shape = (len(cluster.columns.ids), len(STORE_TIERS))
    place = np.full(shape, -1)
    for name in sharing:
        place[cluster.columns.ids.index(WorkerId(name)), STORE_TIERS.index(Tier.HOST)] = 7
    return StoreColumns(place, np.full(shape, 0.001), np.full(shape, 1e-9))


@pytest.mark.parametrize("handoff", ["push", "store", "auto"])
@pytest.mark.parametrize("name", ["disaggregated", "adaptive"])
def test_by_way_of_a_tier_nobody_needs_to_reach_anybody(name: str, handoff: str) -> None:
    cluster = Cluster()
    cluster.add("p", Role.PREFILL)
    for home in "de":
        cluster.add(home, Role.DECODE, streams=(300,) * (12 if home == "d" else 14))
    cut(cluster, "p", "d", "e")
    cluster.links[WorkerId("p"), WorkerId("d")] = LinkCost(0.0001, 1e12)
    snapshot = replace(cluster.snapshot(), stores=stores(cluster, "p", "d"))
    query = cluster.query(2000, handoff=handoff, slo=Slo(2.0, 0.06, 0.2))
    decision = policy_named(name, "least-loaded")(snapshot, query)
    assert decision.placement is not None and decision.placement.remote == (handoff != "push")
    if handoff != "push":
        assert went(decision) == "p>d"
        assert cut_off(snapshot, query, 0).tolist() == [cluster.columns.ids.index(WorkerId("e"))]
    if name == "adaptive" and handoff != "push":
        assert decision.candidates[0].handed_by is Tier.HOST, "quicker or not, it cannot be pushed"


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("b", "a")])
def test_kv_is_fetched_only_where_each_reaches_the_other(source: str, target: str) -> None:
    """Who asks connects to the lender, and the lender to who asks."""
    cluster = Cluster()
    for name in "abc":
        cluster.add(name, cached=960 if name == "a" else 0, prompts=(900, 900) if name == "a" else ())
    for name in "bc":
        cluster.links[WorkerId("a"), WorkerId(name)] = LinkCost(0.002, 1e9)
    query = cluster.query(1000, peer=0, peer_tokens=960)

    def fetching() -> set[str]:
        return {each.placement.prefill for each in adaptive(cluster.snapshot(), query).candidates if each.fetch_from}

    assert fetching() == {"b", "c"}
    cut(cluster, source, target)
    assert fetching() == {"c"}


# ------------------------------------------------------------ what workers say


def test_heartbeats_say_who_is_out_of_reach_until_they_say_it_no_more() -> None:
    bench = Bench("a", "b", "c")

    def unreached() -> dict[int, frozenset[int]]:
        return dict(bench.view.snapshot(0.0).unreached)

    def beat(*unreachable: str) -> None:
        load = WorkerLoad(unreachable={WorkerId(name): FAR for name in unreachable})
        bench.hear(Heartbeat(WorkerId("a"), Epoch("a-1"), load))

    assert unreached() == {}
    beat("b", "c", "who has gone")
    assert unreached() == {0: frozenset({1, 2})}
    beat("c")
    assert unreached() == {0: frozenset({2})}
    bench.hear(Goodbye(WorkerId("c"), Epoch("c-1")))
    assert unreached() == {}, "its row is another's now"
    bench.hear(offer("d"))
    beat("d")
    assert unreached() == {0: frozenset({2})}
    beat()
    assert unreached() == {}
    beat("b")
    bench.hear(Goodbye(WorkerId("a"), Epoch("a-1")))
    assert unreached() == {}
