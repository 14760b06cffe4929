"""What a run of the load client says: figures as plain numbers, and what is to be known before they are believed."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from bascule.bench.answers import Counting
from bascule.bench.load import Record, Run
from bascule.bench.quantiles import quantile
from bascule.types import Slo

_FIRST_MESSAGES = 5
_LATE_S = 0.05
_LAG_S = 0.02
_BUSY = 0.85
"""Lateness, lag of the pulse (99th percentiles) and share of a core, beyond which the figures are doubtful."""


def load_report(run: Run, slo: Slo) -> dict[str, Any]:
    """Seconds, tokens and counts; None where nothing was measured."""
    good = run.good()
    gaps = [gap for record in good for gap in record.gaps]
    several = [record.tpot for record in good if record.tokens > 1]
    return {
        "requests": len(run.records),
        "completed": len(good),
        "rejected": sum(record.rejected for record in run.records),
        "errors": sum(_failed(record) for record in run.records),
        "unfinished": run.unfinished,
        "wall_s": run.wall_s,
        "ttft_s": _spread([record.ttft for record in good]),
        "tpot_s": _spread(several),
        "itl_s": _spread(gaps),
        "e2e_s": _spread([record.e2e for record in good]),
        "output_tokens_per_s": run.output_tokens_per_s,
        "input_tokens_per_s": sum(record.prompt_tokens or record.sent_tokens for record in good) / run.wall_s,
        "requests_per_s": len(good) / run.wall_s,
        "goodput_per_s": run.goodput(slo),
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "gap_s": slo.gap_s},
        "slo_met": _share_met(run.records, slo),
        "slo_met_by_bound": {name: _share_met(run.records, bound) for name, bound in _bounds(slo).items()},
        "slo_missed": missed(run.records, slo),
        "prompt_tokens": sum(record.prompt_tokens or record.sent_tokens for record in good),
        "cached_tokens": sum(record.cached for record in good),
        "output_tokens": sum(record.tokens for record in good),
        "short_outputs": sum(record.tokens < record.asked for record in good),
        "other_prompt_length": sum(record.prompt_tokens not in (0, record.sent_tokens) for record in good),
        "tokens_counted_by": dict(Counter(record.counted_by for record in good)),
        "tokens_per_arrival": _mean([record.tokens / (len(record.gaps) + 1) for record in good]),
        "error_messages": _messages(record for record in run.records if _failed(record)),
        "rejection_messages": _messages(record for record in run.records if record.rejected),
        "client": {
            "late_s": _spread([record.late for record in run.records]),
            "lag_s": _spread(run.lags),
            "cpu_share": run.cpu_s / run.wall_s,
        },
    }


def missed(records: Sequence[Record], slo: Slo) -> dict[str, int]:
    """Requests by the first bound that they missed, in this order."""
    found = dict.fromkeys(("rejected", "error", "ttft", "tpot", "gap"), 0)
    for record in records:
        bounds = {
            "rejected": record.rejected,
            "error": bool(record.error),
            "ttft": record.ttft > slo.ttft_s,
            "tpot": record.tpot > slo.tpot_s,
            "gap": record.gap > slo.gap_s,
        }
        if (first := next((name for name, is_missed in bounds.items() if is_missed), None)) is not None:
            found[first] += 1
    return found


def doubts(run: Run, *, text_prompts: bool) -> Iterator[str]:
    """What speaks against taking the figures as they are, a sentence each."""
    good = run.good()
    counted = Counter(record.counted_by for record in good)
    if guessed := counted[Counting.CHUNKS]:
        yield (
            f"the server does not count its tokens: in {guessed} answers each chunk with text counts as one, which is "
            "a guess; TPOT and tokens/s may be wrong"
        )
    if final := counted[Counting.FINAL_USAGE]:
        yield (
            f"in {final} answers only the end says how many tokens there were: counts and TPOT are exact, gaps are "
            "between chunks of unknown size"
        )
    if short := sum(record.tokens < record.asked for record in good):
        yield f"{short} outputs ended before they were to: the server does not know ignore_eos"
    if text_prompts:
        yield "the server takes no token ids: prompts are text, and only about as long as asked"
    elif other := sum(record.prompt_tokens not in (0, record.sent_tokens) for record in good):
        yield f"the server counts other prompt lengths than were sent in {other} answers"
    late = quantile([record.late for record in run.records], 0.99)
    lag = quantile(run.lags, 0.99)
    share = run.cpu_s / run.wall_s
    late_told = f"requests went out {1000 * late:.0f} ms late (99th percentile)"
    if lag > _LAG_S or share > _BUSY:
        yield (
            f"the client was short of time: its own pulse came {1000 * lag:.0f} ms late (99th percentile), it used "
            f"{100 * share:.0f} % of a core{f', and {late_told}' if late > _LATE_S else ''}; give it a core "
            "of its own, or several clients less load each"
        )
    elif late > _LATE_S:
        yield f"{late_told}, as connections took long to open; this counts as time to the first token"
    if run.unfinished:
        yield f"the run was stopped while {run.unfinished} requests were under way; they count nowhere"


def _bounds(slo: Slo) -> dict[str, Slo]:
    """Each bound alone."""
    return {"ttft": Slo(ttft_s=slo.ttft_s), "tpot": Slo(tpot_s=slo.tpot_s), "gap": Slo(gap_s=slo.gap_s)}


def _share_met(records: Sequence[Record], slo: Slo) -> float | None:
    return sum(record.meets(slo) for record in records) / len(records) if records else None


def _failed(record: Record) -> bool:
    return bool(record.error) and not record.rejected


def _messages(records: Iterator[Record]) -> list[dict[str, Any]]:
    """The most frequent messages, those that differ in numbers only as one, which is the first of them."""
    firsts: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    for record in records:
        kind = re.sub(r"\d+", "#", record.error)
        firsts.setdefault(kind, record.error)
        kinds[kind] += 1
    return [{"message": firsts[kind], "count": count} for kind, count in kinds.most_common(_FIRST_MESSAGES)]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {"mean": _mean(values), **{name: _known(quantile(values, share)) for name, share in shares.items()}}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
