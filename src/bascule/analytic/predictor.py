"""The face of the analytic predictor: what a deployment would do that nobody has, and how sure that is.

Physics with fitted efficiencies, corrected by a few trees; both come from `calibration.json`, which `calibrate` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from bascule.analytic.correction import Correction, corrected, never_falling
from bascule.analytic.deployment import Deployment, Load
from bascule.analytic.efficiencies import Deviations, efficiency_columns
from bascule.analytic.physics import step_seconds
from bascule.analytic.questions import Questions
from bascule.errors import ConfigError
from bascule.types import CostModel


class Basis(StrEnum):
    """What of a deployment was measured; the first that holds."""

    NEITHER = "neither GPU nor model measured"
    NEW_GPU = "GPU not measured"
    NEW_MODEL = "model not measured"
    NEW_FRAMEWORK = "framework not measured"
    SEEN = "model, GPU and framework measured"


class Expected(Struct, frozen=True):
    """Mean relative errors on what was held out."""

    ttft: float
    tpot: float


class Calibration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is fitted."""

    rows: int
    models: list[str]
    systems: list[str]
    frameworks: list[str]
    deviations: Deviations
    correction: Correction
    expected: dict[Basis, Expected]


class Prediction(Struct, frozen=True, kw_only=True):
    """Means over a closed loop's requests."""

    ttft_s: float
    tpot_s: float
    basis: Basis
    expected: Expected
    """How far off such predictions were on rows that had been held out."""


def load_calibration(path: Path | None = None) -> Calibration:
    """The shipped calibration, or the one at `path`. Raises ConfigError where it cannot be read."""
    if path is None:
        shipped = resources.files("bascule.analytic").joinpath("calibration.json").read_bytes()
        return msgspec.json.decode(shipped, type=Calibration)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise ConfigError(f"cannot read the calibration {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not what `bascule plan calibrate` writes: {error}") from error


class Predictor:
    """Answers for deployments under load, from one calibration."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration or load_calibration()

    def predict(self, deployments: Sequence[Deployment], loads: Sequence[Load]) -> list[Prediction]:
        """TTFT and TPOT of each deployment under its load; more clients never make either shorter."""
        if not deployments:
            return []
        questions = Questions.of(deployments, loads)
        efficiency = efficiency_columns(deployments, self.calibration.deviations)
        times = np.exp(never_falling(questions, efficiency, partial(corrected, self.calibration.correction)))
        answers = []
        for deployment, (ttft, tpot) in zip(deployments, times, strict=True):
            basis = self.basis(deployment)
            expected = self.calibration.expected[basis]
            answers.append(Prediction(ttft_s=float(ttft), tpot_s=float(tpot), basis=basis, expected=expected))
        return answers

    def step_seconds(self, deployment: Deployment, *, tokens: int, streams: int, context: float, pairs: float) -> float:
        """One step of a worker, by physics alone: `tokens` new tokens of `streams` sequences with KV of `context` each.

        `pairs` are the pairs of (new token, token it attends to): `tokens * context` for a step of decoding streams,
        `tokens * (cached + tokens / 2)` for a prompt's part behind `cached` tokens. The deployment's prefill workers
        are asked by a deployment whose `decode` is their spread.
        """
        question = Questions.of([deployment], [Load(prompt=1, output=1, concurrency=1)])
        efficiency = efficiency_columns([deployment], self.calibration.deviations)
        numbers = (np.array([float(value)]) for value in (tokens, streams, context, pairs))
        return float(step_seconds(question.worker, efficiency, *numbers)[0])

    def cost_model(self, deployment: Deployment) -> CostModel:
        """The policies' cost model of one worker, drawn through steps that `step_seconds` predicts: for a simulator."""

        def step(tokens: int, streams: int, context: float, pairs: float) -> float:
            return self.step_seconds(deployment, tokens=tokens, streams=streams, context=context, pairs=pairs)

        near, far = step(_CHUNK, 1, 0, 0), step(2 * _CHUNK, 1, 0, 0)
        token = (far - near) / _CHUNK
        alone = tuple(step(count, count, 0, 0) for count in (1 << knot for knot in range(_KNOTS)))
        seen = step(_CHUNK, 1, _CHUNK, 0) - near
        return CostModel(
            step_s=max(0.0, near - token * _CHUNK),
            token_s=token,
            pair_s=(step(_CHUNK, 1, _CHUNK, float(_CHUNK * _CHUNK)) - near - seen) / _CHUNK**2,
            context_s=(step(64, 64, _CHUNK, 0) - step(64, 64, 0, 0)) / (64 * _CHUNK),
            draw_s=0.0,
            stream_s=alone,
        )

    def basis(self, deployment: Deployment) -> Basis:
        """What of this deployment the calibration has measurements of."""
        new_gpu = deployment.system not in self.calibration.systems
        new_model = deployment.model not in self.calibration.models
        if new_gpu or new_model:
            return Basis.NEITHER if new_gpu and new_model else Basis.NEW_GPU if new_gpu else Basis.NEW_MODEL
        return Basis.SEEN if deployment.framework in self.calibration.frameworks else Basis.NEW_FRAMEWORK


_CHUNK = 2048
_KNOTS = 11
