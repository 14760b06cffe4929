"""Stored KV is loaded where that is quicker than computing it, and nowhere else."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from routing_rig import COST, Cluster

from bascule.policies.load import blocks_to_load, load_seconds, patience_seconds, prompt_seconds, worth_loading_beside
from bascule.policies.route import adaptive
from bascule.types import CostModel, LinkCost, Tier

SIZE, TOKEN_BYTES = 16, 23_040
QUICK, SLOW = LinkCost(0.001, 1e9), LinkCost(0.003, 1e6)


def chosen(run: list[Tier], costs: dict[Tier, LinkCost], model: CostModel = COST, cached: int = 0) -> int:
    return blocks_to_load(
        run,
        costs,
        model,
        prompt_tokens=1000,
        cached_tokens=cached,
        block_tokens=SIZE,
        token_bytes=TOKEN_BYTES,
    )


def test_a_quick_tier_is_loaded_wholly_and_a_slow_one_not_at_all() -> None:
    run = [Tier.HOST] * 60
    assert chosen(run, {Tier.HOST: QUICK}) == 60
    assert chosen(run, {Tier.HOST: SLOW}) == 0
    assert chosen([], {Tier.HOST: QUICK}) == 0


def test_only_the_beginning_is_loaded_where_what_follows_lies_in_a_slow_tier() -> None:
    costs = {Tier.HOST: QUICK, Tier.REMOTE: SLOW}
    assert chosen([Tier.HOST] * 20 + [Tier.REMOTE] * 40, costs) == 20
    assert chosen([Tier.REMOTE] * 20 + [Tier.HOST] * 40, costs) == 0
    # A little of the slow one is worth a lot of the quick one behind it.
    assert chosen([Tier.REMOTE] + [Tier.HOST] * 59, costs) == 60


def test_while_no_cost_is_known_all_is_loaded() -> None:
    assert chosen([Tier.REMOTE] * 3, {Tier.REMOTE: SLOW}, CostModel()) == 3


def test_the_choice_is_the_best_of_all_beginnings() -> None:
    random = np.random.default_rng(1)
    tiers = [Tier.HOST, Tier.DISK, Tier.REMOTE]
    for _ in range(200):
        costs = {tier: LinkCost(random.uniform(0, 0.05), 10 ** random.uniform(6, 10)) for tier in tiers}
        run = [tiers[at] for at in np.repeat(random.integers(0, 3, 6), random.integers(1, 9, 6))]

        every = []
        for blocks in range(len(run) + 1):
            tokens = {tier: SIZE * run[:blocks].count(tier) for tier in tiers}
            loading = load_seconds(costs, tokens, TOKEN_BYTES)
            every.append(loading + prompt_seconds(COST, 1000, SIZE * blocks))
        # Steps end at whole chunks, so a beginning within a tier may save one; it is worth no more than that.
        assert every[chosen(run, costs)] <= min(every) + COST.step_s + 1e-9


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_a_load_is_waited_for_where_that_is_quicker_than_computing_beside_it(
    load_s: float, compute_s: float, step_s: float
) -> None:
    patience = patience_seconds(load_s, compute_s, step_s)
    assert patience == 0 or load_s <= patience <= max(2 * load_s, 0.1 * compute_s)
    if load_s < min(step_s, compute_s) / 2:
        assert patience > 0, "it is there before a step would be done"
    if load_s > compute_s + min(step_s, compute_s):
        assert patience == 0
    assert patience_seconds(load_s, compute_s, step_s / 2) <= patience, "shorter steps find sooner what has come"
    assert patience_seconds(load_s, compute_s / 2, step_s) <= patience, "and less is to be spared"


def test_a_prompt_of_one_step_waits_for_all_that_is_quicker_than_computing_it() -> None:
    assert patience_seconds(0.4, 0.5, 1.0) > 0.4
    assert patience_seconds(0.4, 0.5, 0.01) == 0.0
    assert patience_seconds(0.0, 0.0, 1.0) == 0.0


@given(st.floats(1e-6, 1e3), st.floats(0, 1e3))
def test_what_is_loaded_beside_computing_spares_a_third_of_it_at_the_least(load_s: float, compute_s: float) -> None:
    if worth_loading_beside(load_s, compute_s):
        assert load_s * compute_s / (load_s + compute_s) <= 2 / 3 * compute_s + 1e-9
        assert worth_loading_beside(load_s / 2, compute_s)
    else:
        assert load_s >= compute_s


def stored(cluster: Cluster, tokens: dict[int, int], seconds: float) -> dict[str, object]:
    have = cluster.query(1000).cached.copy()
    for row, count in tokens.items():
        have[row] = count
    return {"stored": have, "load_s": np.where(have > cluster.query(1000).cached, seconds, 0.0)}


def test_a_worker_that_can_load_the_prompt_is_the_quicker_one() -> None:
    cluster = Cluster()
    a, b = cluster.add("a"), cluster.add("b")
    winner = adaptive(cluster.snapshot(), cluster.query(1000, **stored(cluster, {b: 960}, 0.02))).candidates[0]
    assert winner.placement.decode == "b"
    assert (winner.cached_tokens, winner.loaded_tokens) == (960, 960)
    assert winner.predicted.load_s == pytest.approx(0.02)
    assert (
        "960 of them in the store"
        in adaptive(cluster.snapshot(), cluster.query(1000, **stored(cluster, {a: 960}, 0.02))).reason
    )


def test_what_is_slower_to_load_than_to_compute_does_not_count() -> None:
    cluster = Cluster()
    cluster.add("a")
    b = cluster.add("b")
    plain = adaptive(cluster.snapshot(), cluster.query(1000))
    slow = adaptive(cluster.snapshot(), cluster.query(1000, **stored(cluster, {b: 960}, 10.0)))
    assert [each.predicted for each in slow.candidates] == [each.predicted for each in plain.candidates]
    assert all(each.loaded_tokens == 0 for each in slow.candidates)


def test_loading_hides_behind_the_queue() -> None:
    cluster = Cluster()
    row = cluster.add("a", prompts=(400,))
    with_store = stored(cluster, {row: 960}, 0.05)
    found = adaptive(cluster.snapshot(), cluster.query(1000, **with_store)).candidates[0].predicted
    assert found.queue_s > 0.05
    assert found.load_s == 0.0


def test_a_slower_store_never_makes_a_worker_more_attractive() -> None:
    cluster = Cluster()
    row = cluster.add("a", streams=(500,))
    costs = []
    for seconds in (0.0, 0.01, 0.1, 0.5, 1.0, 5.0):
        query = cluster.query(1000, **stored(cluster, {row: 960}, seconds))
        costs.append(adaptive(cluster.snapshot(), query).candidates[0].cost_s)
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
