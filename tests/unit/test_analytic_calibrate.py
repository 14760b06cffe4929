"""Fitting: what is put in comes out, rows that are held out stay out, and the same rows give the same calibration."""

from __future__ import annotations

import numpy as np
import pytest
from analytic_rig import CALIBRATION_TABLE, CATALOGUE, deployment, load

from bascule.analytic.boosting import Growth, find_edges, grow
from bascule.analytic.calibrate import Table
from bascule.analytic.correction import corrected, learn, physical
from bascule.analytic.deployment import Spread
from bascule.analytic.efficiencies import efficiency_columns
from bascule.analytic.fitting import fit
from bascule.analytic.questions import Questions
from bascule.analytic.table import configuration, read_rows
from bascule.analytic.trees import bins_of, tree_sum


def test_trees_learn_a_step_and_what_a_missing_value_means() -> None:
    random = np.random.default_rng(3)
    values = random.uniform(0, 1, (600, 4))
    values[::5, 2] = np.nan
    truth = np.where(np.isnan(values[:, 2]), 0.3, np.where(values[:, 0] > 0.5, 0.2, -0.2))
    edges = find_edges(values)
    trees = grow(bins_of(values, edges), truth, np.ones(600), Growth(trees=80, depth=3, share=1.0))
    fresh = np.array([[0.9, 0, 0.5, 0], [0.1, 0, 0.5, 0], [0.1, 0, np.nan, 0]])
    assert tree_sum(trees, bins_of(fresh, edges)) == pytest.approx([0.2, -0.2, 0.3], abs=0.05)


def test_the_same_rows_grow_the_same_trees() -> None:
    values = np.random.default_rng(5).uniform(0, 1, (100, 6))
    bins, errors = bins_of(values, find_edges(values)), values[:, 1] - values[:, 3]
    one, other = (grow(bins, errors, np.ones(100), Growth(trees=5)) for _ in range(2))
    assert one == other


def test_a_fit_finds_by_how_much_a_gpu_is_slower() -> None:
    spreads = [Spread(tp=tp) for tp in (1, 2, 4, 8)]
    each = [deployment(system=system, decode=spread) for system in ("h100_sxm", "h200_sxm") for spread in spreads]
    deployments = [one for one in each for _ in range(12)]
    loads = [load(prompt, 512, count) for _ in each for prompt in (512, 2048, 8192) for count in (1, 8, 32, 64)]
    questions = Questions.of(deployments, loads)
    truth = {"gpu=h100_sxm": {"compute": -0.4, "memory": -0.3}, "all": {"queue": 0.5, "layer": 0.4}}
    measured = physical(questions, efficiency_columns(deployments, truth))
    found = fit(deployments, questions, measured)
    said = physical(questions, efficiency_columns(deployments, found))
    assert np.abs(said - measured).mean() < 0.02
    assert found["gpu=h100_sxm"]["memory"] < found["gpu=h200_sxm"]["memory"] - 0.1


@pytest.mark.skipif(not CALIBRATION_TABLE.exists(), reason="the calibration table is not beside this checkout")
def test_rows_that_were_held_out_are_predicted_nearly_as_well_as_the_docs_say() -> None:
    """One fold, and fewer trees than are shipped, to be quick."""
    rows, _ = read_rows(CALIBRATION_TABLE, CATALOGUE)
    table = Table.of(rows)
    held = np.array([hash_of(configuration(row)) % 5 == 0 for row in table.rows])
    known, asked = table.part(~held), table.part(held)
    deviations = fit(known.deployments, known.questions, known.measured)
    correction = learn(
        known.questions, efficiency_columns(known.deployments, deviations), known.measured, Growth(trees=40, rate=0.2)
    )
    said = corrected(correction, asked.questions, efficiency_columns(asked.deployments, deviations))
    off = np.abs(np.exp(said - asked.measured) - 1)
    dense = np.array([not each.shape.experts and each.prefill is None for each in asked.deployments])
    assert off[dense].mean(axis=0) == pytest.approx([0, 0], abs=0.30)
    assert off[dense, 1].mean() < 0.12
    assert off[:, 1].mean() < 0.19 and off[:, 0].mean() < 0.42


def hash_of(configured: tuple[str, ...]) -> int:
    return sum(map(ord, "".join(configured)))
