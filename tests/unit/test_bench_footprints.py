"""Leaks show in the fit of a process's memory and open files; peaks and single steps do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import psutil
import pytest

from bascule.bench.footprints import MB, Footprint, Footprints, Trend, footprint_of, table, trend_of


def trend(memory_mb: Callable[[float], float], files: Callable[[float], int] = lambda _: 30) -> Trend:
    """Of half an hour, by the minute."""
    samples = [(at, Footprint(int(memory_mb(at / 60) * MB), files(at / 60))) for at in range(0, 1800, 2)]
    found = trend_of("worker", samples, 300.0, 600.0)
    assert found is not None
    return found


def test_a_leak_of_memory_shows_beneath_noise() -> None:
    noise = Random(1)
    leaking = trend(lambda minute: 100 + 1.5 * minute + noise.uniform(0, 8))
    assert leaking.mb_per_min == pytest.approx(1.5, abs=0.2)
    assert "MB a minute" in leaking.faults[0]


def test_growth_while_it_warms_up_one_step_and_peaks_are_no_leak() -> None:
    noise = Random(1)

    def memory(minute: float) -> float:
        return 60 + 10 * min(minute, 5) + (20 if minute > 17 else 0) + (100 if noise.random() < 0.05 else 0)

    assert trend(memory).faults == []


def test_files_that_stay_open_show_and_those_that_come_and_go_do_not() -> None:
    noise = Random(1)
    leaking = trend(lambda _: 100, lambda minute: 30 + int(minute) + noise.randint(0, 9))
    assert leaking.mb_per_min == 0 and "open files" in leaking.faults[0]
    assert trend(lambda _: 100, lambda minute: 30 + noise.randint(0, 9 + int(minute))).faults == []


def test_a_process_that_did_not_live_long_enough_is_not_judged() -> None:
    samples = [(float(at), Footprint(1, 1)) for at in range(800)]
    assert trend_of("worker", samples, 300.0, 600.0) is None
    assert trend_of("worker", samples[:5], 300.0, 0.0) is None


def test_what_is_sampled_is_what_processes_hold() -> None:
    async def work() -> list[Trend]:
        footprints = Footprints(lambda: {"me": footprint_of(psutil.Process())})
        watching = asyncio.create_task(footprints.watch())
        async with asyncio.timeout(20):
            while len(footprints._samples["me"]) < 3:
                await asyncio.sleep(0.01)
        watching.cancel()
        return footprints.trends(0.0, 1.0)

    [found] = asyncio.run(work())
    assert found.first_mb > 5 and found.first_files >= 3
    assert "| me |" in table([found])
