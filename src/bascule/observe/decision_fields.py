"""A decision record as the plain fields that the admin API and the decision log write."""

from __future__ import annotations

import msgspec

from bascule.observe.decisions import Attempt, Record
from bascule.policies.snapshot import Candidate


def record_fields(record: Record) -> dict[str, object]:
    """A record in the admin API's words; `candidates`, `chosen` and `reason` are the latest decision's."""
    attempts = [attempt_fields(attempt) for attempt in record.attempts]
    latest = attempts[-1] if attempts else {"candidates": [], "chosen": None, "reason": ""}
    winner = record.attempts[-1].winner if record.attempts else None
    return {
        **summary_fields(record),
        "candidates": latest["candidates"],
        "reason": record.note or latest["reason"],
        "predicted": None if winner is None else msgspec.structs.asdict(winner.predicted),
        "error_ratio": record.errors,
        "attempts": attempts,
        "max_tokens": record.max_tokens,
        "slo": msgspec.structs.asdict(record.slo),
        "priority": record.priority,
    }


def summary_fields(record: Record) -> dict[str, object]:
    """A record in a line of a list."""
    latest = record.attempts[-1] if record.attempts else None
    return {
        "id": record.public_id,
        "output": record.output,
        "backend_id": record.id,
        "arrived": record.arrived,
        "policy": record.policy,
        "outcome": record.outcome,
        "chosen": latest.chosen.route if latest is not None and latest.chosen is not None else None,
        "reason": record.note or (latest.reason if latest is not None else ""),
        "ttft_s": record.actual.ttft_s,
        "tpot_s": record.actual.tpot_s,
        "prompt_tokens": record.prompt_tokens,
        "session": record.session,
        "actual": {
            **msgspec.structs.asdict(record.actual),
            "handoff": None if record.actual.handoff is None else msgspec.structs.asdict(record.actual.handoff),
        },
    }


def attempt_fields(attempt: Attempt) -> dict[str, object]:
    return {
        "waited_s": attempt.waited_s,
        "candidates": [candidate_fields(candidate) for candidate in attempt.candidates],
        "chosen": None if attempt.chosen is None else attempt.chosen.route,
        "reason": attempt.reason,
    }


def candidate_fields(candidate: Candidate) -> dict[str, object]:
    return {
        "placement": candidate.placement.route,
        "prefill": candidate.placement.prefill,
        "decode": candidate.placement.decode,
        "handed_by": candidate.handed_by,
        "predicted": msgspec.structs.asdict(candidate.predicted),
        "feasible": candidate.feasible,
        "why_not": candidate.why_not,
        "cached_tokens": candidate.cached_tokens,
        "loaded_tokens": candidate.loaded_tokens,
        "fetch_from": candidate.fetch_from,
        "cost_s": candidate.cost_s,
    }
