"""The figures of simulations, in the words of `bench load` and `bench compare`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bascule.bench.compare import paired
from bascule.bench.load_report import load_report
from bascule.sim.run import Outcome
from bascule.types import Slo

_OF_CLIENTS = ("client", "unfinished", "tokens_counted_by", "other_prompt_length", "short_outputs", "slo")
"""What only a real client can say, and what is the same for all seeds."""


def outcome_figures(outcome: Outcome, slo: Slo) -> dict[str, Any]:
    """Plain numbers, in seconds and tokens; None where nothing was measured."""
    report = load_report(outcome.run, slo)
    gaps = outcome.gaps
    for name in _OF_CLIENTS:
        del report[name]
    return {
        **report,
        "itl_s": {"p50": _plain(gaps.quantile(0.5)), "p99": _plain(gaps.quantile(0.99)), "max": gaps.longest},
        "busy": outcome.busy,
        "placed": outcome.placed,
        "handoffs": outcome.handoffs,
        "kept": outcome.kept,
        "handoff_bytes": outcome.handoff_bytes,
        "events": outcome.events,
    }


def over_seeds(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same keys; each number as its median over the seeds, with the least and the most."""
    return paired.over_seeds(figures, _interval)


def _interval(numbers: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(numbers), "lo": min(numbers), "hi": max(numbers)}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
