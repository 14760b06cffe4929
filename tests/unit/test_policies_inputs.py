"""Predictions of one worker are those of all, however few are computed at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from tests.unit.routing_rig import Cluster, Wish, built, clusters, queries

from bascule.policies.inputs import of_all, of_one
from bascule.policies.predict import both_sides
from bascule.policies.route import priced
from bascule.types import CostModel, Placement, Slo, WorkerId


def brought(rows: int, tokens: int, data: st.DataObject) -> dict[str, Any]:
    """What a store and a peer have of the prompt, or nothing."""
    fetched = {"peer": data.draw(st.integers(-1, rows - 1)), "peer_tokens": data.draw(st.integers(0, tokens - 1))}
    if data.draw(st.booleans()):
        return fetched
    stored = data.draw(st.lists(st.integers(0, tokens - 1), min_size=rows, max_size=rows))
    seconds = data.draw(st.lists(st.sampled_from([0.0, 0.01, 0.5]), min_size=rows, max_size=rows))
    return fetched | {"stored": np.array(stored, np.int64), "load_s": np.array(seconds)}


@settings(max_examples=200, deadline=None)
@given(clusters, queries, st.sampled_from([0.0, 0.8]), st.data())
def test_one_worker_is_predicted_as_it_is_among_all(
    wishes: list[Wish], query: Wish, line_s: float, data: st.DataObject
) -> None:
    cluster = built(wishes)
    cluster.now = 0.05
    snapshot = cluster.snapshot()
    session = data.draw(st.integers(-1, len(wishes) - 1))
    asked = cluster.query(**query, line_s=line_s, session=session, **brought(len(snapshot.ids), query["tokens"], data))
    all_of_them = of_all(snapshot, asked)
    together = both_sides(all_of_them, asked)
    for row in range(len(wishes)):
        one = of_one(snapshot, asked, row)
        assert one.brought.have == all_of_them.brought.have[row]
        assert one.brought.fetches == all_of_them.brought.fetches.take(row, mode="clip")
        assert one.order_s == pytest.approx(all_of_them.order_s[row], abs=1e-20)
        for alone, side in zip(both_sides(one, asked), together, strict=True):
            for name, value in structs.asdict(alone).items():
                assert isinstance(value, float), name
                assert value == pytest.approx(float(getattr(side, name)[row]), rel=1e-12), name


@pytest.mark.parametrize("bound", [0.05, math.inf])
@pytest.mark.parametrize("seconds", [0.0, 5e-324, 1e9])
def test_whatever_steps_may_cost_predictions_are_numbers(seconds: float, bound: float) -> None:
    cost = CostModel(step_s=seconds, token_s=seconds, pair_s=seconds, context_s=seconds, stream_s=(seconds, seconds))
    cluster = Cluster()
    cluster.add("a", streams=(100,), prompts=(3000,), cost=cost)
    query = cluster.query(100_000, gap_planned_s=bound, tpot_planned_s=bound, slo=Slo(bound, bound, bound))
    candidate = priced(cluster.snapshot(), query, Placement(WorkerId("a"), WorkerId("a")))
    assert all(math.isfinite(term) for term in [*structs.astuple(candidate.predicted), candidate.cost_s])


@pytest.mark.parametrize("seconds", [-1e-9, 1e10, math.inf, math.nan])
def test_a_cost_that_cannot_be_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="at most 1e9 s"):
        CostModel(context_s=seconds)
