"""A comparison's report: one dictionary for scripts, and the blocks of which page and Markdown are made."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from bascule import __version__
from bascule.bench.compare.architectures import Side
from bascule.bench.compare.document import Block, Charts, Code, Heading, Points, Rows, Shown, Words
from bascule.bench.compare.figures import METRICS, Compared, Metric
from bascule.bench.compare.level_charts import COLOURS, Point, over_levels, users_and_cores
from bascule.bench.compare.verdict import crossover_words, decision, sentences
from bascule.bench.load_page import slo_words

_OF_ONE = {
    "TTFT p50": ("ttft_s", "p50"),
    "TTFT p99": ("ttft_s", "p99"),
    "TPOT": ("tpot_s", "mean"),
    "gap p99": ("itl_s", "p99"),
    "end to end p50": ("e2e_s", "p50"),
}
_MOST = 100.0
_FEWEST_FOR_A_BAND = 3


class About(Struct, frozen=True):
    """What was asked for, and on what it ran."""

    workload: str
    model: str
    hardware: Mapping[str, Any]
    commands: Sequence[str]
    """The command of this comparison, then those of the systems."""
    systems: Mapping[str, str]
    """What each system is, in words."""
    settings: Mapping[str, str]
    """Further things to tell."""
    doubts: Sequence[str]


def report(compared: Compared, about: About) -> dict[str, Any]:
    """For scripts: seconds, tokens, counts; None where nothing was measured."""
    cells = compared.cells()
    decided = decision(compared)
    crossed = compared.crossovers()
    told = sentences(compared, decided, cells)
    found = compared.found
    first = next((one for one in crossed if compared.sides[one["architecture"]] is Side.SPLIT), None)
    return {
        "workload": about.workload,
        "model": about.model,
        "hardware": about.hardware,
        "systems": dict(about.systems),
        "slo": {"ttft_s": compared.slo.ttft_s, "tpot_s": compared.slo.tpot_s, "gap_s": compared.slo.gap_s},
        "cells": cells,
        "crossover": first if first is not None and first["value"] is not None else None,
        "crossovers": crossed,
        "verdict": told[0],
        "further": told[1:],
        "decision": decided,
        "winners": compared.winners(),
        "pairs": list(compared.pairs()),
        "pareto": compared.pareto(cells),
        "levels": compared.levels,
        "requests": {str(level): count for level, count in found.plan.requests.items()},
        "left_out": list(found.plan.left_out),
        "took_s": found.took_s,
        "stopped": found.stopped,
        "notes": [*found.notes, *about.doubts],
        "settings": dict(about.settings),
        "commands": list(about.commands),
        "versions": {"bascule": __version__, "python": platform.python_version()},
    }


def blocks(compared: Compared, made: Mapping[str, Any]) -> Iterator[Block]:
    """The report for people; `made` is what `report` gave."""
    colours = dict(zip(compared.names, COLOURS * (1 + len(compared.names) // len(COLOURS)), strict=False))
    levels = compared.levels
    yield Heading("Single, replicated or split?", 1)
    names = ", ".join(compared.names)
    yield Words(f"{made['workload']} on {made['model']}, {made['hardware']['words']}. Compared: {names}.", "under")
    if made["stopped"]:
        yield Words(
            f"The measurement ended early: {made['stopped']}. What follows is what was measured until then.", "doubt"
        )
    yield Words(made["verdict"], "verdict")
    yield from (Words(sentence) for sentence in made["further"])
    yield Heading("Crossover: from how many clients on splitting brings more goodput")
    yield Points(tuple(crossover_words(one, levels) for one in made["crossovers"]) or ("nothing to compare",))
    yield Heading("Who is ahead")
    yield _winners(compared, made["winners"], colours)
    yield Words(
        "Best by metric and clients, with the ratio to the next and its 95 % interval. Undecided: the interval has 1 "
        "in it, so that another sample could turn it round; equal: surely within 3 %. Goodput: requests/s with "
        f"{slo_words(compared.slo)}.",
        "under",
    )
    yield from _alone(compared, made["cells"], colours)
    yield Heading("Over the load")
    yield Charts(tuple(_charts(compared, made["cells"], colours)))
    yield Words("Medians over the seeds, with 95 % bands from three seeds on.", "under")
    yield from _pareto(made, colours)
    yield Heading("All figures")
    for level in levels:
        yield Heading(f"{level} client{'s' if level > 1 else ''}", 3)
        yield _cells([cell for cell in made["cells"] if cell["concurrency"] == level], colours)
    yield from _failures(made["cells"])
    yield from _paired(compared, made["pairs"])
    yield from _how(compared, made)


def _winners(compared: Compared, winners: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Rows:
    found = {(one["metric"], one["concurrency"]): one for one in winners}
    rows = tuple(
        _row(metric.name, *(_winner(found[metric.key, level], colours) for level in compared.levels))
        for metric in METRICS
    )
    return Rows(("clients", *map(str, compared.levels)), rows)


def _winner(one: Mapping[str, Any], colours: Mapping[str, str]) -> Shown:
    if one["outcome"] == "wins":
        ratio = one["ratio"]
        times = "" if ratio is None else f"{_short(ratio['ratio'])}× ({_short(ratio['lo'])}-{_short(ratio['hi'])})"
        return Shown(one["best"], "win", colours[one["best"]], times)
    if one["outcome"] == "none":
        return Shown("none", "open", "", "met the SLO")
    several = [one["best"], *one["rivals"]]
    everyone = len(several) == len(colours) > 2
    return Shown(one["outcome"], "open", "", "all of them" if everyone else ", ".join(several))


def _alone(compared: Compared, cells: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Iterator[Block]:
    alone = [cell for cell in cells if cell["concurrency"] == 1]
    if not alone:
        return
    yield Heading("Latency of one request at a time")
    rows = tuple(
        _row(_named(cell["architecture"], colours), *(_ms(cell[key][which]) for key, which in _OF_ONE.values()))
        for cell in alone
    )
    yield Rows(("milliseconds", *_OF_ONE), rows)


def _charts(compared: Compared, cells: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Iterator[str]:
    for title, unit, keys, log in (
        ("Goodput", "requests/s within the SLO", ("goodput_per_s",), False),
        ("Output", "tokens/s", ("output_tokens_per_s",), False),
        ("TTFT p50", "s", ("ttft_s", "p50"), True),
        ("TTFT p99", "s", ("ttft_s", "p99"), True),
        ("TPOT, mean", "s", ("tpot_s", "mean"), True),
        ("Gap between tokens, p99", "s", ("itl_s", "p99"), True),
    ):
        series = {name: _series(cells, name, keys) for name in compared.names}
        yield over_levels(title, unit, series, colours, log=log)


def _series(cells: Sequence[Mapping[str, Any]], name: str, keys: Sequence[str]) -> list[Point]:
    points = []
    for cell in cells:
        value: Any = cell
        for key in keys:
            value = value[key]
        if cell["architecture"] == name and value is not None:
            ends = (value["lo"], value["hi"]) if cell["seeds"] >= _FEWEST_FOR_A_BAND else (value["median"],) * 2
            points.append(Point(cell["concurrency"], value["median"], *ends))
    return points


def _pareto(made: Mapping[str, Any], colours: Mapping[str, str]) -> Iterator[Block]:
    points = made["pareto"]
    yield Heading("Speed for one against output of all")
    drawn = [(p["architecture"], p["concurrency"], p["per_user"], p["per_core"], p["unbeaten"]) for p in points]
    yield Charts((users_and_cores("Tokens/s of a user and of a core", drawn, colours),))
    yield Words(
        "Each point is an architecture at a number of clients. The broken line joins those that no other beats in "
        "both, with their clients beside them.",
        "under",
    )
    rows = tuple(
        (_named(p["architecture"], colours), str(p["concurrency"]), f"{p['per_user']:.3g}", f"{p['per_core']:.3g}")
        for p in sorted(points, key=lambda point: -point["per_user"])
        if p["unbeaten"]
    )
    yield Rows(("not beaten", "clients", "tokens/s of a user", "tokens/s of a core"), rows)


def _cells(cells: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Rows:
    head = ("", "seeds", "requests", "429", "errors", "SLO met", "goodput/s", "tokens/s", "TTFT p50 s", "TTFT p99 s")
    rows = tuple(
        (
            _named(cell["architecture"], colours),
            str(cell["seeds"]),
            _plain(cell["requests"]),
            _plain(cell["rejected"]),
            _plain(cell["errors"]),
            "-" if cell["slo_met"] is None else f"{_MOST * cell['slo_met']['median']:.0f} %",
            _spread(cell["goodput_per_s"]),
            _spread(cell["output_tokens_per_s"]),
            _spread(cell["ttft_s"]["p50"]),
            _spread(cell["ttft_s"]["p99"]),
            _ms(cell["tpot_s"]["mean"]),
            _ms(cell["itl_s"]["p99"]),
            _plain(cell["cached_tokens"]),
        )
        for cell in cells
    )
    return Rows((*head, "TPOT ms", "gap p99 ms", "cached"), rows)


def _failures(cells: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    rows = tuple(
        (f"{cell['architecture']}, {cell['concurrency']}", str(one["count"]), one["message"])
        for cell in cells
        for one in cell["messages"]
    )
    if rows:
        yield Heading("Errors and rejections", 3)
        yield Rows(("system, clients", "times", "message"), rows)


def _paired(compared: Compared, pairs: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    yield Heading("Paired ratios")
    yield Words(
        "The same requests on both sides; ratio of the figures with its 95 % interval. For goodput and output more "
        "than 1 is better, for latencies less.",
        "under",
    )
    for metric in METRICS:
        found = [one for one in pairs if one["metric"] == metric.key]
        sides = dict.fromkeys((one["architecture"], one["over"]) for one in found)
        at = {(one["architecture"], one["over"], one["concurrency"]): one for one in found}
        rows = tuple(
            _row(f"{ours} / {theirs}", *(_pair(metric, at[ours, theirs, level]) for level in compared.levels))
            for ours, theirs in sides
        )
        yield Rows((metric.name, *map(str, compared.levels)), rows)


def _pair(metric: Metric, one: Mapping[str, Any]) -> Shown:
    if one["seeds"] < 2:
        return Shown(_short(one["ratio"]), "open")
    decided = one["outcome"] in ("more", "less")
    better = decided and (one["outcome"] == "more") is metric.more_is_better
    mark = "better" if better else "worse" if decided else one["outcome"]
    below = f"({_short(one['lo'])}-{_short(one['hi'])})"
    return Shown(f"{_short(one['ratio'])} {mark}", "win" if decided else "open", "", below)


def _how(compared: Compared, made: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("How this was measured")
    seeds = max((cell["seeds"] for cell in made["cells"]), default=0)
    requests = ", ".join(f"{made['requests'][str(level)]} at {level}" for level in made["levels"])
    settings = {
        "hardware": made["hardware"]["words"],
        **made["settings"],
        "clients and requests of a run": requests,
        "seeds": str(seeds),
        "took": f"{made['took_s'] / 60:.1f} minutes",
        "versions": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
    }
    yield Rows(("what", "value"), tuple(settings.items()))
    yield Rows(("architecture", "is"), tuple(made["systems"].items()))
    yield Points(
        (
            "Closed loop: each client sends its next request when the last one has ended, so load never exceeds the "
            "number of clients.",
            "For each seed and level all systems had the same requests, in a random order of turns. Those that waited "
            "were stopped, or not started. Every level and seed has prompts of its own, and each system saw them once.",
            "Intervals are bootstrap over seeds, widened for their small number; all comparisons are of pairs with the "
            "same seed, and latencies of the same requests.",
            *made["notes"],
        )
    )
    yield Heading("Commands", 3)
    yield Code(tuple(made["commands"]))


def _row(first: str | Shown, *others: str | Shown) -> tuple[str | Shown, ...]:
    return (first, *others)


def _named(name: str, colours: Mapping[str, str]) -> Shown:
    return Shown(name, "", colours[name])


def _plain(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:g}"


def _spread(value: Mapping[str, float] | None, factor: float = 1.0) -> str | Shown:
    """The median, and below it the interval."""
    if value is None:
        return "-"
    middle, low, high = (_three(factor * value[name]) for name in ("median", "lo", "hi"))
    return Shown(middle, below=f"({low}-{high})")


def _ms(value: Mapping[str, float] | None) -> str | Shown:
    return _spread(value, 1000.0)


def _three(value: float) -> str:
    """With three digits that count, and all those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value < 1000 else "∞"
