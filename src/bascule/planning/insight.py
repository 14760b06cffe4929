"""What lies around an answer: where splitting begins to pay, what else would change it, and how sure it is."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from bascule.planning.candidates import Candidate, largest
from bascule.planning.classes import WorkerClass
from bascule.planning.demand import Demand
from bascule.planning.fluid import Scale
from bascule.planning.search import EQUAL, Found, Search, decided
from bascule.planning.trial import Result, Setting

CLEAR = 0.03
"""Goodputs that differ by less are equal."""
_LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the load, at which splitting is compared with not splitting."""
_FURTHER = (0.5, 0.7, 0.85, 1.15, 1.4, 2.0)
"""Times as long as the catalogue says that steps may take."""
_ALONE = 24
"""Requests, one after the other."""
_BRIEF = 200
"""Requests of a simulation, at most: what is around an answer need not be as exact as the answer."""


class Point(Struct, frozen=True, kw_only=True):
    """Goodput at one load, by seed."""

    level: float
    whole: tuple[float, ...]
    """Of the best of single and replicated."""
    split: tuple[float, ...]
    """Of the best disaggregated one."""
    adaptive: tuple[float, ...]

    @property
    def pays(self) -> bool:
        """Splitting has clearly more."""
        return statistics.fmean(self.split) > (1 + CLEAR) * statistics.fmean(self.whole)


class Crossing(Struct, frozen=True, kw_only=True):
    """Over a range of loads, for the money of the pick."""

    points: tuple[Point, ...]
    value: float | None
    """The load from which on splitting has clearly more goodput than whole requests; None for none in this range."""
    lo: float | None
    hi: float | None
    """The earliest and the latest by single seeds; `hi` is None where a seed has none."""


class Change(Struct, frozen=True, kw_only=True):
    """One thing that is otherwise."""

    what: str
    pick: Result
    best: Result
    """The same candidate where the pick stays."""

    @property
    def changes(self) -> bool:
        return self.pick.candidate != self.best.candidate

    @property
    def regret(self) -> float:
        """Share of the best one's goodput that staying with the pick costs."""
        return max(0.0, 1 - self.pick.goodput / self.best.goodput) if self.best.goodput else 0.0


class Confidence(Struct, frozen=True, kw_only=True):
    """How sure the pick is."""

    goodput: tuple[float, float]
    """The least and the most over the seeds."""
    met: tuple[float, float]
    runner_up: Candidate | None
    ahead: bool
    """Of the runner-up in every seed, in goodput; else both are as good, or the pick is taken as the cheaper one."""
    step_error: float | None
    """How far off the catalogue's steps may be: the held-out error of TPOT. None where all classes were measured."""
    flips_at: float | None
    """Steps that take so many times as long as the catalogue says change the pick; None for none of those tried."""


def crossing(search: Search, found: Found) -> Crossing:
    """Whole requests, split ones and adaptive over loads around the one asked for, on what the pick's money buys."""
    ask = search.ask
    money = search.money_with_split(found.pick.candidate)
    demand = ask.setting.demand
    asked = [demand.at(demand.level * factor) for factor in _LEVELS]
    levels = list({one.level: one for one in asked}.values())
    if demand.clients is not None and all(one.clients != 1 for one in levels):
        levels = [demand.at(1), *levels]
    points = []
    for one in levels:
        setting = _brief(replace(ask.setting, demand=one))
        goodputs = {name: _goodputs(search, setting, money, name) for name in ("whole", "disaggregated", "adaptive")}
        if goodputs["whole"] and goodputs["disaggregated"]:
            points.append(
                Point(
                    level=one.level,
                    whole=goodputs["whole"],
                    split=goodputs["disaggregated"],
                    adaptive=goodputs["adaptive"],
                )
            )
    firsts = [_first(points, seed) for seed in range(len(points[0].whole) if points else 0)]
    known = [level for level in firsts if level is not None]
    value = next((point.level for at, point in enumerate(points) if all(later.pays for later in points[at:])), None)
    return Crossing(
        points=tuple(points),
        value=value,
        lo=min(known) if known and value is not None else None,
        hi=max(known) if len(known) == len(firsts) and value is not None else None,
    )


def _goodputs(search: Search, setting: Setting, money: float, name: str) -> tuple[float, ...]:
    """Of the candidate that could carry most under this load, by seed; of two where whole requests may be taken."""
    scale = Scale(setting.demand, setting.slo, setting.links)
    names = ("single", "replicated") if name == "whole" else (name,)
    best: list[Candidate] = []
    for one in names:
        among = [each for each in search.all if each.architecture == one and each.money <= money * (1 + EQUAL)]
        best += sorted(largest(among), key=lambda each: _promise(scale, each))[-1:]
    results = search.trials.results(
        best, setting, search.ask.seeds[:2], f"where splitting pays: {setting.demand.level_told}"
    )
    if not results:
        return ()
    return tuple(max(results, key=lambda one: one.goodput).each("goodput_per_s"))


def _brief(setting: Setting) -> Setting:
    return replace(setting, requests=max(min(setting.count, _BRIEF), setting.least))


def _promise(scale: Scale, one: Candidate) -> tuple[float, float]:
    bounds = scale.of(one)
    return bounds.goodput, bounds.headroom


def _first(points: Sequence[Point], seed: int) -> float | None:
    """The load from which on one seed has clearly more goodput split than whole."""
    first = None
    for point in reversed(points):
        if point.split[seed] <= (1 + CLEAR) * point.whole[seed]:
            break
        first = point.level
    return first


# ---------------------------------------------------------------- what else could be otherwise


def changes(search: Search, found: Found) -> Iterator[Change]:
    """The network, reuse and lengths halved and doubled, one at a time."""
    for what, setting in variations(search.ask.setting):
        yield _changed(search, found, what, _brief(setting))


def variations(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """What is otherwise, in words, and as a setting."""
    demand = setting.demand
    for factor, word in ((0.5, "half"), (2.0, "twice")):
        yield f"network {word} as fast", replace(setting, links=setting.links.times(factor))
    for factor, word in ((0.5, "half"), (2.0, "twice")):
        reusing = demand.with_reuse(factor)
        bare = demand.reuse < 0.01
        if reusing is not None:
            what = "half of each prompt shared by all" if bare else f"prefix reuse {word} as large"
            yield what, replace(setting, demand=reusing)
    for factor, word in ((0.5, "half"), (2.0, "twice")):
        yield f"prompts {word} as long", replace(setting, demand=demand.with_prompts(factor))
    for factor, word in ((0.5, "half"), (2.0, "twice")):
        yield f"outputs {word} as long", replace(setting, demand=demand.with_outputs(factor))


def _changed(search: Search, found: Found, what: str, setting: Setting, slower: float = 1.0) -> Change:
    """The pick beside the best of each architecture, all under another setting: for its money, and where the cheapest
    is wanted and the pick does not keep the SLO then, for more."""
    classes = {one.name: _slower(one, slower) for one in search.ask.classes}
    pick = found.pick.candidate
    seeds = search.ask.seeds[:1]
    mine = search.trials.result(pick.with_classes(classes), setting, seeds, what)
    wants_cheap = search.ask.objective == "cost"
    if wants_cheap and search.keeps(mine):
        return Change(what=what, pick=mine, best=mine)
    scale = Scale(setting.demand, setting.slo, setting.links)
    rivals = [one.candidate for one in found.ranked if one.candidate.money <= pick.money * (1 + EQUAL)][:2]
    for money in (pick.money, *((2 * pick.money, float("inf")) if wants_cheap else ())):
        for name in search.ask.architectures:
            among = [one for one in search.all if one.architecture == name and one.money <= money * (1 + EQUAL)]
            rivals += sorted(largest(among), key=lambda each: _promise(scale, each))[-1:]
    asked = [one.with_classes(classes) for one in dict.fromkeys(rivals) if one != pick]
    best = search.ranked([mine, *search.trials.results(asked, setting, seeds, what)])[0]
    better = search.keeps(best) if wants_cheap else mine.goodput < (1 - CLEAR) * best.goodput
    if wants_cheap and not search.keeps(best) and best.candidate.money <= pick.money * (1 + EQUAL):
        better = mine.goodput < (1 - CLEAR) * best.goodput
    return Change(what=what, pick=mine, best=best if better else mine)


def _slower(one: WorkerClass, factor: float) -> WorkerClass:
    return one if one.analytic is None else one.slower(factor)


# ---------------------------------------------------------------- how sure it is


def confidence(search: Search, found: Found, *, around: bool = True) -> Confidence:
    """Over the seeds, and for classes that nobody has measured over how far off they may be (`around`: try it)."""
    pick = found.pick
    others = [one for one in found.ranked[1:] if one.candidate.money <= pick.candidate.money * (1 + EQUAL)]
    runner = max(others, key=lambda one: one.goodput, default=None)
    goodputs, mets = pick.each("goodput_per_s"), pick.each("slo_met")
    used = [share.of.analytic for share in pick.candidate.shares]
    errors = [one.expected.tpot for one in used if one is not None]
    return Confidence(
        goodput=(min(goodputs), max(goodputs)),
        met=(min(mets), max(mets)),
        runner_up=None if runner is None else runner.candidate,
        ahead=runner is not None and decided(pick, runner, lambda one: one.each("goodput_per_s")),
        step_error=max(errors) if errors else None,
        flips_at=_flips_at(search, found) if errors and around else None,
    )


def _flips_at(search: Search, found: Found) -> float | None:
    """The factor nearest to 1, of those tried, by which the catalogue's steps may be off before another one is best."""
    for factor in sorted(_FURTHER, key=lambda one: max(one, 1 / one)):
        what = f"steps {factor:g} times as long"
        if _changed(search, found, what, _brief(search.ask.setting), factor).changes:
            return factor
    return None


# ---------------------------------------------------------------- what is reachable


def alone(search: Search) -> Result:
    """The candidate with the most requests within the SLO where they come one after the other: nothing is quicker."""
    setting = search.ask.setting
    one_by_one = replace(setting, demand=setting.demand.closed_by(1), requests=_ALONE)
    scale = Scale(one_by_one.demand, setting.slo, setting.links)
    best = []
    for name in search.ask.architectures:
        among = [one for one in search.all if one.architecture == name]
        best += sorted(among, key=lambda one: (scale.of(one).in_time, scale.of(one).offered, -one.money))[-1:]
    results = search.trials.results(best, one_by_one, search.ask.seeds[:1], "one request at a time")
    return max(results, key=lambda one: (round(one.met, 2), -one.mean("e2e_s", "mean")))


def largest_rate(search: Search, candidate: Candidate) -> float | None:
    """The largest rate of arrivals at which it keeps the SLO (requests/s), within a tenth; None where none is found."""
    demand: Demand = search.ask.setting.demand
    high = search.scale.of(candidate).capacity
    low = 0.0
    for _ in range(4):
        middle = (low + high) / 2
        setting = replace(search.ask.setting, demand=demand.open_at(middle))
        result = search.trials.result(candidate, setting, search.ask.seeds[:1], "the largest rate")
        if search.keeps(result):
            low = middle
        else:
            high = middle
    return low or None
