"""The whole answer: what to build, what it will do and cost, what else was looked at, and how to start it."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from bascule.errors import ConfigError
from bascule.planning.candidates import Candidate
from bascule.planning.commands import Started, commands
from bascule.planning.insight import Change, Confidence, Crossing, alone, changes, confidence, crossing, largest_rate
from bascule.planning.rules import Rule, disagreement, rules, why_behind
from bascule.planning.search import EQUAL, Ask, Found, Search
from bascule.planning.trial import Heard, Result, Trials
from bascule.types import Role, Slo


class Judged(Struct, frozen=True):
    """A rule of thumb, and why the figures say otherwise (None where they do not)."""

    rule: Rule
    against: str | None


class Cost(Struct, frozen=True, kw_only=True):
    """At the load asked for, idle time included. In the currency of the prices."""

    per_hour: float
    per_million_input_tokens: float
    """What the time that goes into prompts costs; likewise for outputs."""
    per_million_output_tokens: float
    all_per_million_output_tokens: float
    """The whole bill over the output tokens, as `simulate` has it."""


class Alternative(Struct, frozen=True):
    result: Result
    why_not: str


class Answer(Struct, frozen=True, kw_only=True):
    """What `plan` says."""

    ask: Ask
    found: Found
    reason: str
    cost: Cost | None
    """None where a class has no price."""
    alternatives: tuple[Alternative, ...]
    rules: tuple[Judged, ...]
    started: Started
    crossing: Crossing | None = None
    changes: tuple[Change, ...] = ()
    confidence: Confidence
    largest_rate: float | None = None
    simulations: int

    @property
    def short(self) -> str | None:
        """What is missing, where the cheapest that keeps the SLO was asked for and the budget holds none."""
        if self.found.keeps or self.ask.objective != "cost":
            return None
        told = (
            f"nothing within {self.ask.budget} keeps the SLO for {self.ask.attainment:.0%} of requests at "
            f"{self.ask.setting.demand.level_told}: the most is {self.found.pick.met:.1%}, by "
            f"{self.found.pick.candidate}"
        )
        enough = self.found.enough
        if enough is None:
            return f"{told}; nor does anything within four times that; relax the SLO or take other hardware"
        price = "" if enough.price is None else f", {enough.price:.4g} an hour"
        size = f"{enough.devices} devices{price}"
        return f"{told}; the smallest that would do is {enough} with {size}; raise the budget"


def answer(ask: Ask, model: str, heard: Heard, *, around: bool = True) -> Answer:
    """Search, and look around what was found (`around`: crossover, sensitivity, largest rate).

    Raises ConfigError for a budget that holds nothing, and for an SLO that not even a request alone keeps.
    """
    trials = Trials(heard)
    search = Search(ask, trials)
    require_possible(search)
    found = search.found()
    pick = found.pick
    others = [one for one in found.ranked if one is not pick]
    return Answer(
        ask=ask,
        found=found,
        reason=reason(search, found),
        cost=cost(search, pick),
        alternatives=tuple(Alternative(one, why_not(search, one, found)) for one in others),
        rules=tuple(
            Judged(one, disagreement(one, pick, others))
            for one in rules(search, search.money_with_split(pick.candidate))
        ),
        started=commands(pick.candidate, model, ask.setting.slo, ask.setting.links),
        crossing=crossing(search, found) if around else None,
        changes=tuple(changes(search, found)) if around else (),
        confidence=confidence(search, found, around=around),
        largest_rate=largest_rate(search, pick.candidate) if around else None,
        simulations=trials.simulations,
    )


def require_possible(search: Search) -> None:
    """Raises ConfigError, which says what is reachable, for an SLO that one request after the other does not keep."""
    ask, best = search.ask, alone(search)
    if best.met >= ask.attainment - 1e-9:
        return
    raise ConfigError(
        f"no load keeps this SLO ({_bounds(ask.setting.slo)}) for {ask.attainment:.0%} of requests: not even one "
        f"request at a time does ({best.met:.0%}). The best reachable within {ask.budget} is TTFT "
        f"{best.mean('ttft_s', 'p90'):.3g} s, TPOT {best.mean('tpot_s', 'p90'):.3g} s and gaps of "
        f"{best.mean('itl_s', 'max'):.3g} s, by {best.candidate}; give bounds above these"
    )


def reason(search: Search, found: Found) -> str:
    """Why the pick, in a sentence or two."""
    pick, ask = found.pick, search.ask
    kept = f"it keeps the SLO for {pick.met:.1%} of requests at {ask.setting.demand.level_told}"
    if ask.objective == "goodput":
        first = f"{kept}, with {pick.goodput:.3g} good requests/s, the most that {ask.budget} hold"
    elif found.keeps:
        first = f"{kept}, and nothing cheaper that was tried does"
    else:
        first = f"{kept}, which is the most within {ask.budget}, and less than the {ask.attainment:.0%} asked for"
    others = [one for one in found.ranked if one is not pick]
    if pick.candidate.splits:
        return f"{first}. {_besides(others, splits=False)}"
    if pick.candidate.architecture == "adaptive" and pick.mean("handoffs"):
        share = pick.mean("handoffs") / pick.mean("requests")
        return (
            f"{first}. {share:.0%} of requests are handed over, the others stay whole. {_besides(others, splits=True)}"
        )
    return f"Do not disaggregate: {first}. {_besides(others, splits=True)}"


def _besides(others: list[Result], *, splits: bool) -> str:
    """The best of the other kind."""
    mine = [one for one in others if one.candidate.splits == splits and one.candidate.architecture != "adaptive"]
    if not mine:
        return "No split fits into this budget." if splits else "Nothing whole fits into this budget."
    best = max(mine, key=lambda one: one.met)
    kind = "split" if splits else "without splitting"
    return f"The best {kind}, {best.candidate}, keeps it for {best.met:.1%}: it {why_behind(best)}."


def why_not(search: Search, other: Result, found: Found) -> str:
    """Why an alternative is not the pick."""
    pick = found.pick
    ratio = other.candidate.money / pick.candidate.money
    keeps = search.keeps(other)
    if ratio > 1 + EQUAL:
        return f"{'keeps it too, and costs' if keeps else 'costs'} {ratio:.3g} times as much" + (
            "" if keeps else f"; it {why_behind(other)}"
        )
    if search.ask.objective == "cost" and found.keeps and not keeps:
        return f"keeps it for {other.met:.1%} only; it {why_behind(other)}"
    if keeps or other.goodput >= pick.goodput * (1 - EQUAL):
        if other.goodput >= pick.goodput * (1 - EQUAL):
            return "as good for the same money; the pick is simpler, or ahead by less than counts"
        return f"keeps it too, with {1 - other.goodput / pick.goodput:.0%} less goodput"
    return why_behind(other)


def cost(search: Search, pick: Result) -> Cost | None:
    """Of the pick; each worker's money goes to prompts and outputs as its time does."""
    hourly = pick.candidate.price
    if hourly is None:
        return None
    prompts = sum(part for part, _ in _shares_of_money(search, pick.candidate))
    output, put_in = pick.mean("output_tokens_per_s"), pick.mean("input_tokens_per_s")
    million = 1e6 / 3600
    return Cost(
        per_hour=hourly,
        per_million_input_tokens=million * prompts / max(put_in, 1e-12),
        per_million_output_tokens=million * (hourly - prompts) / max(output, 1e-12),
        all_per_million_output_tokens=million * hourly / max(output, 1e-12),
    )


def _shares_of_money(search: Search, candidate: Candidate) -> Iterator[tuple[float, float]]:
    """An hour's money of each pool that goes into prompts, and into outputs."""
    for share in candidate.shares:
        money = share.count * (share.of.price_per_hour or 0.0)
        work = search.scale.work(share.of)
        part = work.prefill_s / (work.prefill_s + work.beside_s)
        part = {Role.PREFILL: 1.0, Role.DECODE: 0.0}.get(share.role, part)
        yield money * part, money * (1 - part)


def _bounds(slo: Slo) -> str:
    return f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s, gap {slo.gap_s:g} s"
