"""Policies by name, and what happens when somebody else's fails."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from tests.unit.routing_rig import Cluster

from bascule.errors import ConfigError
from bascule.policies.snapshot import Decision, RouteQuery, Snapshot
from bascule.router.policy import NAMES, PlugIn, nonsense, orders_by_work, policy_named
from bascule.types import Placement, Role, WorkerId


def placed(prefill: str, decode: str = "") -> Decision:
    return Decision(placement=Placement(WorkerId(prefill), WorkerId(decode or prefill)), reason="because")


def cluster() -> Cluster:
    """`b` is the least loaded."""
    cluster = Cluster()
    cluster.add("a", streams=(10, 10))
    cluster.add("b")
    cluster.add("away", placeable=False)
    cluster.add("full", slots=1, streams=(10,))
    cluster.add("alone", hands_off=False, streams=(10, 10))
    return cluster


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_has_its_name_and_places_a_request(name: str) -> None:
    decision = policy_named(name, "least-loaded")(cluster().snapshot(), cluster().query())
    assert decision.placement is not None
    assert decision.reason


def test_an_unknown_name_is_refused_with_the_nearest_one_or_all() -> None:
    with pytest.raises(ConfigError, match="did you mean adaptive"):
        policy_named("adaptiv", "least-loaded")
    with pytest.raises(ConfigError, match="replicated, disaggregated"):
        policy_named("zzz", "least-loaded")


def test_only_policies_that_predict_let_short_prompts_go_first() -> None:
    assert orders_by_work("adaptive")
    assert orders_by_work("pkg.module:function")
    assert not any(orders_by_work(name) for name in NAMES if name != "adaptive")


def test_a_plug_in_is_imported_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_plug_in")
    module.__dict__.update(route=lambda snapshot, query: placed("a"), table={})
    monkeypatch.setitem(sys.modules, "a_plug_in", module)
    policy = policy_named("a_plug_in:route", "least-loaded")
    assert policy(cluster().snapshot(), cluster().query()) == placed("a")
    for name, said in (
        ("a_plug_in:other", "other"),
        ("no_such_module:f", "no_such_module"),
        (":f", "module"),
        ("a_plug_in:table", "dict, not a function"),
    ):
        with pytest.raises(ConfigError, match=said):
            policy_named(name, "least-loaded")


def raising(snapshot: Snapshot, query: RouteQuery) -> Decision:
    raise RuntimeError("out of ideas")


def returning(value: Any) -> Callable[[Snapshot, RouteQuery], Any]:
    return lambda snapshot, query: value


WRONG = {
    "RuntimeError: out of ideas": raising,
    "a NoneType, not a Decision": returning(None),
    "a str, not a Decision": returning("b"),
    "placement is a str": returning(Decision(placement="b", reason="")),  # type: ignore[arg-type]
    "'nobody', which is not there": returning(placed("nobody")),
    "'', which is not there": returning(Decision(placement=Placement(WorkerId(""), WorkerId("")), reason="")),
    "takes no requests now": returning(placed("away")),
    "all of whose slots are taken": returning(placed("b", "full")),
    "cannot take part in one": returning(placed("b", "alone")),
}


@pytest.mark.parametrize("said", WRONG)
def test_where_a_plug_in_fails_the_least_loaded_worker_is_taken_and_it_is_told_once(
    said: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = PlugIn("mine:route", WRONG[said])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert policy(cluster().snapshot(), cluster().query()).placement == placed("b").placement
    assert policy.failures == 3
    assert len(caplog.records) == 1
    assert said in caplog.text
    assert "mine:route" in caplog.text


def test_a_plug_in_may_let_requests_wait_and_choose_two_workers() -> None:
    for decision in (Decision(placement=None, reason="later"), placed("a", "b"), placed("alone")):
        policy = PlugIn("mine:route", returning(decision))
        answer = policy(cluster().snapshot(), cluster().query())
        assert (answer.placement, answer.reason) == (decision.placement, decision.reason)
        assert policy.failures == 0


def test_none_of_ours_returns_what_would_be_refused_of_a_plug_in() -> None:
    mixed = Cluster()
    for at, role in enumerate([Role.PREFILL, Role.DECODE, Role.MIXED] * 2):
        mixed.add(f"w{at}", role, streams=(10,) * at, hands_off=at != 3)
    for name in NAMES:
        decision = policy_named(name, "least-loaded")(mixed.snapshot(), mixed.query(900))
        assert nonsense(mixed.snapshot(), mixed.query(900), decision) == ""


def test_what_a_plug_in_says_besides_its_placement_is_not_believed() -> None:
    told = Decision(placement=placed("b").placement, reason=7, candidates=(("b", 1.0),))  # type: ignore[arg-type]
    policy = PlugIn("mine:route", returning(told))
    answer = policy(cluster().snapshot(), cluster().query())
    assert (answer.placement, answer.reason, answer.candidates) == (placed("b").placement, "7", ())


def test_a_plug_in_cannot_write_the_routers_columns() -> None:
    def trying(snapshot: Snapshot, query: RouteQuery) -> Decision:
        snapshot.decoding[0] += 1
        return placed("b")

    def dearer(snapshot: Snapshot, query: RouteQuery) -> Decision:
        snapshot.cost.step_s[:] = 1e9
        return placed("b")

    for meddling in (trying, dearer):
        mine, policy = cluster(), PlugIn("mine:route", meddling)
        policy(mine.snapshot(), mine.query())
        assert policy.failures == 1
        assert mine.columns.decoding[0] == cluster().columns.decoding[0]
        assert mine.columns.cost.step_s[0] == cluster().columns.cost.step_s[0]
