"""Which candidate to take: the cheapest that keeps the SLO, or the one with the most goodput that the budget holds.

Candidates are ordered by what they could carry at most (`fluid`), the best of them simulated briefly, the better half
of these again with other requests, and so on. Where the cheapest is wanted, prices are searched like a sorted list:
what keeps the SLO at one price is taken to do so at any higher one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from msgspec import Struct

from bascule.errors import ConfigError
from bascule.planning.candidates import ARCHITECTURES, Budget, Candidate, candidates, largest
from bascule.planning.classes import WorkerClass
from bascule.planning.fluid import Scale
from bascule.planning.trial import Result, Setting, Trials

Objective = Literal["cost", "goodput"]

EQUAL = 0.02
"""Goodputs, prices and shares that differ by less are equal."""
_TRIED = 12
_TRIED_A_PRICE = 6
"""Candidates that are simulated, in all or at one price."""
_BESIDE = 0.75
"""Candidates at a price are those that cost at least this part of it."""
_NEAR = 0.05
"""By which a first simulation may miss the attainment before a second one is made."""
_BEYOND = (1.25, 1.5, 2.0, 3.0, 4.0)
"""Budgets that are looked at where the one given is too small."""


class Ask(Struct, frozen=True, kw_only=True):
    """What is to be decided."""

    classes: tuple[WorkerClass, ...]
    budget: Budget
    setting: Setting
    attainment: float = 0.9
    """Share of requests that has to be within the SLO."""
    objective: Objective = "cost"
    architectures: tuple[str, ...] = ARCHITECTURES
    seeds: tuple[int, ...] = (1, 2, 3)


class Found(Struct, frozen=True, kw_only=True):
    """The answer."""

    pick: Result
    keeps: bool
    ranked: tuple[Result, ...]
    """All that were simulated with every seed, the pick first."""
    considered: int
    simulated: int
    enough: Candidate | None = None
    """The cheapest beyond the budget that keeps the SLO, where nothing within does; None if none was found."""


class Search:
    """One search. Raises ConfigError where the budget holds nothing."""

    def __init__(self, ask: Ask, trials: Trials) -> None:
        self.ask = ask
        self.trials = trials
        self.scale = Scale(ask.setting.demand, ask.setting.slo, ask.setting.links)
        self.all = candidates(ask.classes, ask.budget, ask.architectures)
        if not self.all:
            raise ConfigError(self._nothing())
        self._tried: set[Candidate] = set()

    def found(self) -> Found:
        """Decide."""
        if self.ask.objective == "goodput":
            ranked = self._halved(self._promising(largest(self.all), _TRIED))
        else:
            ranked = self._cheapest()
        keeps = self.keeps(ranked[0])
        enough = None
        if not keeps and self.ask.objective == "cost":
            enough = self._beyond()
        return Found(
            pick=ranked[0],
            keeps=keeps,
            ranked=tuple(ranked),
            considered=len(self.all),
            simulated=len(self._tried),
            enough=enough,
        )

    def keeps(self, result: Result) -> bool:
        return result.met >= self.ask.attainment - 1e-9

    def money_with_split(self, candidate: Candidate) -> float:
        """What a candidate costs, or, where so little buys no two workers, the least that a split costs."""
        splits = [one.money for one in self.all if one.splits]
        return max(candidate.money, min(splits, default=0.0))

    def best_of_each(self, money: float, among: Sequence[Candidate] | None = None) -> list[Candidate]:
        """Of each architecture the one that could carry most for so much money; of equals the simplest."""
        chosen = []
        for name in self.ask.architectures:
            fitting = [
                one for one in among or self.all if one.architecture == name and one.money <= money * (1 + EQUAL)
            ]
            if fitting:
                chosen.append(max(fitting, key=lambda one: (self._promise(one), -one.money)))
        return chosen

    # ------------------------------------------------------------ the most goodput

    def _halved(self, tried: list[Candidate]) -> list[Result]:
        """Simulated with one seed, the better half with another one, and so on; of each architecture one stays."""
        seeds = self.ask.seeds
        left = tried
        for count in range(1, len(seeds)):
            results = self._results(left, seeds[:count], f"{len(left)} candidates")
            kept = max(len(ARCHITECTURES), len(left) // 2)
            left = _kept([one.candidate for one in self.ranked(results)], kept)
        return self.ranked(self._results(left, seeds, f"the last {len(left)} candidates"))

    def ranked(self, results: Iterable[Result]) -> list[Result]:
        """The best first, by the objective."""
        left, ordered = list(results), []
        while left:
            best = max(left, key=self._worth)
            least = self._worth(best) * (1 - EQUAL)
            # Of what is as good the cheapest, and of that the simplest.
            equals = [one for one in left if self._worth(one) >= least]
            cheap = min(one.candidate.money for one in equals) * (1 + EQUAL)
            first = min((one for one in equals if one.candidate.money <= cheap), key=self._simplicity)
            ordered.append(first)
            left.remove(first)
        return ordered

    def _worth(self, result: Result) -> float:
        """What is to be large. What keeps the SLO is worth more than all that does not, and the cheaper the more."""
        if self.ask.objective == "goodput":
            return result.goodput
        if self.keeps(result):
            return 2.0 + 1.0 / (1.0 + result.candidate.money)  # by more than counts as equal
        return min(result.met, 1.0)

    def _simplicity(self, result: Result) -> tuple[int, float]:
        names = {share.of.name for share in result.candidate.shares}
        return ARCHITECTURES.index(result.candidate.architecture) + len(names) - 1, -result.goodput

    # ------------------------------------------------------------ the cheapest

    def _cheapest(self) -> list[Result]:
        """The cheapest that keep the SLO, and the best of each architecture for that money."""
        able = [one for one in self.all if self.scale.of(one).may_keep(self.ask.attainment)]
        first = self._first(able)
        if first is None:
            return self._halved(self._promising(largest(self.all), _TRIED))
        money, keepers = first
        others = self.best_of_each(money)
        others += [
            one
            for name in self.ask.architectures
            if name not in {other.architecture for other in others}
            for one in self.best_of_each(float("inf"), _least_of(able, name))
        ]
        last = list(dict.fromkeys([*keepers, *others]))
        return self.ranked(self._results(last, self.ask.seeds, f"the last {len(last)} candidates"))

    def _first(self, able: Sequence[Candidate]) -> tuple[float, list[Candidate]] | None:
        """The lowest price at which something keeps the SLO by all seeds, and what does; None where nothing does."""
        levels = _levels(able)
        while (money := self._least_money(able, levels)) is not None:
            tried = self._results(self._keepers(able, money), self.ask.seeds, f"candidates at {money:.3g}")
            if kept := [one.candidate for one in tried if self.keeps(one)]:
                return money, kept
            levels = [one for one in levels if one > money]
        return None

    def _least_money(self, able: Sequence[Candidate], levels: Sequence[float]) -> float | None:
        """The lowest price at which something keeps the SLO by two seeds: in growing steps from below, then halved."""
        low, high, step = -1, 0, 1
        while high < len(levels) and not self._keepers(able, levels[high]):
            low, high, step = high, high + step, 2 * step
            if high >= len(levels) > low + 1:
                high = len(levels) - 1
        if high >= len(levels):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._keepers(able, levels[middle]):
                high = middle
            else:
                low = middle
        return levels[high]

    def _keepers(self, able: Sequence[Candidate], money: float) -> list[Candidate]:
        """Those at about this price that keep the SLO, by two seeds."""
        near = [one for one in able if _BESIDE * money <= one.money <= money * (1 + 1e-9)]
        tried = self._promising(near, _TRIED_A_PRICE)
        first = self._results(tried, self.ask.seeds[:1], f"candidates at {money:.3g}")
        close = [one.candidate for one in first if one.met >= self.ask.attainment - _NEAR]
        again = self._results(close, self.ask.seeds[:2], f"candidates at {money:.3g}")
        return [one.candidate for one in again if self.keeps(one)]

    def _beyond(self) -> Candidate | None:
        """The cheapest keeper of larger budgets, one after the other."""
        for factor in _BEYOND:
            budget = self.ask.budget.times(factor)
            more = candidates(self.ask.classes, budget, self.ask.architectures)
            able = [one for one in more if self.scale.of(one).may_keep(self.ask.attainment) and one not in self.all]
            if (first := self._first(able)) is not None:
                return first[1][0]
        return None

    # ------------------------------------------------------------ inside

    def _promising(self, among: Sequence[Candidate], most: int) -> list[Candidate]:
        """The best by what they could carry; of each architecture and classes in turn, so that none is forgotten."""
        ordered = sorted(among, key=self._promise, reverse=True)
        by_family: dict[tuple[str, ...], list[Candidate]] = {}
        for one in ordered:
            by_family.setdefault(one.family, []).append(one)
        chosen: list[Candidate] = []
        for place in range(max(map(len, by_family.values()), default=0)):
            row = [family[place] for family in by_family.values() if place < len(family)]
            chosen += sorted(row, key=self._promise, reverse=True)
        return chosen[:most]

    def _promise(self, one: Candidate) -> tuple[float, float]:
        bounds = self.scale.of(one)
        return round(bounds.goodput / max(bounds.offered, 1e-12), 2), bounds.headroom

    def _results(self, tried: Sequence[Candidate], seeds: Sequence[int], why: str) -> list[Result]:
        self._tried.update(tried)
        return self.trials.results(tried, self.ask.setting, seeds, why)

    def _nothing(self) -> str:
        cheapest = min(self.ask.classes, key=lambda one: (one.price_per_hour or 0.0, one.devices))
        price = "" if cheapest.price_per_hour is None else f" and {cheapest.price_per_hour:g} an hour"
        split = "; --architectures disaggregated needs two" if "single" not in self.ask.architectures else ""
        return (
            f"a budget of {self.ask.budget} holds no worker: the smallest, {cheapest.name}, takes {cheapest.devices} "
            f"device{'s' * (cheapest.devices != 1)}{price}{split}; give more"
        )


def decided(one: Result, other: Result, figure: Callable[[Result], Sequence[float]]) -> bool:
    """Whether one is ahead of the other in every seed, and by more than what counts as equal on average."""
    mine, theirs = figure(one), figure(other)
    always = all(a > b for a, b in zip(mine, theirs, strict=True))
    return always and statistics.fmean(mine) > (1 + EQUAL) * statistics.fmean(theirs)


def _levels(able: Sequence[Candidate]) -> list[float]:
    """Prices, those that are nearly equal as one."""
    levels: list[float] = []
    least = 0.0
    for money in sorted(one.money for one in able):
        if not levels or money > least * (1 + EQUAL):
            levels.append(money)
            least = money
        else:
            levels[-1] = money
    return levels


def _least_of(able: Sequence[Candidate], architecture: str) -> list[Candidate]:
    """The cheapest of an architecture."""
    mine = [one for one in able if one.architecture == architecture]
    least = min((one.money for one in mine), default=0.0)
    return [one for one in mine if one.money <= least * (1 + EQUAL)]


def _kept(ordered: Sequence[Candidate], count: int) -> list[Candidate]:
    """The first, and the first of each architecture."""
    firsts = {one.architecture: one for one in reversed(ordered)}
    best = list(firsts.values())
    others = [one for one in ordered if one not in best]
    chosen = {*best, *others[: max(count - len(best), 0)]}
    return [one for one in ordered if one in chosen]
