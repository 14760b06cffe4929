"""Routing by simple rules: who is picked, who waits, and what happens when a pool is empty."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.routing_rig import Cluster

from bascule.policies.snapshot import Policy
from bascule.router.policy import NAMES, policy_named
from bascule.types import Placement, RequestId, Role, WorkerId


def placed(name: str) -> Placement:
    return Placement(WorkerId(name), WorkerId(name))


def pair(balance: str = "least-loaded") -> tuple[Policy, Cluster]:
    return policy_named("disaggregated", balance), Cluster(window_tokens=1000)


def test_disaggregated_takes_one_worker_of_each_pool() -> None:
    policy, cluster = pair()
    cluster.add("p", Role.PREFILL)
    cluster.add("d", Role.DECODE)
    assert policy(cluster.snapshot(), cluster.query()).placement == Placement(WorkerId("p"), WorkerId("d"))


def test_a_split_says_what_was_ahead_of_the_request_and_not_what_it_has_to_compute_itself() -> None:
    policy, cluster = pair()
    cluster.add("p", Role.PREFILL, prompts=(300,))
    cluster.add("d", Role.DECODE, streams=(10, 10))
    reason = policy(cluster.snapshot(), cluster.query(500)).reason
    assert reason == "split: 300 prompt tokens were queued on p before this request, d decodes 2"


def test_least_loaded_prefers_the_emptier_and_ties_take_turns() -> None:
    policy = policy_named("replicated", "least-loaded")
    uneven = Cluster()
    uneven.add("a", streams=(10, 10))
    uneven.add("b")
    assert policy(uneven.snapshot(), uneven.query()).placement == placed("b")
    twins = Cluster()
    twins.add("a")
    twins.add("b")
    assert {policy(twins.snapshot(turn), twins.query()).placement for turn in range(2)} == {placed("a"), placed("b")}


def test_round_robin_ignores_load() -> None:
    policy = policy_named("replicated", "round-robin")
    cluster = Cluster()
    cluster.add("a", streams=(10, 10, 10))
    cluster.add("b")
    picked = [policy(cluster.snapshot(turn), cluster.query()).placement for turn in range(4)]
    assert picked == [placed("a"), placed("b"), placed("a"), placed("b")]


def test_random_reaches_all_workers_about_equally_and_is_the_same_for_the_same_request() -> None:
    policy = policy_named("random", "least-loaded")
    cluster = Cluster()
    for name in "abcd":
        cluster.add(name)
    queries = [cluster.query(request=RequestId(f"r{index}")) for index in range(400)]
    first = [policy(cluster.snapshot(), query).placement for query in queries]
    assert first == [policy(cluster.snapshot(), query).placement for query in queries]
    assert min(Counter(first).values()) > 60 and len(set(first)) == 4


def test_prefix_only_goes_where_most_is_cached_whatever_the_load() -> None:
    policy = policy_named("prefix-only", "least-loaded")
    cluster = Cluster()
    cluster.add("a")
    cluster.add("b", cached=64, streams=(500,) * 20)
    cluster.add("c", cached=32)
    assert policy(cluster.snapshot(), cluster.query()).placement == placed("b")


def test_thresholds_keep_short_and_mostly_cached_prompts_where_they_decode() -> None:
    policy = policy_named("thresholds", "least-loaded")
    cluster = Cluster(window_tokens=10_000)
    cluster.add("p", Role.PREFILL)
    cluster.add("d", Role.DECODE, cached=900)
    apart = Placement(WorkerId("p"), WorkerId("d"))
    assert policy(cluster.snapshot(), cluster.query(1000)).placement == placed("d")
    assert policy(cluster.snapshot(), cluster.query(6000)).placement == apart
    cluster.cached[1] = 0
    assert policy(cluster.snapshot(), cluster.query(1000)).placement == apart


def test_a_full_window_or_full_slots_let_the_request_wait() -> None:
    policy, busy = pair()
    busy.add("p", Role.PREFILL, prompts=(500, 450))
    busy.add("d", Role.DECODE)
    assert policy(busy.snapshot(), busy.query()).placement is None
    _, taken = pair()
    taken.add("p", Role.PREFILL)
    taken.add("d", Role.DECODE, streams=(5, 5), slots=2)
    assert policy(taken.snapshot(), taken.query()).placement is None


def test_an_idle_worker_takes_a_prompt_longer_than_its_window() -> None:
    policy, cluster = pair()
    cluster.add("p", Role.PREFILL)
    cluster.add("d", Role.DECODE)
    assert policy(cluster.snapshot(), cluster.query(5000)).placement is not None


@pytest.mark.parametrize(("role", "name"), [(Role.PREFILL, "p"), (Role.DECODE, "d")])
def test_a_pool_without_workers_is_stood_in_for_by_the_other(role: Role, name: str) -> None:
    policy, cluster = pair()
    cluster.add(name, role)
    cluster.add("x", Role.DECODE if role is Role.PREFILL else Role.PREFILL, placeable=False)
    assert policy(cluster.snapshot(), cluster.query()).placement == placed(name)


def test_workers_that_cannot_hand_off_get_whole_requests() -> None:
    policy, cluster = pair()
    cluster.add("p", Role.MIXED, hands_off=False)
    cluster.add("d", Role.DECODE, hands_off=False)
    placement = policy(cluster.snapshot(), cluster.query()).placement
    assert placement is not None and not placement.remote


def test_a_worker_that_failed_the_request_is_avoided_while_there_is_another() -> None:
    policy = policy_named("replicated", "least-loaded")
    cluster = Cluster()
    cluster.add("a")
    cluster.add("b", streams=(10, 10, 10))
    query = cluster.query(excluded=frozenset({WorkerId("a")}))
    assert policy(cluster.snapshot(), query).placement == placed("b")
    cluster.columns.placeable[1] = False
    assert policy(cluster.snapshot(), query).placement == placed("a")


def test_a_request_placed_again_is_prefilled_where_most_of_its_kv_is_left() -> None:
    policy, cluster = pair()
    cluster.add("idle", Role.PREFILL)
    cluster.add("some", Role.PREFILL, cached=32)
    cluster.add("busy", Role.PREFILL, prompts=(300,), cached=64)
    cluster.add("d", Role.DECODE)
    cluster.add("dead", Role.DECODE)
    first, again = cluster.query(200), cluster.query(200, excluded=frozenset({WorkerId("dead")}))
    assert policy(cluster.snapshot(), first).placement == Placement(WorkerId("idle"), WorkerId("d"))
    assert policy(cluster.snapshot(), again).placement == Placement(WorkerId("busy"), WorkerId("d"))
    full = cluster.query(900, excluded=again.excluded)
    assert policy(cluster.snapshot(), full).placement == Placement(WorkerId("some"), WorkerId("d")), (
        "its window is full"
    )


@pytest.mark.parametrize("balance", ["least-loaded", "round-robin"])
def test_of_equal_remains_the_least_loaded_is_taken_and_without_any_the_rule_decides(balance: str) -> None:
    policy, cluster = pair(balance)
    cluster.add("p", Role.PREFILL, prompts=(300,), cached=64)
    cluster.add("q", Role.PREFILL, cached=64)
    cluster.add("d", Role.DECODE)
    again = cluster.query(200, excluded=frozenset({WorkerId("dead")}))
    placed = [policy(cluster.snapshot(turn), again).placement for turn in range(2)]
    assert placed == [Placement(WorkerId("q"), WorkerId("d"))] * 2
    cluster.cached.clear()
    anew = cluster.query(200, excluded=again.excluded)
    for turn in range(2):
        unlisted = cluster.query(200)
        assert policy(cluster.snapshot(turn), anew).placement == policy(cluster.snapshot(turn), unlisted).placement


pools = st.lists(
    st.tuples(
        st.sampled_from(list(Role)),
        st.booleans(),
        st.lists(st.integers(1, 3000), max_size=4),
        st.lists(st.integers(1, 3000), max_size=5),
        st.booleans(),
        st.integers(0, 2000),
    ),
    max_size=10,
)


@given(pools, st.integers(0, 10), st.sampled_from(NAMES), st.integers(1, 4000))
def test_only_workers_with_room_are_picked_and_the_same_input_decides_the_same(
    pool: list[tuple[Role, bool, list[int], list[int], bool, int]], turn: int, name: str, tokens: int
) -> None:
    cluster = Cluster(window_tokens=1000)
    for number, (role, placeable, prompts, streams, hands_off, cached) in enumerate(pool):
        cluster.add(
            f"w{number}",
            role,
            placeable=placeable,
            prompts=tuple(prompts),
            streams=tuple(streams),
            hands_off=hands_off,
            cached=cached,
            slots=6,
        )
    policy = policy_named(name, "least-loaded")
    decision = policy(cluster.snapshot(turn), cluster.query(tokens))
    assert decision == policy(cluster.snapshot(turn), cluster.query(tokens))
    assert decision.reason
    for placement in [decision.placement, *(each.placement for each in decision.candidates)]:
        if placement is not None:
            home, source = (cluster.columns.ids.index(worker) for worker in (placement.decode, placement.prefill))
            assert pool[home][1] and pool[source][1], "not placeable"
            assert cluster.columns.decoding[home] < 6, "no slot"
            assert not placement.remote or (pool[home][4] and pool[source][4]), "cannot hand off"


@pytest.mark.parametrize("name", NAMES)
def test_an_attached_server_takes_whole_requests_only_and_none_that_it_cannot_continue(name: str) -> None:
    route = policy_named(name, "least-loaded")
    cluster = Cluster()
    cluster.add("attached-0", hands_off=False)
    cluster.add("m")
    for turn in range(4):
        decision = route(cluster.snapshot(turn), cluster.query())
        assert decision.placement is not None and not decision.placement.remote
        bound = cluster.query(portable=False)
        assert route(cluster.snapshot(turn), bound).placement == placed("m")
        cluster.columns.placeable[1] = False
        assert route(cluster.snapshot(turn), bound).placement is None
        assert route(cluster.snapshot(turn), cluster.query()).placement == placed("attached-0")
        cluster.columns.placeable[1] = True


def test_a_split_cluster_sends_whole_requests_to_attached_servers_when_it_is_full() -> None:
    policy, cluster = pair()
    cluster.add("attached-0", hands_off=False)
    cluster.add("p", Role.PREFILL)
    cluster.add("d", Role.DECODE, slots=4)
    assert policy(cluster.snapshot(), cluster.query()).placement == Placement(WorkerId("p"), WorkerId("d"))
    cluster.columns.decoding[2] = 4
    assert policy(cluster.snapshot(), cluster.query()).placement == placed("attached-0")
