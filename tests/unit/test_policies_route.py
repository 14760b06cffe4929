"""Static routing policies: who is picked, who waits, and what happens when a pool is empty."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.policies.route import BALANCES, POLICIES, policy_named
from bascule.types import Placement, RequestId, Role, RouteQuery, Snapshot, WorkerId, WorkerView


def worker(name: str, role: Role, **changes: object) -> WorkerView:
    values = {
        "placeable": True,
        "prefilling": 0,
        "decoding": 0,
        "prefill_tokens": 0,
        "slots": 4,
        "prefill_window": 1000,
    } | changes
    return WorkerView(id=WorkerId(name), role=role, **values)  # type: ignore[arg-type]


def query(tokens: int = 100, excluded: frozenset[WorkerId] = frozenset()) -> RouteQuery:
    return RouteQuery(request=RequestId("r"), prompt_tokens=tokens, max_tokens=8, excluded=excluded)


def test_disaggregated_takes_one_worker_of_each_pool() -> None:
    snapshot = Snapshot((worker("p", Role.PREFILL), worker("d", Role.DECODE)), 0)
    decision = policy_named("disaggregated", "least-loaded")(snapshot, query())
    assert decision.placement == Placement(WorkerId("p"), WorkerId("d"))
    assert decision.placement.remote


def test_least_loaded_prefers_the_emptier_and_ties_take_turns() -> None:
    busy, idle = worker("a", Role.MIXED, decoding=2), worker("b", Role.MIXED)
    policy = policy_named("replicated", "least-loaded")
    assert policy(Snapshot((busy, idle), 0), query()).placement == Placement(idle.id, idle.id)
    twins = (worker("a", Role.MIXED), worker("b", Role.MIXED))
    picked = {policy(Snapshot(twins, turn), query()).placement for turn in range(2)}
    assert len(picked) == 2


def test_round_robin_ignores_load() -> None:
    pool = (worker("a", Role.MIXED, decoding=3), worker("b", Role.MIXED))
    policy = policy_named("replicated", "round-robin")
    picked = [policy(Snapshot(pool, turn), query()).placement for turn in range(4)]
    assert [p.prefill for p in picked if p] == ["a", "b", "a", "b"]


def test_a_full_window_or_full_slots_let_the_request_wait() -> None:
    policy = policy_named("disaggregated", "least-loaded")
    full = worker("p", Role.PREFILL, prefilling=2, prefill_tokens=950)
    assert policy(Snapshot((full, worker("d", Role.DECODE)), 0), query()).placement is None
    taken = worker("d", Role.DECODE, decoding=4)
    assert policy(Snapshot((worker("p", Role.PREFILL), taken), 0), query()).placement is None


def test_an_idle_worker_takes_a_prompt_longer_than_its_window() -> None:
    snapshot = Snapshot((worker("p", Role.PREFILL), worker("d", Role.DECODE)), 0)
    assert policy_named("disaggregated", "least-loaded")(snapshot, query(5000)).placement is not None


@pytest.mark.parametrize(("role", "name"), [(Role.PREFILL, "p"), (Role.DECODE, "d")])
def test_a_pool_without_workers_is_stood_in_for_by_the_other(role: Role, name: str) -> None:
    gone = worker("x", Role.DECODE if role is Role.PREFILL else Role.PREFILL, placeable=False)
    decision = policy_named("disaggregated", "least-loaded")(Snapshot((worker(name, role), gone), 0), query())
    assert decision.placement == Placement(WorkerId(name), WorkerId(name))


def test_a_worker_that_failed_the_request_is_avoided_while_there_is_another() -> None:
    pool = (worker("a", Role.MIXED), worker("b", Role.MIXED, decoding=3))
    policy = policy_named("replicated", "least-loaded")
    avoided = policy(Snapshot(pool, 0), query(excluded=frozenset({WorkerId("a")}))).placement
    assert avoided == Placement(WorkerId("b"), WorkerId("b"))
    alone = policy(Snapshot(pool[:1], 0), query(excluded=frozenset({WorkerId("a")}))).placement
    assert alone == Placement(WorkerId("a"), WorkerId("a"))


workers = st.lists(
    st.builds(
        lambda name, role, placeable, prefilling, decoding: worker(
            f"w{name}",
            role,
            placeable=placeable,
            prefilling=prefilling,
            prefill_tokens=300 * prefilling,
            decoding=decoding,
        ),
        st.integers(0, 99),
        st.sampled_from(list(Role)),
        st.booleans(),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    max_size=8,
    unique_by=lambda view: view.id,
)


@given(workers, st.integers(0, 10), st.sampled_from(POLICIES), st.sampled_from(BALANCES))
def test_only_placeable_workers_with_room_are_picked_and_the_same_input_decides_the_same(
    pool: list[WorkerView], turn: int, name: str, balance: str
) -> None:
    policy = policy_named(name, balance)
    decision = policy(Snapshot(tuple(pool), turn), query())
    assert decision == policy(Snapshot(tuple(pool), turn), query())
    assert decision.reason
    by_id = {view.id: view for view in pool}
    if decision.placement is not None:
        prefill, decode = by_id[decision.placement.prefill], by_id[decision.placement.decode]
        assert prefill.placeable and decode.placeable
        assert prefill.prefilling == 0 or prefill.prefill_tokens + 100 <= prefill.prefill_window
        assert decode.decoding < decode.slots


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("balance", BALANCES)
def test_an_attached_server_takes_whole_requests_only_and_none_that_it_cannot_continue(
    policy: str, balance: str
) -> None:
    route = policy_named(policy, balance)
    server, mixed = worker("attached-0", Role.MIXED, attached=True), worker("m", Role.MIXED)
    for turn in range(4):
        decision = route(Snapshot((server, mixed), turn), query())
        assert decision.placement is not None and not decision.placement.remote
        bound = msgspec.structs.replace(query(), portable=False)
        assert route(Snapshot((server, mixed), turn), bound).placement == Placement(mixed.id, mixed.id)
        assert route(Snapshot((server,), turn), bound).placement is None
        assert route(Snapshot((server,), turn), query()).placement == Placement(server.id, server.id)


def test_a_split_cluster_sends_whole_requests_to_attached_servers_when_it_is_full() -> None:
    prefill, server = worker("p", Role.PREFILL), worker("attached-0", Role.MIXED, attached=True)
    route = policy_named("disaggregated", "least-loaded")
    free = route(Snapshot((server, prefill, worker("d", Role.DECODE)), 0), query())
    assert free.placement == Placement(prefill.id, WorkerId("d"))
    full = route(Snapshot((server, prefill, worker("d", Role.DECODE, decoding=4)), 0), query())
    assert full.placement == Placement(server.id, server.id)
