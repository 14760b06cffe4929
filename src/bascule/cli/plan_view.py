"""What `bascule plan` shows to people."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from bascule.cli.screen import print_whole
from bascule.planning.answer import Answer
from bascule.planning.insight import CLEAR, Change, Point
from bascule.planning.trial import Result


def show(answer: Answer) -> None:
    """The recommendation first, then what it rests on."""
    console = Console(soft_wrap=True)

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False)

    pick = answer.found.pick
    price = "" if answer.cost is None else f", {answer.cost.per_hour:.4g} an hour"
    say(f"Recommendation: {pick.candidate}; devices: {pick.candidate.devices}{price}")
    say(answer.reason)
    for line in _expected(answer):
        say(line)
    say()
    print_whole(_candidates(answer))
    if answer.crossing is not None and answer.crossing.points:
        print_whole(_crossing(answer))
        for line in _crossover(answer):
            say(line)
        say()
    if answer.changes:
        print_whole(_changes(answer))
    for line in _confidence(answer):
        say(line)
    say()
    say("Rules of thumb, beside what was found:")
    told: set[str] = set()
    for judged in answer.rules:
        rule = judged.rule
        verdict = "no verdict" if rule.says is None else "split" if rule.says == "split" else "do not split"
        say(f"  {rule.about}: {verdict} ({rule.here}). {_sentence(rule.rule)}.")
        if judged.against is not None:
            again = "for the same reason" if judged.against in told else judged.against
            say(f"    The figures say otherwise: {again}.")
            told.add(judged.against)
    say()
    say("To start it:" if answer.started.commands else "Nothing of Bascule's starts this:")
    for command in answer.started.commands:
        say(f"  {command}")
    if answer.started.note:
        say(f"  ({answer.started.note})")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _expected(answer: Answer) -> Iterator[str]:
    pick, cost = answer.found.pick, answer.cost
    yield (
        f"Expected: {pick.goodput:.3g} of {pick.mean('requests_per_s'):.3g} requests/s within the SLO; "
        f"TTFT p50 {pick.mean('ttft_s', 'p50'):.3g} s, p90 {pick.mean('ttft_s', 'p90'):.3g} s; "
        f"TPOT {1000 * pick.mean('tpot_s', 'mean'):.3g} ms; gap p99 {1000 * pick.mean('itl_s', 'p99'):.3g} ms; "
        f"{pick.mean('output_tokens_per_s'):,.0f} output tokens/s"
    )
    if cost is None:
        yield "Cost: not told, as no price_per_hour is known of its workers"
    else:
        yield (
            f"Cost: {cost.per_million_input_tokens:.3g} per million input tokens, "
            f"{cost.per_million_output_tokens:.3g} per million output tokens "
            f"(all on output: {cost.all_per_million_output_tokens:.3g}), at this load"
        )
    if answer.largest_rate is not None:
        yield f"It keeps the SLO up to about {answer.largest_rate:.3g} requests/s of arrivals of their own"


def _candidates(answer: Answer) -> Table:
    found = answer.found
    table = Table(
        title=f"{found.considered:,} candidates, {found.simulated} simulated; means of {len(answer.ask.seeds)} seeds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    priced = found.pick.candidate.price is not None
    for name in (
        "candidate",
        "an hour" if priced else "devices",
        "goodput/s",
        "in SLO",
        "TTFT p90 s",
        "TPOT ms",
        "gap p99 ms",
    ):
        table.add_column(name, justify="left" if name == "candidate" else "right", no_wrap=True)
    table.add_column("why not", no_wrap=False, max_width=90)
    whys = {id(one.result): one.why_not for one in answer.alternatives}
    for one in found.ranked:
        table.add_row(str(one.candidate), f"{one.candidate.money:.4g}", *_figures(one), whys.get(id(one), "(the pick)"))
    return table


def _figures(one: Result) -> Iterator[str]:
    yield f"{one.goodput:.3g}"
    yield f"{one.met:.1%}"
    yield f"{one.mean('ttft_s', 'p90'):.3g}"
    yield f"{1000 * one.mean('tpot_s', 'mean'):.3g}"
    yield f"{1000 * one.mean('itl_s', 'p99'):.3g}"


def _crossing(answer: Answer) -> Table:
    demand = answer.ask.setting.demand
    table = Table(
        title="Goodput by load, for this money: requests/s within the SLO", title_justify="left", box=box.SIMPLE_HEAD
    )
    for name in ("clients" if demand.clients is not None else "requests/s", "whole", "split", "adaptive"):
        table.add_column(name, justify="right")
    assert answer.crossing is not None
    for point in answer.crossing.points:
        table.add_row(f"{point.level:.3g}", *_goodputs(point))
    return table


def _goodputs(point: Point) -> Iterator[str]:
    for values in (point.whole, point.split, point.adaptive):
        yield f"{sum(values) / len(values):.3g}" if values else "-"


def _crossover(answer: Answer) -> Iterator[str]:
    assert answer.crossing is not None
    unit = "clients" if answer.ask.setting.demand.clients is not None else "requests/s"
    crossing = answer.crossing
    levels = [point.level for point in crossing.points]
    if crossing.value is None:
        paying = [f"{point.level:.3g}" for point in crossing.points if point.pays]
        once = f"; it has more at {', '.join(paying)} {unit}, and not beyond" if paying else ""
        yield f"Crossover: none from {min(levels):.3g} to {max(levels):.3g} {unit}{once} (over {CLEAR:.0%} more counts)"
    else:
        ends = f"{crossing.lo or crossing.value:.3g} to {'beyond' if crossing.hi is None else f'{crossing.hi:.3g}'}"
        yield f"Crossover: splitting pays from {crossing.value:.3g} {unit} on (by single seeds {ends})"


def _changes(answer: Answer) -> Table:
    table = Table(title="If something were otherwise", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("what", "goodput/s of the pick", "best then", "staying costs"):
        table.add_column(name, justify="left" if name in ("what", "best then") else "right", no_wrap=True)
    for change in answer.changes:
        table.add_row(change.what, f"{change.pick.goodput:.3g}", _best(change), f"{change.regret:.0%}")
    return table


def _best(change: Change) -> str:
    return str(change.best.candidate) if change.changes else "the same"


def _confidence(answer: Answer) -> Iterator[str]:
    sure = answer.confidence
    yield (
        f"Confidence: over {len(answer.ask.seeds)} seeds goodput {sure.goodput[0]:.3g} to {sure.goodput[1]:.3g}, "
        f"in SLO {sure.met[0]:.1%} to {sure.met[1]:.1%}"
    )
    if sure.runner_up is not None:
        told = "less goodput in every seed" if sure.ahead else "not always less goodput: they are not told apart by it"
        yield f"  next for this money is {sure.runner_up}, with {told}"
    if sure.step_error is not None:
        tried = (
            ""
            if answer.crossing is None
            else "; "
            + (
                "steps from half to twice as long do not change the pick"
                if sure.flips_at is None
                else f"steps {sure.flips_at:g} times as long change the pick"
            )
        )
        yield f"  by the catalogue: such predictions of TPOT were off by {sure.step_error:.0%} where held out{tried}"
    else:
        yield "  by measured cost models; simulated against live: docs/simulation.md"
