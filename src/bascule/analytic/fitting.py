"""Fitting the physics: by how much each group's efficiencies differ from the defaults, drawn towards not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bascule.analytic.correction import physical
from bascule.analytic.deployment import Deployment
from bascule.analytic.efficiencies import Deviations, efficiency_columns, groups_of
from bascule.analytic.physics import DEFAULTS, Array, Efficiency
from bascule.analytic.questions import Questions

_WEIGHTS = np.array([0.5, 1.0])
"""Of TTFT and TPOT."""
_NEAR = 0.1
"""Errors (logarithms) above this count by their size, no longer by their square."""
_FREE = {"all": 0.25, "gpu": 0.12, "framework": 0.12, "model": 0.4, "weights": 0.08, "mode": 0.08}
"""How far (standard deviation of a logarithm) the groups of each kind may be expected to lie off. Models of experts
compute smaller products than dense ones, so these differ most; the rest is tight, for the sake of models not seen."""
_ROUNDS = 8
_NUDGE = 1e-3


def fit(deployments: Sequence[Deployment], questions: Questions, measured: Array) -> Deviations:
    """Deviations under which physics comes near `measured`: logarithms of TTFT and TPOT in seconds, [rows, 2]."""
    names, groups = list(DEFAULTS), sorted({group for each in deployments for group in groups_of(each)})
    member = np.array([[group in groups_of(each) for group in groups] for each in deployments], dtype=np.float64)
    free = np.array([_FREE[group.split("=")[0]] for group in groups])
    holds = np.repeat(1 / free**2, len(names)).reshape(len(groups), len(names))
    found = np.zeros_like(holds)
    start = efficiency_columns(deployments, {})

    def said(deviations: Array) -> Array:
        return physical(questions, _moved(start, names, member @ deviations))

    answers, damping = said(found), 1.0
    cost = _cost(answers - measured, found, holds)
    for _ in range(_ROUNDS):
        slopes = _slopes(questions, _moved(start, names, member @ found), names, answers)
        matrix, pull = _normal(member, slopes, answers - measured)
        pull += (holds * found).ravel()
        for _ in range(6):
            damped = matrix + np.diag(holds.ravel() + damping * np.diag(matrix))
            tried = found - np.clip(np.linalg.solve(damped, pull).reshape(found.shape), -0.7, 0.7)
            tried_answers = said(tried)
            tried_cost = _cost(tried_answers - measured, tried, holds)
            if tried_cost < cost:
                found, answers, cost, damping = tried, tried_answers, tried_cost, max(damping / 4, 1e-4)
                break
            damping *= 4
    return {
        group: {name: round(float(value), 3) for name, value in zip(names, row, strict=True) if abs(value) >= 0.0005}
        for group, row in zip(groups, found, strict=True)
    }


def _moved(start: Efficiency, names: list[str], logarithms: Array) -> Efficiency:
    columns = {name: getattr(start, name) * np.exp(logarithms[:, at]) for at, name in enumerate(names)}
    return replace(start, **columns)


def _cost(errors: Array, found: Array, holds: Array) -> float:
    size = np.abs(errors)
    rows = np.where(size < _NEAR, size**2 / 2, _NEAR * (size - _NEAR / 2)) / _NEAR**2
    return float((rows * _WEIGHTS).sum() + (holds * found**2).sum() / 2)


def _slopes(questions: Questions, efficiency: Efficiency, names: list[str], answers: Array) -> Array:
    """How the answers move with the logarithm of each efficiency, [rows, 2, names]."""
    slopes = np.empty((*answers.shape, len(names)))
    for at, name in enumerate(names):
        nudged = replace(efficiency, **{name: getattr(efficiency, name) * np.exp(_NUDGE)})
        slopes[..., at] = (physical(questions, nudged) - answers) / _NUDGE
    return slopes


def _normal(member: Array, slopes: Array, errors: Array) -> tuple[Array, Array]:
    """The normal equations of weighted least squares over all groups and efficiencies."""
    size = member.shape[1] * slopes.shape[2]
    matrix, pull = np.zeros((size, size)), np.zeros(size)
    weights = _WEIGHTS / np.maximum(np.abs(errors), _NEAR) / _NEAR
    for side in range(slopes.shape[1]):
        jacobian = (member[:, :, None] * slopes[:, side, None, :]).reshape(len(member), size)
        matrix += jacobian.T @ (jacobian * weights[:, side, None])
        pull += jacobian.T @ (weights[:, side] * errors[:, side])
    return matrix, pull
