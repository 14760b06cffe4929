"""A run of the load client as one page that needs nothing else: tables, distributions, what happened when, the SLO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from bascule.bench.charts import BLUE, GREEN, ORANGE, RED, histogram, lines, scatter, shares_bar
from bascule.bench.load import Record, Run
from bascule.bench.load_report import missed
from bascule.bench.page import page
from bascule.types import Slo

_SPREAD = ("mean", "p50", "p90", "p99", "max")
_SLICES = 120
_MISSES = {
    "rejected": ("#8a4f9e", "rejected (429)"),
    "error": (RED, "error"),
    "ttft": (ORANGE, "TTFT missed"),
    "tpot": ("#d8a53c", "TPOT missed"),
    "gap": ("#6b705c", "gap missed"),
}


def load_page(run: Run, slo: Slo, report: Mapping[str, Any], settings: Mapping[str, str], told: Sequence[str]) -> str:
    """HTML; `report` is `load_report`'s, `settings` what was asked for, `told` what speaks against the figures."""
    good = run.good()
    charts = [
        histogram("TTFT", "s", [record.ttft for record in good], slo.ttft_s),
        histogram("TPOT", "s", [record.tpot for record in good if record.tokens > 1], slo.tpot_s),
        histogram("ITL: single gaps between arrivals", "s", [gap for record in good for gap in record.gaps], slo.gap_s),
        histogram("Time to the last token", "s", [record.e2e for record in good]),
    ]
    attained = {"all bounds met": (GREEN, sum(record.meets(slo) for record in run.records))}
    attained |= {_MISSES[name][1]: (_MISSES[name][0], count) for name, count in missed(run.records, slo).items()}
    doubtful = "".join(f'<p class="doubt">{escape(sentence[0].upper() + sentence[1:])}.</p>' for sentence in told)
    under = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "url")
    parts = [
        f"<h1>Load on {escape(settings['url'])}</h1>",
        f'<p class="under">{escape(under)}</p>',
        doubtful,
        _summary(report),
        f"<h2>SLO: {escape(slo_words(slo))}</h2>",
        _kept(report),
        shares_bar("Requests by the first bound that they missed", attained),
        "<h2>Distributions</h2>",
        f'<div class="row">{"".join(charts)}</div>',
        "<h2>What happened when</h2>",
        _timeline(run, slo),
        *_failures(report),
    ]
    return page("bascule bench load", "".join(parts))


def slo_words(slo: Slo) -> str:
    """The bounds for a reader."""
    bounds = {"TTFT": slo.ttft_s, "TPOT": slo.tpot_s, "gap": slo.gap_s}
    told = [f"{name} at most {bound:g} s" for name, bound in bounds.items() if math.isfinite(bound)]
    return ", ".join(told) or "no bounds"


def _kept(report: Mapping[str, Any]) -> str:
    """How many requests kept each bound, whatever they did to the others."""
    names = {"ttft": "TTFT", "tpot": "TPOT", "gap": "gap"}
    told = ", ".join(
        f"{names[name]} by {100 * (share or 0):.1f} %" for name, share in report["slo_met_by_bound"].items()
    )
    return f'<p class="under">Kept by {100 * (report["slo_met"] or 0):.1f} % of all requests; {told}.</p>'


def _summary(report: Mapping[str, Any]) -> str:
    """What came of the requests, and the percentiles."""
    first = [
        ("requests", f"{report['requests']}"),
        ("completed", f"{report['completed']}"),
        ("rejected (429)", f"{report['rejected']}"),
        ("errors", f"{report['errors']}"),
        ("requests/s", f"{report['requests_per_s']:.3g}"),
        ("goodput, requests/s", f"{report['goodput_per_s']:.3g}"),
        ("output tokens/s", f"{report['output_tokens_per_s']:.4g}"),
        ("prompt tokens/s", f"{report['input_tokens_per_s']:.4g}"),
        ("prompt tokens cached", f"{report['cached_tokens']} of {report['prompt_tokens']}"),
        ("tokens counted by", ", ".join(way.replace("_", " ") for way in report["tokens_counted_by"]) or "-"),
    ]
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in first)
    head = "".join(f"<th>{name}</th>" for name in ("seconds", "mean", "p50", "p90", "p99", "max"))
    figures = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{_seconds(report[key][each])}</td>' for each in _SPREAD)}</tr>"
        for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("end to end", "e2e_s"))
    )
    return f'<div class="row"><table>{rows}</table><table><tr>{head}</tr>{figures}</table></div>'


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _timeline(run: Run, slo: Slo) -> str:
    groups: dict[str, tuple[str, list[tuple[float, float]]]] = {
        "SLO met": (GREEN, []),
        "SLO missed": (ORANGE, []),
        "failed": (RED, []),
    }
    begin = min((record.start for record in run.records), default=0.0)
    for record in run.records:
        name = "failed" if record.error else "SLO met" if record.meets(slo) else "SLO missed"
        groups[name][1].append((record.start - begin, record.ttft if math.isfinite(record.ttft) else 0.0))
    under_way, tokens = _over_time(run.records, begin)
    return (
        scatter("TTFT of each request by its start (failed ones without a token at 0)", "s", groups)
        + lines("Requests under way", "requests", {"requests": (BLUE, under_way)})
        + lines("Output", "tokens/s", {"tokens/s": (GREEN, tokens)})
    )


def _over_time(records: Sequence[Record], begin: float) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Requests under way, and output tokens/s, both as means over slices of the run."""
    spans = [(record.start - begin, min(record.e2e, record.answered)) for record in records]
    end = max((start + took for start, took in spans if math.isfinite(took)), default=0.0)
    if end <= 0.0:
        return [], []
    width = end / _SLICES
    under_way, tokens = [0.0] * _SLICES, [0.0] * _SLICES
    for start, took in spans:
        if math.isfinite(took):
            for number, share in _slices(start, start + took, width):
                under_way[number] += share
    for record in records:
        if record.tokens and math.isfinite(record.e2e):
            at, each = record.start - begin + record.ttft, record.tokens / (len(record.gaps) + 1)
            for moment in (at, *_moments(at, record.gaps)):
                tokens[min(_SLICES - 1, int(moment / width))] += each / width
    middles = [(number + 0.5) * width for number in range(_SLICES)]
    return list(zip(middles, under_way, strict=True)), list(zip(middles, tokens, strict=True))


def _moments(at: float, gaps: Sequence[float]) -> Iterator[float]:
    for gap in gaps:
        at += gap
        yield at


def _slices(start: float, end: float, width: float) -> Iterator[tuple[int, float]]:
    """The slices that a span touches, and the share of each that it fills."""
    for number in range(int(start / width), min(_SLICES - 1, int(end / width)) + 1):
        yield number, (min(end, (number + 1) * width) - max(start, number * width)) / width


def _failures(report: Mapping[str, Any]) -> Iterator[str]:
    for title, key in (("Errors", "error_messages"), ("Rejections", "rejection_messages")):
        if report[key]:
            rows = "".join(f"<tr><td>{escape(one['message'])}</td><td>{one['count']}</td></tr>" for one in report[key])
            yield f"<h2>{title}, the most frequent</h2><table>{rows}</table>"
