"""What a table of simulations says of where splitting pays."""

from __future__ import annotations

import pytest

from bascule.sim.cluster import Cluster, Pool
from bascule.sim.figures import over_seeds
from bascule.sim.sweep import Task, Traffic
from bascule.sim.verdict import cells_of, crossover, verdict
from bascule.sim.worker import Kind
from bascule.types import CostModel, Role

KIND = Kind(name="core", cost=CostModel(step_s=0.01, token_s=0.001), kv_tokens=1000)
Goodputs = dict[str, list[list[float]]]
"""By architecture: for each seed, one a level."""


def found(levels: list[str], goodputs: Goodputs) -> tuple[list[Task], list[dict[str, float]]]:
    cluster = Cluster(policy="replicated", pools=(Pool(Role.MIXED, KIND, 2),))
    tasks, figures = [], []
    for name, seeds in goodputs.items():
        for seed, row in enumerate(seeds, 1):
            for level, goodput in zip(levels, row, strict=True):
                task = Task(architecture=name, cluster=cluster, traffic=Traffic(), level=level, seed=seed)
                tasks.append(task)
                figures.append({"goodput_per_s": goodput})
    return tasks, figures


def test_the_crossover_is_where_splitting_begins_to_stay_ahead() -> None:
    levels = ["1", "8", "16", "32"]
    replicated = [[1.0, 2.0, 2.0, 1.0]] * 3
    split = [[1.1, 1.0, 2.1, 1.5], [0.9, 1.0, 1.0, 1.5], [0.9, 1.0, 2.1, 1.5]]
    assert crossover(*found(levels, {"replicated": replicated, "disaggregated": split})) == {
        "metric": "goodput_per_s",
        "value": 16.0,
        "lo": 16.0,
        "hi": 32.0,
    }


def test_the_order_in_which_levels_are_given_is_no_matter() -> None:
    goodputs = {"replicated": [[1.0, 1.0, 1.0]], "disaggregated": [[2.0, 0.5, 0.5]]}
    told = crossover(*found(["32", "8", "1"], goodputs))
    assert told is not None and told["value"] == 32.0


def test_a_class_without_a_price_leaves_the_cost_open() -> None:
    other = Kind(name="other", cost=KIND.cost, kv_tokens=1000)
    pools = (Pool(Role.PREFILL, KIND, 1), Pool(Role.DECODE, other, 1))
    task = Task(
        architecture="disaggregated",
        cluster=Cluster(policy="disaggregated", pools=pools),
        traffic=Traffic(),
        level="1",
        seed=1,
    )
    figures = {"output_tokens_per_s": 10.0, "rate_offered": None}
    key = "cost_per_million_output_tokens"
    assert key not in cells_of([task], [figures], {"core": 1.0})[0]
    assert cells_of([task], [figures], {"core": 1.0, "other": 2.6})[0][key]["median"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    "split", [[[0.9, 0.9]] * 3, [[2.0, 2.0], [0.0, 0.0], [0.5, 0.5]]], ids=["never", "in one seed of three"]
)
def test_there_is_no_crossover_where_most_seeds_have_none(split: list[list[float]]) -> None:
    assert crossover(*found(["1", "8"], {"replicated": [[1.0, 1.0]] * 3, "disaggregated": split})) is None


def test_there_is_no_crossover_between_clients_and_rates_nor_without_both() -> None:
    assert crossover(*found(["1", "r2"], {"replicated": [[1.0, 1.0]], "disaggregated": [[2.0, 2.0]]})) is None
    assert crossover(*found(["1", "2"], {"adaptive": [[1.0, 1.0]], "disaggregated": [[2.0, 2.0]]})) is None


def test_the_verdict_names_the_best_and_what_is_as_good() -> None:
    def cell(name: str, goodput: float) -> dict[str, object]:
        return {"architecture": name, **over_seeds([{"goodput_per_s": goodput}])}

    cells = [cell("replicated", 1.0), cell("adaptive", 2.0), cell("replicated", 1.5)]
    assert verdict(cells) == "adaptive has the most goodput, 2 requests/s; next is replicated with 1.5"
    assert verdict([*cells, cell("thresholds", 1.99)]).endswith("thresholds within 3% of it")
    assert verdict([cell("adaptive", 0.0)]) == "no request met the SLO"
