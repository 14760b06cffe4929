"""The adaptive policy: what it may never do whatever the cluster looks like, and where it sends a request."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.unit.routing_rig import COST, STANDARD, Cluster, Wish, built, clusters, queries

from bascule.policies.route import adaptive, priced
from bascule.policies.snapshot import Decision
from bascule.types import CostModel, LinkCost, Placement, Role, Slo, StepLoad, WorkerId


def decide(cluster: Cluster, turn: int = 0, tokens: int = 100, **query: Any) -> Decision:
    return adaptive(cluster.snapshot(turn), cluster.query(tokens, **query))


def chosen(cluster: Cluster, **query: Any) -> str:
    """Where a request goes, as `prefill>decode`."""
    placement = decide(cluster, **query).placement
    return "" if placement is None else f"{placement.prefill}>{placement.decode}"


def prices(cluster: Cluster, query: Wish) -> dict[tuple[str, str], float]:
    """Of every placement, whether it may be chosen or not."""
    snapshot, asked = cluster.snapshot(), cluster.query(**query)
    names = [name for name in snapshot.ids if name]
    every = [Placement(prefill, decode) for prefill in names for decode in names]
    return {(each.prefill, each.decode): priced(snapshot, asked, each).cost_s for each in every}


# ------------------------------------------------------------ what never happens


@settings(max_examples=200, deadline=None)
@given(clusters, queries, st.integers(0, 9))
def test_what_is_chosen_can_be_carried_out(wishes: list[Wish], query: Wish, turn: int) -> None:
    cluster = built(wishes)
    decision = decide(cluster, turn, **query)
    for candidate in decision.candidates:
        place = candidate.placement
        prefill, decode = (wishes[int(name.removeprefix("w"))] for name in (place.prefill, place.decode))
        for wish in (prefill, decode):
            assert wish["placeable"]
            assert wish["kv_tokens"] >= query["tokens"] + 100
            assert wish["hands_off"] or not place.remote
        assert len(decode["prompts"]) + len(decode["streams"]) < decode["slots"]
        if place.remote:
            assert prefill["role"] is not Role.DECODE
    if decision.placement is not None:
        assert decision.placement == decision.candidates[0].placement
        assert decision.chosen() == decision.candidates[0]


@settings(max_examples=200, deadline=None)
@given(clusters, queries)
def test_it_waits_only_if_every_worker_is_out_of_question(wishes: list[Wish], query: Wish) -> None:
    idle = [wish for wish in wishes if wish["placeable"] and not wish["prompts"] and wish["role"] is not Role.PREFILL]
    able = [
        wish for wish in idle if wish["kv_tokens"] >= query["tokens"] + 100 and len(wish["streams"]) < wish["slots"]
    ]
    if able:
        assert decide(built(wishes), **query).placement is not None


@settings(max_examples=200, deadline=None)
@given(clusters, queries, st.integers(0, 9))
def test_equal_inputs_give_equal_decisions_and_are_left_as_they_are(wishes: list[Wish], query: Wish, turn: int) -> None:
    cluster = built(wishes)
    snapshot, asked = cluster.snapshot(turn), cluster.query(**query)
    arrays = [getattr(snapshot, name) for name in snapshot.__struct_fields__]
    arrays += [getattr(snapshot.cost, name) for name in snapshot.cost.__struct_fields__] + [asked.cached]
    arrays = [array for array in arrays if isinstance(array, np.ndarray)]
    for array in arrays:
        array.flags.writeable = False
    before = [array.copy() for array in arrays]
    first = adaptive(snapshot, asked)
    assert msgspec.to_builtins(first) == msgspec.to_builtins(adaptive(snapshot, asked))
    assert msgspec.to_builtins(first) == msgspec.to_builtins(decide(built(wishes), turn, **query))
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays, before, strict=True))


@settings(max_examples=200, deadline=None)
@given(clusters, queries)
def test_every_prediction_is_a_time(wishes: list[Wish], query: Wish) -> None:
    for candidate in decide(built(wishes), **query).candidates:
        terms = [getattr(candidate.predicted, name) for name in candidate.predicted.__struct_fields__]
        assert all(math.isfinite(term) and term >= -1e-12 for term in [*terms, candidate.cost_s])


# ------------------------------------------------------------ more load never attracts

MORE = st.sampled_from(["prompt", "stream", "placed"])


def burden(wish: Wish, more: str, tokens: int) -> Wish:
    """The same worker with one request more."""
    if more == "prompt":
        return wish | {"prompts": (*wish["prompts"], tokens)}
    return wish | {"streams": (*wish["streams"], tokens)}


@settings(max_examples=200, deadline=None)
@given(clusters, queries, st.data())
def test_one_request_more_on_a_worker_lowers_no_price(wishes: list[Wish], query: Wish, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(wishes) - 1))
    heavier = list(wishes)
    heavier[at] = burden(wishes[at], data.draw(MORE), data.draw(st.integers(1, 3000)))
    before, after = prices(built(wishes), query), prices(built(heavier), query)
    for placement, price in before.items():
        if f"w{at}" in placement:
            assert after[placement] >= price - 1e-7 - 1e-9 * price, placement
        else:
            assert after[placement] == pytest.approx(price, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(clusters, queries, st.data())
def test_one_request_more_on_a_worker_draws_nothing_there(wishes: list[Wish], query: Wish, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(wishes) - 1))
    name = WorkerId(f"w{at}")
    before = decide(built(wishes), **query).placement
    if before is None or name in (before.prefill, before.decode):
        return
    heavier = list(wishes)
    heavier[at] = burden(wishes[at], data.draw(MORE), data.draw(st.integers(1, 3000)))
    after = decide(built(heavier), **query).placement
    assert after is not None
    assert name not in (after.prefill, after.decode)


# ------------------------------------------------------------ ties


@pytest.mark.parametrize("cost", [COST, CostModel()])
@pytest.mark.parametrize("number", [2, 5, 30])
def test_over_time_all_equal_workers_are_used(cost: CostModel, number: int) -> None:
    cluster = Cluster()
    for at in range(number):
        cluster.add(f"w{at}", cost=cost)
    used = Counter(decide(cluster, turn).placement for turn in range(3 * number))
    assert len(used) == number
    assert set(used.values()) == {3}


def test_at_equal_prices_the_least_loaded_is_taken_wherever_it_stands() -> None:
    for free in (0, 7, 23):
        cluster = Cluster()
        for at in range(24):
            cluster.add(f"w{at}", cost=CostModel(), streams=() if at == free else (10,))
        assert {decide(cluster, turn).placement for turn in range(5)} == {
            Placement(WorkerId(f"w{free}"), WorkerId(f"w{free}"))
        }


def test_of_equals_the_one_that_knows_the_conversation_is_taken() -> None:
    cluster = Cluster()
    for at in range(20):
        cluster.add(f"w{at}")
    assert {chosen(cluster, turn=turn, session=13) for turn in range(5)} == {"w13>w13"}


# ------------------------------------------------------------ cached prefixes


def test_a_cached_prefix_is_worth_a_queue_that_costs_less_than_to_compute_it_again() -> None:
    def cluster(*queue: int) -> Cluster:
        cluster = Cluster()
        cluster.add("warm", cached=300, prompts=queue)
        cluster.add("cold")
        return cluster

    assert chosen(cluster(), tokens=400) == "warm>warm"
    assert chosen(cluster(100), tokens=400).startswith("warm>")
    assert chosen(cluster(100, 100, 100, 100), tokens=400) == "cold>cold"


def test_a_mostly_cached_prompt_goes_ahead_of_long_ones() -> None:
    cluster = Cluster()
    cluster.add("warm", cached=900, prompts=(3000,))
    cluster.add("cold")
    assert chosen(cluster, tokens=1000).startswith("warm>")


def test_a_prompt_waits_only_for_what_is_left_of_the_step_that_runs() -> None:
    cluster = Cluster()
    cluster.add("a", prompts=(2000,), streams=(500,))

    def queue_s(now: float) -> float:
        cluster.now = now
        return adaptive(cluster.snapshot(), cluster.query(100)).candidates[0].predicted.queue_s

    waits = [queue_s(now) for now in (0.0, 0.05, 0.1, 10.0)]
    assert waits[0] - waits[1] == pytest.approx(0.05, rel=0.01)
    assert waits[1] - waits[2] == pytest.approx(0.05, rel=0.01)
    assert waits[3] == 0.0


def test_a_prefix_that_all_ask_for_is_not_computed_by_one_worker_alone() -> None:
    cluster = Cluster()
    for at in range(4):
        cluster.add(f"w{at}", cached=800)
    placed = place_many(cluster, 40, tokens=900)
    assert len(placed) == 4
    assert max(placed.values()) - min(placed.values()) <= 2


def test_where_only_one_worker_has_the_prefix_a_burst_for_it_overflows_to_others() -> None:
    cluster = Cluster()
    for at in range(4):
        cluster.add(f"w{at}", cached=800 if at == 0 else 0)
    placed = place_many(cluster, 24, tokens=900)
    assert placed["w0"] == max(placed.values())
    assert sum(placed.values()) > placed["w0"]


def place_many(cluster: Cluster, requests: int, tokens: int) -> Counter[str]:
    """Place one after another, without any being worked on; counts the workers that prefill."""
    placed: Counter[str] = Counter()
    for turn in range(requests):
        placement = decide(cluster, turn, tokens=tokens).placement
        if placement is None:
            break
        row, home = (cluster.columns.ids.index(name) for name in (placement.prefill, placement.decode))
        uncached = max(tokens - cluster.cached[row], 1)
        cluster.columns.submitted(row, uncached, 0.1, 0.0)
        cluster.columns.decoding[home] += 1
        cluster.columns.context_tokens[home] += tokens
        placed[placement.prefill] += 1
    return placed


# ------------------------------------------------------------ whole, or handed over


def split(streams: int, cached: int = 0) -> Cluster:
    """A worker that decodes, with streams on it, and one that only prefills; a handoff takes 20 ms."""
    cluster = Cluster()
    cluster.links[WorkerId("p"), WorkerId("d")] = LinkCost(0.02, 1e9)
    cluster.add("d", Role.DECODE, streams=(500,) * streams, cached=cached)
    cluster.add("p", Role.PREFILL)
    return cluster


def test_a_long_prompt_is_kept_away_from_streams() -> None:
    assert chosen(split(12), tokens=2000, slo=STANDARD) == "p>d"
    assert chosen(split(12), tokens=2000) == "p>d"


def test_a_short_or_cached_prompt_is_computed_where_it_is_decoded() -> None:
    assert chosen(split(2), tokens=4) == "d>d"
    assert chosen(split(2, cached=1997), tokens=2000) == "d>d"
    assert chosen(split(0), tokens=2000) == "d>d"


def test_a_worker_that_cannot_hand_off_serves_whole_requests() -> None:
    cluster = Cluster()
    cluster.add("d", Role.DECODE, streams=(500,) * 12)
    cluster.add("p", Role.PREFILL, hands_off=False)
    assert chosen(cluster, tokens=2000) == "d>d"


def test_prefill_workers_serve_alone_when_no_other_is_left() -> None:
    cluster = Cluster()
    cluster.add("p", Role.PREFILL)
    cluster.add("d", Role.DECODE, placeable=False)
    assert chosen(cluster) == "p>p"


def test_a_slow_link_keeps_a_request_in_one_place() -> None:
    cluster = split(3)
    assert chosen(cluster, tokens=600) == "p>d"
    cluster.links[WorkerId("p"), WorkerId("d")] = LinkCost(30.0, 1e9)
    assert chosen(cluster, tokens=600) == "d>d"


def test_a_worker_that_failed_the_request_is_taken_again_only_if_there_is_no_other() -> None:
    cluster = Cluster()
    cluster.add("a", streams=(10,) * 20)
    cluster.add("b")
    assert chosen(cluster, excluded=frozenset({WorkerId("b")})) == "a>a"
    assert chosen(cluster, excluded=frozenset({WorkerId("a"), WorkerId("b")})) == "b>b"


# ------------------------------------------------------------ bounds


def test_without_bounds_nothing_is_said_of_them() -> None:
    assert all(candidate.why_not == "" for candidate in decide(split(12), tokens=4000).candidates)


def test_bounds_that_nobody_can_keep_are_named_and_the_request_is_placed_all_the_same() -> None:
    decision = decide(split(12), tokens=4000, slo=Slo(1e-4, 1e-5, 1e-5))
    assert decision.placement is not None
    assert all(word in decision.candidates[0].why_not for word in ("TTFT", "TPOT", "gap"))


def test_a_bound_on_gaps_turns_a_prompt_away_from_streams_that_would_miss_it() -> None:
    cluster = Cluster()
    cluster.add("busy", streams=(100,) * 2, cached=600)
    cluster.add("idle")
    query = {"tokens": 700, "output_tokens": 20.0, "gap_planned_s": 0.5}
    assert chosen(cluster, **query).startswith("busy>")
    assert chosen(cluster, **query, slo=Slo(2.0, 0.06, 0.1)) == "idle>idle"


def test_full_workers_let_requests_wait_and_say_why() -> None:
    cluster = Cluster()
    cluster.add("a", slots=1, streams=(10,))
    assert "limit of requests" in decide(cluster).reason
    busy = Cluster()
    busy.add("a", prompts=(3000, 3000))
    assert "prompts to compute" in decide(busy, tokens=4000).reason
    nobody = Cluster()
    nobody.add("a", placeable=False)
    assert "no worker" in decide(nobody).reason


def test_a_placement_that_came_from_elsewhere_is_priced_as_its_own_would_be() -> None:
    cluster = split(4)
    for candidate in decide(cluster, tokens=800, slo=STANDARD).candidates:
        other = priced(cluster.snapshot(), cluster.query(800, slo=STANDARD), candidate.placement)
        assert replace(other, cost_s=0.0) == replace(candidate, cost_s=0.0)
        assert other.cost_s == pytest.approx(candidate.cost_s, rel=1e-12)


def test_the_reason_names_the_place_its_terms_and_what_came_next() -> None:
    reason = decide(split(12), tokens=2000).reason
    assert "prefill on p, decode on d" in reason
    assert "TTFT" in reason
    assert "next d" in reason


def test_reports_of_a_worker_change_what_is_predicted_for_it() -> None:
    cluster = Cluster()
    row = cluster.add("a", prompts=(2000,))
    waiting = decide(cluster, tokens=3000).placement
    cluster.columns.report(row, StepLoad(1, 1, 100, 0, 0))
    assert waiting is None
    assert chosen(cluster, tokens=3000) == "a>a"
