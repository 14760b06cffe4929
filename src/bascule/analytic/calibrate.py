"""Making the calibration from measured rows, and saying how wrong it is on rows that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.analytic.boosting import Growth
from bascule.analytic.correction import Correction, corrected, learn, never_falling, physical
from bascule.analytic.deployment import Deployment
from bascule.analytic.efficiencies import Deviations, efficiency_columns
from bascule.analytic.fitting import fit
from bascule.analytic.physics import LIMITS, Array, Efficiency
from bascule.analytic.predictor import Basis, Calibration, Expected
from bascule.analytic.questions import Questions
from bascule.analytic.table import Row, configuration
from bascule.errors import ConfigError

FOLDS = 5
_FEWEST = 50
"""Configurations below which nothing is fitted."""
Progress = Callable[[str], None]


class Errors(Struct, frozen=True, kw_only=True):
    """Relative errors of one predictor on one kind of row that it had not seen."""

    ttft_mean: float
    tpot_mean: float
    ttft_median: float
    tpot_median: float


class Line(Struct, frozen=True, kw_only=True):
    """One line of the report: some rows, and each predictor's errors on them."""

    split: str
    """What was held out: configurations, a model, a GPU or a framework."""
    rows_of: str
    rows: int
    limits: Errors
    """The plain roofline: every limit reached, nothing on top, no queue."""
    physics: Errors
    """Fitted efficiencies."""
    corrected: Errors
    """And the trees: what `plan predict` says."""


class Table(Struct, frozen=True):
    """Rows that can be judged and were measured."""

    rows: list[Row]
    deployments: list[Deployment]
    questions: Questions
    measured: Array

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Table:
        """Raises ConfigError where too little was measured to fit anything."""
        whole = [row for row in rows if row.deployment and row.load and row.ttft_ms and row.tpot_ms]
        if len({configuration(row) for row in whole}) < _FEWEST:
            raise ConfigError(
                f"only {len(whole)} rows have known hardware and model and both silicon_ttft_ms and silicon_tpot_ms;"
                f" at least {_FEWEST} different configurations are needed"
            )
        deployments = [row.deployment for row in whole if row.deployment]
        questions = Questions.of(deployments, [row.load for row in whole if row.load])
        measured = np.log([[(row.ttft_ms or 0) / 1000, (row.tpot_ms or 0) / 1000] for row in whole])
        return cls(whole, deployments, questions, measured)

    def part(self, chosen: NDArray[np.bool_]) -> Table:
        """The rows at which `chosen` is true."""
        rows = np.flatnonzero(chosen)
        return Table(
            [self.rows[row] for row in rows],
            [self.deployments[row] for row in rows],
            self.questions.take(rows),
            self.measured[rows],
        )


def calibrate(
    rows: Sequence[Row], growth: Growth, progress: Progress
) -> tuple[Calibration, list[Line], dict[str, tuple[float, float]]]:
    """Fit everything to all rows, and report the errors on rows held out in four ways.

    The third are TTFT and TPOT, in seconds, said of each row's id when its configuration was held out.
    """
    table = Table.of(rows)
    lines = []
    unseen = {}
    expected = {}
    for basis, (split, groups) in _splits(table).items():
        answers = _held_out(table, split, groups, growth, progress)
        if basis is Basis.SEEN:
            unseen = {row.id: (float(t), float(s)) for row, (t, s) in zip(table.rows, np.exp(answers[-1]), strict=True)}
        kinds = _kinds(table) if basis is Basis.SEEN else _kinds(table)[:1] + _each(split, groups)
        lines += [_line(table, split, name, chosen, answers) for name, chosen in kinds if chosen.any()]
        overall = next(line for line in lines if line.split == split).corrected
        expected[basis] = Expected(round(overall.ttft_mean, 3), round(overall.tpot_mean, 3))
    worst = [expected[Basis.NEW_GPU], expected[Basis.NEW_MODEL]]
    expected[Basis.NEITHER] = Expected(max(each.ttft for each in worst), max(each.tpot for each in worst))
    progress("all rows")
    deviations, correction = _learn(table, growth)
    calibration = Calibration(
        rows=len(table.rows),
        models=sorted({each.model for each in table.deployments}),
        systems=sorted({each.system for each in table.deployments}),
        frameworks=sorted({each.framework for each in table.deployments}),
        deviations=deviations,
        correction=correction,
        expected=expected,
    )
    return calibration, lines, unseen


def _splits(table: Table) -> dict[Basis, tuple[str, list[str]]]:
    """For each basis, what is held out and the fold of each row, by name."""
    seen: dict[tuple[str, ...], int] = {}
    numbers = [seen.setdefault(configuration(row), len(seen)) for row in table.rows]
    folds = np.random.default_rng(0).integers(0, FOLDS, len(seen))
    return {
        Basis.SEEN: ("configurations", [f"fold {folds[number]}" for number in numbers]),
        Basis.NEW_MODEL: ("model", [each.model for each in table.deployments]),
        Basis.NEW_GPU: ("GPU", [each.system for each in table.deployments]),
        Basis.NEW_FRAMEWORK: ("framework", [each.framework for each in table.deployments]),
    }


def _learn(table: Table, growth: Growth) -> tuple[Deviations, Correction]:
    deviations = fit(table.deployments, table.questions, table.measured)
    efficiency = efficiency_columns(table.deployments, deviations)
    return deviations, learn(table.questions, efficiency, table.measured, growth)


def _held_out(table: Table, split: str, groups: list[str], growth: Growth, progress: Progress) -> list[Array]:
    """What limits, physics and corrected physics say of each row, fitted without its group."""
    ideal = np.ones(len(table.rows))
    limits = physical(table.questions, Efficiency(**{name: ideal * value for name, value in LIMITS.items()}))
    physics, whole = np.empty_like(limits), np.empty_like(limits)
    for group in sorted(set(groups)):
        progress(f"without {split if group.startswith('fold') else ''} {group}")
        held = np.array([each == group for each in groups])
        deviations, correction = _learn(table.part(~held), growth)
        asked = table.part(held)
        efficiency = efficiency_columns(asked.deployments, deviations)
        physics[held] = physical(asked.questions, efficiency)
        whole[held] = never_falling(asked.questions, efficiency, partial(corrected, correction))
    return [limits, physics, whole]


def _kinds(table: Table) -> list[tuple[str, NDArray[np.bool_]]]:
    together = np.array([each.prefill is None for each in table.deployments])
    dense = np.array([not each.shape.experts for each in table.deployments])
    counted = ~np.isnan(table.questions.workers + table.questions.prefill_workers)
    return [
        ("all", np.ones(len(together), dtype=bool)),
        ("aggregated", together),
        ("aggregated, dense", together & dense),
        ("aggregated, experts", together & ~dense),
        ("disaggregated, workers counted", ~together & counted),
        ("disaggregated, workers not counted", ~together & ~counted),
    ]


def _each(split: str, groups: list[str]) -> list[tuple[str, NDArray[np.bool_]]]:
    return [(name, np.array([each == name for each in groups])) for name in sorted(set(groups))]


def _line(table: Table, split: str, name: str, chosen: NDArray[np.bool_], answers: list[Array]) -> Line:
    limits, physics, whole = (_errors(each[chosen], table.measured[chosen]) for each in answers)
    return Line(split=split, rows_of=name, rows=int(chosen.sum()), limits=limits, physics=physics, corrected=whole)


def _errors(said: Array, measured: Array) -> Errors:
    off = np.abs(np.exp(said - measured) - 1)
    mean, median = off.mean(axis=0), np.median(off, axis=0)
    return Errors(
        ttft_mean=float(mean[0]),
        tpot_mean=float(mean[1]),
        ttft_median=float(median[0]),
        tpot_median=float(median[1]),
    )
