"""Efficiencies of a row: the defaults, moved by what was fitted for its GPU, framework, weights and kind of model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bascule.analytic.deployment import Deployment
from bascule.analytic.physics import DEFAULTS, Array, Efficiency

Deviations = dict[str, dict[str, float]]
"""For each group, such as `gpu=h100_sxm`, logarithms by which it differs from the defaults."""


def groups_of(deployment: Deployment) -> tuple[str, ...]:
    """The groups whose deviations add up for this deployment."""
    mode = "disaggregated" if deployment.prefill else "aggregated"
    return (
        "all",
        f"gpu={deployment.system}",
        f"framework={deployment.framework}",
        f"weights={deployment.experts_in if deployment.shape.experts else deployment.weights}",
        f"model={'experts' if deployment.shape.experts else 'dense'}",
        f"mode={mode}",
    )


def efficiency_columns(deployments: Sequence[Deployment], deviations: Deviations) -> Efficiency:
    """One row for each deployment."""
    columns: dict[str, Array] = {}
    rows = [[deviations.get(group, {}) for group in groups_of(each)] for each in deployments]
    for name, default in DEFAULTS.items():
        moved = [sum(group.get(name, 0.0) for group in row) for row in rows]
        columns[name] = default * np.exp(np.array(moved, dtype=np.float64))
    return Efficiency(**columns)
