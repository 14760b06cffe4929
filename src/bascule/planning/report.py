"""The answer as plain numbers and words, for scripts: the keys that the contract names, and more."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from bascule.planning.answer import Answer
from bascule.planning.candidates import Candidate
from bascule.planning.trial import Result
from bascule.sim.figures import over_seeds


def report_of(answer: Answer) -> dict[str, Any]:
    """SI units; figures of several seeds as median, least and most."""
    ask, found = answer.ask, answer.found
    demand, slo = ask.setting.demand, ask.setting.slo
    crossing = answer.crossing
    crossover = None
    if crossing is not None and crossing.value is not None:
        crossover = {"metric": "goodput_per_s", "value": crossing.value, "lo": crossing.lo, "hi": crossing.hi}
    return {
        "recommendation": described(found.pick.candidate),
        "keeps_slo": found.keeps,
        "reason": answer.reason,
        "expected": {**figures(found.pick), "largest_rate": answer.largest_rate},
        "cost": None if answer.cost is None else msgspec.to_builtins(answer.cost),
        "alternatives": [
            {**described(one.result.candidate), **figures(one.result), "why_not": one.why_not}
            for one in answer.alternatives
        ],
        "crossover": crossover,
        "crossover_points": None if crossing is None else msgspec.to_builtins(crossing.points),
        "sensitivity": [
            {
                "what": one.what,
                "changes": one.changes,
                "best": described(one.best.candidate),
                "goodput_per_s": one.pick.goodput,
                "best_goodput_per_s": one.best.goodput,
                "regret": one.regret,
            }
            for one in answer.changes
        ],
        "confidence": {
            **msgspec.structs.asdict(answer.confidence),
            "runner_up": None if answer.confidence.runner_up is None else described(answer.confidence.runner_up),
        },
        "rules_of_thumb": [{**msgspec.to_builtins(one.rule), "against": one.against} for one in answer.rules],
        "commands": list(answer.started.commands),
        "note": answer.started.note,
        "smallest_that_would_do": None if found.enough is None else described(found.enough),
        "traffic": {
            "name": demand.name,
            "rate": demand.rate,
            "concurrency": demand.clients,
            "prompt_tokens": demand.prompt_tokens,
            "output_tokens": demand.output_tokens,
            "prefix_reuse": demand.reuse,
        },
        "slo": {
            name: _plain(value)
            for name, value in (("ttft_s", slo.ttft_s), ("tpot_s", slo.tpot_s), ("gap_s", slo.gap_s))
        },
        "attainment": ask.attainment,
        "objective": ask.objective,
        "search": {
            "considered": found.considered,
            "simulated": found.simulated,
            "simulations": answer.simulations,
            "seeds": list(ask.seeds),
        },
    }


def described(candidate: Candidate) -> dict[str, Any]:
    """An architecture with its pools."""
    return {
        "architecture": candidate.architecture,
        "pools": [
            {"role": str(share.role), "class": share.of.name, "count": share.count} for share in candidate.shares
        ],
        "devices": candidate.devices,
        "price_per_hour": candidate.price,
    }


def figures(result: Result) -> dict[str, Any]:
    """Of all seeds together."""
    return over_seeds(result.runs)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
