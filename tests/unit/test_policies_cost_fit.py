"""Fitting a cost model: what it recovers, what it leaves alone, and what must not move it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from bascule.policies.cost import PrefillPart, decode_seconds, step_seconds
from bascule.policies.cost_fit import StepSample, fit, median_error, predicted, step_sample
from bascule.types import CostModel

TRUE = CostModel(
    step_s=0.004,
    token_s=0.001,
    pair_s=5e-7,
    context_s=1.3e-6,
    draw_s=0.0005,
    stream_s=(0.005, 0.006, 0.008, 0.015, 0.027, 0.05, 0.09, 0.17),
)


def steps(count: int, seed: int = 1, noise: float = 0.03, kinds: str = "decode mixed prefill") -> list[StepSample]:
    """Steps of all `kinds` as `TRUE` has them, with relative normal noise."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        kind = random.choice(kinds.split())
        streams = 0 if kind == "prefill" else int(random.integers(1, 40))
        parts = [(int(random.integers(1, 2000)), 1) for _ in range(streams)]
        if kind != "decode":
            parts += [
                (int(random.integers(0, 2000)), int(random.integers(2, 512))) for _ in range(random.integers(1, 3))
            ]
        found.append(step_sample(parts, seconds_of(parts, TRUE) * math.exp(noise * random.normal())))
    return found


def seconds_of(parts: list[tuple[int, int]], model: CostModel) -> float:
    """By the model's own formula, which shares no code with the fit."""
    streams = [start for start, tokens in parts if tokens == 1]
    prefill = [PrefillPart(tokens, start) for start, tokens in parts if tokens > 1]
    return step_seconds(model, prefill, len(streams), sum(streams))


def slower(samples: list[StepSample], factor: Callable[[int], float]) -> list[StepSample]:
    return [sample._replace(seconds=sample.seconds * factor(index)) for index, sample in enumerate(samples)]


def assert_near(found: CostModel, true: CostModel, tolerance: float) -> None:
    for name in ("token_s", "pair_s", "context_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=tolerance), name
    for streams in (1, 2, 4, 8, 16, 32):
        assert decode_seconds(found, streams, 0) == pytest.approx(decode_seconds(true, streams, 0), rel=tolerance)


def test_it_predicts_what_the_model_says() -> None:
    samples = steps(50, noise=0.0)
    assert predicted(TRUE, samples) == pytest.approx([sample.seconds for sample in samples])


def test_known_coefficients_are_found_from_nothing_under_noise() -> None:
    assert_near(fit(steps(600), CostModel()), TRUE, 0.1)
    error = median_error(fit(steps(600), CostModel()), steps(300, seed=2))
    assert error is not None and error < 0.03


@pytest.mark.parametrize("start", [CostModel(), TRUE])
def test_a_tenth_of_the_steps_far_too_slow_hardly_matters(start: CostModel) -> None:
    stopped_now_and_then = slower(steps(600), lambda index: 20.0 if index % 10 == 3 else 1.0)
    assert_near(fit(stopped_now_and_then, start), TRUE, 0.15)


def test_one_step_that_was_stopped_among_few_does_not_move_the_model() -> None:
    samples = slower(steps(8, noise=0.0), lambda index: 1000.0 if index == 5 else 1.0)
    assert_near(fit(samples, TRUE), TRUE, 0.05)


def test_what_no_step_exercises_stays_where_it_was() -> None:
    twice = fit(slower(steps(300, kinds="decode"), lambda _: 2.0), TRUE)
    assert decode_seconds(twice, 8, 0) == pytest.approx(2 * decode_seconds(TRUE, 8, 0), rel=0.1)
    for name in ("step_s", "token_s", "pair_s", "draw_s"):
        assert getattr(twice, name) == pytest.approx(getattr(TRUE, name))
    prompts = fit(slower(steps(300, kinds="prefill"), lambda _: 2.0), TRUE)
    assert prompts.stream_s == pytest.approx(TRUE.stream_s)
    assert prompts.draw_s == pytest.approx(TRUE.draw_s)


def test_from_nothing_streams_without_a_step_of_their_own_follow_the_line_through_the_others() -> None:
    line = CostModel(step_s=0.01, token_s=0.002)
    samples = [step_sample(parts, seconds_of(parts, line)) for parts in ([(9, 1)], [(9, 1)] * 2, [(0, 64)], [(0, 32)])]
    assert decode_seconds(fit(samples, CostModel()), 32, 0) == pytest.approx(0.01 + 32 * 0.002, rel=0.1)


def test_no_coefficient_is_negative_and_more_streams_never_take_less() -> None:
    random = np.random.default_rng(5)
    for seed in range(20):
        nonsense = [sample._replace(seconds=float(random.exponential(0.05))) for sample in steps(40, seed)]
        found = fit(nonsense, CostModel() if seed % 2 else TRUE)  # the constructor refuses what is negative
        assert list(found.stream_s) == sorted(found.stream_s)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_step_without_a_time_is_ignored(seconds: float) -> None:
    broken = [sample._replace(seconds=seconds) for sample in steps(50)]
    assert fit(broken, TRUE) == TRUE
    assert median_error(TRUE, broken) is None
    assert_near(fit([*steps(600), *broken], CostModel()), TRUE, 0.1)


def test_no_steps_teach_nothing() -> None:
    assert fit([], TRUE) == TRUE
    assert median_error(TRUE, []) is None


def test_a_machine_twice_as_slow_is_learnt_from_its_steps() -> None:
    model = TRUE
    for seed in range(6):
        model = fit(slower(steps(100, seed), lambda _: 2.0), model)
    error = median_error(model, slower(steps(300, seed=99), lambda _: 2.0))
    assert error is not None and error < 0.05
