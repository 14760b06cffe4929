"""Paired statistics: what is decided, what is not, and how often that is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bascule.bench.compare.paired import (
    Outcome,
    Ratio,
    Share,
    crossover,
    first_ahead,
    interval,
    mean_draws,
    mean_ratio,
    over_seeds,
    share_ratio,
    standing,
    strata_ratio,
    unbeaten,
)

TRIES = 400
SURE = {Outcome.MORE, Outcome.LESS}


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_an_equal_pair_is_called_unequal_about_one_time_in_twenty(seeds: int) -> None:
    rng = np.random.default_rng(seeds)

    def wrong(spread: float) -> bool:
        ours, theirs = np.exp(rng.normal(0, spread, (2, seeds)))
        return mean_ratio(ours.tolist(), theirs.tolist()).outcome in SURE

    assert 0.02 < sum(wrong(0.2) for _ in range(TRIES)) / TRIES < 0.09


def test_equal_shares_are_called_unequal_about_one_time_in_twenty() -> None:
    seeds = 5
    rng = np.random.default_rng(seeds)

    def shares() -> list[Share]:
        """Of twenty requests, some more and some less in a run as a whole."""
        chances = np.clip(rng.normal(0.5, 0.15, seeds), 0, 1)
        return [Share(float(rng.binomial(20, chance)), 10.0) for chance in chances]

    assert 0.02 < sum(share_ratio(shares(), shares()).outcome in SURE for _ in range(TRIES)) / TRIES < 0.09


def test_equal_sums_over_levels_are_hardly_ever_called_unequal_and_unequal_ones_are_seen() -> None:
    rng = np.random.default_rng(4)

    def levels(factor: float) -> list[list[Share]]:
        """Five levels of three seeds; what a level can do differs, and so does how much it varies."""
        return [
            [Share(float(rng.poisson(20 * factor * rate * rng.lognormal(0, 0.2))), 20.0) for _ in range(3)]
            for rate in (0.5, 1.0, 1.5, 2.0, 0.3)
        ]

    def outcome(factor: float) -> Outcome:
        return strata_ratio(list(zip(levels(factor), levels(1.0), strict=True))).outcome

    assert 0 < sum(outcome(1.0) in SURE for _ in range(200)) / 200 < 0.07
    assert sum(outcome(2.0) is Outcome.MORE for _ in range(100)) > 80


def test_levels_of_one_seed_say_nothing_of_the_sum() -> None:
    some, none = [Share(20.0, 10.0)] * 3, [Share(0.0, 10.0)] * 3
    assert strata_ratio([(some[:1], none[:1])]).outcome is Outcome.UNDECIDED
    assert strata_ratio([(some, none), (some[:1], none[:1])]).outcome is Outcome.MORE
    assert strata_ratio([(none, none), (some, some)]).outcome is Outcome.EQUAL


def test_twice_as_much_is_seen_with_five_seeds() -> None:
    rng = np.random.default_rng(3)
    pairs = [np.exp(rng.normal(0, 0.15, (2, 5))) for _ in range(200)]
    found = [mean_ratio((2 * ours).tolist(), theirs.tolist()) for ours, theirs in pairs]
    assert sum(one.outcome is Outcome.MORE for one in found) > 195
    assert all(one.lo < one.value < one.hi for one in found)
    assert all(one.inverse.outcome is Outcome.LESS for one in found if one.outcome is Outcome.MORE)


def test_what_all_seeds_share_does_not_blur_the_difference() -> None:
    hard_and_easy = [1.0, 10.0, 0.1, 3.0]
    found = mean_ratio([1.2 * each for each in hard_and_easy], hard_and_easy)
    assert found.outcome is Outcome.MORE
    assert found.lo == pytest.approx(found.hi) == pytest.approx(1.2)


def test_a_small_sure_difference_is_equal_and_one_seed_decides_nothing() -> None:
    assert mean_ratio([1.01, 1.01, 1.015], [1.0, 1.0, 1.0]).outcome is Outcome.EQUAL
    alone = mean_ratio([5.0], [1.0])
    assert (alone.value, alone.lo, alone.hi, alone.outcome) == (pytest.approx(5.0), 0.0, math.inf, Outcome.UNDECIDED)
    assert (alone.inverse.lo, alone.inverse.hi) == (0.0, math.inf)
    assert mean_ratio([None, 1.0], [1.0, None]).outcome is Outcome.UNDECIDED
    assert share_ratio([], []).outcome is Outcome.UNDECIDED


def test_nothing_against_something_has_a_ratio() -> None:
    none, some = [Share(0.0, 10.0)] * 4, [Share(20.0, 10.0)] * 4
    assert share_ratio(none, [Share(0.0, 50.0)] * 4).outcome is Outcome.EQUAL
    found = share_ratio(some, none)
    assert found.outcome is Outcome.MORE
    assert math.isfinite(found.value)


def test_intervals_hold_the_median_and_do_not_leave_what_can_be() -> None:
    assert interval([3.0]) == {"median": 3.0, "lo": 3.0, "hi": 3.0}
    assert interval([0.0, 0.0, 0.0])["hi"] == 0.0
    wide = interval([1.0, 2.0, 8.0])
    assert 0 < wide["lo"] < 1.0
    assert wide["median"] == 2.0
    assert wide["hi"] > 8.0
    assert interval([0.0, 1.0, 2.0])["lo"] == 0.0


def test_nested_figures_are_merged_and_unknown_ones_stay_unknown() -> None:
    seeds = [{"a": 1, "b": {"c": None}, "d": [1]}, {"a": 3, "b": {"c": None}, "d": []}]
    assert over_seeds(seeds, max) == {"a": 3, "b": {"c": None}}


def test_the_best_names_those_it_is_not_surely_ahead_of() -> None:
    sure, unsure = Ratio(2.0, 1.5, 2.5, 3), Ratio(1.1, 0.9, 1.3, 3)
    ratios = {
        "a": {"b": sure, "c": unsure},
        "b": {"a": sure.inverse, "c": unsure},
        "c": {"a": unsure.inverse, "b": unsure.inverse},
    }
    assert standing(ratios, {"a": 3.0, "b": 1.0, "c": 2.0}) == ("a", ["c"])


def test_ahead_means_ahead_until_the_end() -> None:
    assert first_ahead([1, 2, 4], [True, False, True]) == 4
    assert first_ahead([1, 2, 4], [True, True, True]) == 1
    assert first_ahead([1, 2, 4], [True, True, False]) == math.inf


def test_a_clear_crossover_is_found_where_it_is_and_an_unclear_one_has_a_wide_interval() -> None:
    def draws(factor: float, spread: float) -> tuple[float, np.ndarray]:
        drawn = np.random.default_rng(int(100 * factor)).normal(0, spread, 6)
        return mean_draws((factor * np.exp(drawn)).tolist(), [1.0] * 6)

    levels = [1.0, 2.0, 4.0, 8.0]
    clear = crossover(levels, [draws(factor, 0.02) for factor in (0.5, 0.7, 1.5, 2.0)], 8)
    assert clear == {"value": 4.0, "lo": 4.0, "hi": 4.0, "share": 1.0}
    never = crossover(levels, [draws(factor, 0.02) for factor in (0.5, 0.7, 1.5, 0.6)], 8)
    assert never == {"value": None, "lo": None, "hi": None, "share": 0.0}
    vague = crossover(levels, [draws(factor, 0.5) for factor in (0.5, 0.9, 1.1, 2.0)], 8)
    assert vague["lo"] is not None
    assert vague["hi"] is None or vague["hi"] > vague["lo"]


def test_points_that_none_beats_in_both_stay() -> None:
    assert unbeaten([(1, 5), (2, 4), (1, 4), (3, 1), (3, 1)]) == [True, True, False, True, True]
