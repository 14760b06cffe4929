"""What a table of simulations says: cells over their seeds, where splitting begins to pay, and a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bascule.bench.compare.paired import first_ahead
from bascule.sim.figures import over_seeds
from bascule.sim.sweep import Task, level_of

_CLEAR = 0.03
"""Goodputs that differ by less are equal."""


def cells_of(tasks: Sequence[Task], found: Sequence[dict[str, Any]], prices: dict[str, float]) -> list[dict[str, Any]]:
    """One for each architecture, size and level. `prices` are of an hour of one worker, by class."""
    groups: dict[tuple[str, int, str], list[int]] = {}
    for number, task in enumerate(tasks):
        groups.setdefault((task.architecture, task.workers, task.level), []).append(number)
    cells = []
    for (architecture, workers, level), numbers in groups.items():
        slo = tasks[numbers[0]].cluster.slo
        per_seed = [dict(found[number]) for number in numbers]
        pools = tasks[numbers[0]].cluster.pools
        hourly = sum(prices.get(pool.kind.name, math.nan) * pool.count for pool in pools)
        if hourly > 0:  # every class has a price
            for each in per_seed:
                each["cost_per_million_output_tokens"] = hourly / 3600 / max(each["output_tokens_per_s"], 1e-12) * 1e6
        rates = [each.pop("rate_offered") for each in per_seed]
        offered: dict[str, Any] = {"rate": rates[0]}
        if level and (clients := level_of(level).clients) is not None:
            offered = {"concurrency": clients}
        cells.append(
            {
                "architecture": architecture,
                "workers": workers,
                **offered,
                "seeds": len(numbers),
                **over_seeds(per_seed),
                "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "gap_s": slo.gap_s},
            }
        )
    return cells


def crossover(tasks: Sequence[Task], found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The level from which on disaggregated serving has at least the goodput of replicated serving, over the seeds.

    None where there is none, or not in most of the seeds.
    """
    goodput = {
        (task.architecture, task.level, task.seed): each["goodput_per_s"]
        for task, each in zip(tasks, found, strict=True)
    }
    kinds = {level_of(task.level).clients is None for task in tasks if task.level}
    if len(kinds) != 1 or not {"replicated", "disaggregated"} <= {task.architecture for task in tasks}:
        return None
    levels = sorted({task.level for task in tasks}, key=_number)
    values: list[float] = []
    for seed in dict.fromkeys(task.seed for task in tasks):
        split, whole = ([goodput[name, level, seed] for level in levels] for name in ("disaggregated", "replicated"))
        ahead = [ours > 0 and ours >= theirs for ours, theirs in zip(split, whole, strict=True)]
        values.append(first_ahead([_number(level) for level in levels], ahead))
    values.sort()
    middle = statistics.median(values)
    if middle == float("inf"):
        return None
    high = values[-1] if values[-1] < float("inf") else None
    return {"metric": "goodput_per_s", "value": middle, "lo": values[0], "hi": high}


def _number(level: str) -> float:
    """Clients, or requests/s."""
    at = level_of(level)
    return float(at.clients if at.clients is not None else at.rate or 0.0)


def verdict(cells: Sequence[dict[str, Any]]) -> str:
    """Which architecture has the most goodput, and by how much, at the level where that is largest."""
    best: dict[str, dict[str, Any]] = {}
    for cell in cells:
        name = cell["architecture"]
        if name not in best or cell["goodput_per_s"]["median"] > best[name]["goodput_per_s"]["median"]:
            best[name] = cell
    ranked = sorted(best.values(), key=lambda cell: -cell["goodput_per_s"]["median"])
    first = ranked[0]["goodput_per_s"]["median"]
    if not first:
        return "no request met the SLO"
    told = f"{ranked[0]['architecture']} has the most goodput, {first:.3g} requests/s"
    if len(ranked) == 1:
        return told
    equal = [cell["architecture"] for cell in ranked[1:] if cell["goodput_per_s"]["median"] > (1 - _CLEAR) * first]
    if equal:
        return f"{told}; {', '.join(equal)} within {_CLEAR:.0%} of it"
    second = ranked[1]
    return f"{told}; next is {second['architecture']} with {second['goodput_per_s']['median']:.3g}"
