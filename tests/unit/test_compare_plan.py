"""How the minutes are spent, and which names and cores go together."""

from __future__ import annotations

import pytest

from bascule.bench.compare.architectures import architectures_of
from bascule.bench.compare.plan import MOST_SEEDS, SEEDS, Pace, hopeless, plan, seconds
from bascule.errors import ConfigError

LEVELS = (1, 2, 4, 8, 16, 32)
TWO_CORES = {"single": Pace(0.9, 1.8), "replicated": Pace(1.5, 2.0), "disaggregated": Pace(1.5, 1.2)}


@pytest.mark.parametrize("minutes", [5, 10, 20, 30, 60, 300])
def test_a_plan_fits_into_its_time(minutes: int) -> None:
    made = plan(LEVELS, None, 60 * minutes, TWO_CORES)
    took = made.seeds * sum(seconds(level, made.requests[level], TWO_CORES) for level in made.levels)
    assert took <= 60 * minutes
    assert 1 in made.levels
    assert set(made.levels) | set(made.left_out) == set(LEVELS)
    assert 2 <= made.seeds <= MOST_SEEDS


def test_more_time_means_more_of_everything_and_half_an_hour_is_enough_for_all_levels() -> None:
    plans = [plan(LEVELS, None, 60 * minutes, TWO_CORES) for minutes in (2, 8, 15, 30, 90)]
    sizes = [made.seeds * sum(made.requests.values()) for made in plans]
    assert sizes == sorted(sizes)
    assert not plans[-2].left_out
    assert plans[-1].seeds == SEEDS


def test_seeds_that_are_asked_for_are_kept_and_conversations_are_whole() -> None:
    made = plan(LEVELS, 4, 900, TWO_CORES, 6)
    assert made.seeds == 4
    assert all(made.requests[level] >= 6 * level for level in made.levels)


def test_without_any_time_the_least_is_planned() -> None:
    made = plan(LEVELS, None, -1.0, TWO_CORES)
    assert 1 <= len(made.levels) <= 2
    assert made.seeds == 2


def test_the_sweep_ends_where_nobody_keeps_the_slo_any_more() -> None:
    fast = [{"a": 100.0}] * 4
    assert hopeless([{"a": 5, "b": 0}, {"a": 0, "b": 0}], fast[:2])
    assert not hopeless([{"a": 5, "b": 0}, {"a": 1, "b": 0}], fast[:2])
    assert not hopeless([{"a": 0}], fast[:1])


def test_under_an_impossible_slo_the_sweep_goes_on_as_long_as_output_grows() -> None:
    none = [{"a": 0}] * 4
    assert not hopeless(none, [{"a": 10.0}, {"a": 20.0}, {"a": 30.0}, {"a": 50.0}])
    assert hopeless(none, [{"a": 10.0}, {"a": 20.0}, {"a": 20.5}, {"a": 20.0}])


def test_every_architecture_gets_the_same_cores_and_kv_memory() -> None:
    chosen = architectures_of("single,replicated,2p1d,adaptive:1")
    assert [(one.name, one.workers) for one in chosen] == [
        ("single", 1),
        ("replicated", 3),
        ("2p1d", 3),
        ("adaptive:1", 1),
    ]
    flags = [one.flags([2, 3, 4, 5, 6, 7], 3 << 30) for one in chosen]
    assert " ".join(flags[0]) == (
        "--policy single --devices cpu:2+3+4+5+6+7 --prefill 0 --decode 0 --mixed 1 --kv-memory 3072MiB"
    )
    assert flags[2][2:4] == ["--devices", "cpu:2+3,cpu:4+5,cpu:6+7"]
    assert flags[2][-1] == "1024MiB"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("split", "architecture 'split' is not known; there are single"),
        ("0p1d", "architecture '0p1d' is not known"),
        ("single:2", "architecture 'single:2' is not known"),
        ("single,single", "names single twice"),
        ("", "architecture '' is not known"),
    ],
)
def test_an_architecture_that_is_none_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        architectures_of(text)


def test_cores_that_cannot_be_dealt_out_evenly_are_refused_with_a_number_that_can() -> None:
    with pytest.raises(ConfigError, match=r"4 cores cannot .* the 3 workers of 2p1d; give --cores 3"):
        architectures_of("2p1d")[0].flags([0, 1, 2, 3], 1 << 30)
    with pytest.raises(ConfigError, match=r"1 cores cannot .* give --cores 2"):
        architectures_of("replicated")[0].flags([0], 1 << 30)
