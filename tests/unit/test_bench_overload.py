"""The overload benchmark fails where one of its bounds is broken, and only there."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from bascule.bench.footprints import Trend

STEADY = Trend("router", 1.5, 100.0, 101.0, 0.4, 30, 90)
"""More clients are connected under overload than before: its open files say nothing here."""


@pytest.fixture
def overload(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("overload")


def faults(overload: Any, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "system": "adaptive/slo",
        "searched": {"13": 9.0},
        "peak_rate": 13.0,
        "peaks": [9.0, 8.0],
        "rate": 52.0,
        "overloaded": [8.6, 8.1],
        "requests": 3000,
        "completed": 600,
        "rejected": 2400,
        "late": {},
        "errors": [],
        "without_retry_after": 0,
        "refusal_s": {"p50": 0.002, "p99": 0.049, "max": 0.2},
        "sent_late_s": {"p50": 0.0, "p99": 0.0, "max": 0.0},
        "trends": [STEADY],
    }
    found: list[str] = overload.Found(**(values | changes)).faults
    return found


def test_a_run_within_its_bounds_has_no_faults(overload: Any) -> None:
    assert faults(overload) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"overloaded": [8.0, 7.1]}, "goodput is 0.89 of the peak's"),
        ({"peaks": [0.0, 0.0]}, "goodput is 0.00 of the peak's"),
        ({"refusal_s": {"p50": 0.002, "p99": 0.051, "max": 0.2}}, "51 ms"),
        ({"refusal_s": {"p50": 0.002, "p99": math.nan, "max": 0.2}}, "nan ms"),
        ({"rejected": 0}, "no overload"),
        ({"trends": [STEADY, Trend("mixed-0", 1.5, 100.0, 102.0, 1.2, 30, 30)]}, "mixed-0 grows by 1.20 MB a minute"),
        ({"trends": []}, "memory"),
    ],
)
def test_each_broken_bound_is_a_fault_that_names_the_system(overload: Any, changes: dict[str, Any], told: str) -> None:
    (fault,) = faults(overload, **changes)
    assert told in fault and fault.startswith("adaptive/slo: ")


def test_without_the_slos_admission_the_goodput_is_not_judged(overload: Any) -> None:
    assert faults(overload, system="adaptive/queue", overloaded=[1.0, 1.0]) == []
