"""What was measured, as numbers: a cell for each architecture and level, paired ratios, who is ahead, the crossover."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

from msgspec import Struct

from bascule.bench.compare.architectures import Side
from bascule.bench.compare.paired import (
    EQUAL,
    Outcome,
    Ratio,
    Share,
    crossover,
    interval,
    mean_ratio,
    over_seeds,
    share_draws,
    share_ratio,
    standing,
    strata_ratio,
    unbeaten,
)
from bascule.bench.compare.turns import Found
from bascule.bench.load import Record, Run
from bascule.bench.load_report import load_report
from bascule.bench.quantiles import quantile
from bascule.types import Slo

_LEFT_OUT = ("slo", "tokens_counted_by")


class Metric(Struct, frozen=True):
    """One figure by which systems are compared."""

    key: str
    name: str
    unit: str
    of: Callable[[Sequence[Record]], float] | None = None
    """Of requests that both sides completed; less is better. None for a share of the run's time; more is better."""

    @property
    def more_is_better(self) -> bool:
        return self.of is None


def _gaps(records: Sequence[Record]) -> list[float]:
    return [gap for record in records for gap in record.gaps]


def _tpots(records: Sequence[Record]) -> list[float]:
    return [record.tpot for record in records if record.tokens > 1]


GOODPUT = Metric("goodput_per_s", "goodput", "requests/s within the SLO")
METRICS = (
    GOODPUT,
    Metric("output_tokens_per_s", "output", "tokens/s"),
    Metric("ttft_p50_s", "TTFT p50", "s", lambda records: quantile([record.ttft for record in records], 0.5)),
    Metric("ttft_p99_s", "TTFT p99", "s", lambda records: quantile([record.ttft for record in records], 0.99)),
    Metric("tpot_mean_s", "TPOT", "s", lambda records: statistics.fmean(_tpots(records) or [0.0])),
    Metric("gap_p99_s", "gap p99", "s", lambda records: quantile(_gaps(records), 0.99) if _gaps(records) else 0.0),
)


@dataclass(frozen=True)
class Compared:
    """One comparison's runs, from all sides. `sides` and `cores` are by system, in the order of the report."""

    found: Found
    slo: Slo
    sides: Mapping[str, Side]
    cores: Mapping[str, int | None]

    @property
    def names(self) -> list[str]:
        return list(self.sides)

    @cached_property
    def levels(self) -> list[int]:
        return self.found.levels

    def runs(self, name: str, level: int) -> list[Run]:
        """One for each seed."""
        return [self.found.runs[name, cell] for cell in self.found.cells(level)]

    def ratio(self, metric: Metric, ours: str, theirs: str, level: int) -> Ratio:
        """Of `ours` over `theirs`, by pairs of the same seed, and of the same requests for figures of requests."""
        mine, other = self.runs(ours, level), self.runs(theirs, level)
        if metric.of is None:
            return share_ratio([self._share(metric, run) for run in mine], [self._share(metric, run) for run in other])
        of, pairs = metric.of, [_both(a, b) for a, b in zip(mine, other, strict=True)]
        return mean_ratio([of(a) if a else None for a, _ in pairs], [of(b) if b else None for _, b in pairs])

    @cached_property
    def ratios(self) -> dict[tuple[str, int], dict[str, dict[str, Ratio]]]:
        """By metric and level: each system's figure over each other one's."""
        made: dict[tuple[str, int], dict[str, dict[str, Ratio]]] = {}
        for metric in METRICS:
            for level in self.levels:
                table: dict[str, dict[str, Ratio]] = {name: {} for name in self.names}
                for a, b in permutations(self.names, 2):
                    table[a][b] = table[b][a].inverse if a in table[b] else self.ratio(metric, a, b, level)
                made[metric.key, level] = table
        return made

    @cached_property
    def counted(self) -> list[int]:
        """The levels of which chance is known, as they have several seeds; all where none has."""
        return [level for level in self.levels if len(self.found.cells(level)) > 1] or self.levels

    def overall(self, ours: str, theirs: str) -> Ratio:
        """Of the goodput, averaged over the levels that count, each of which counts alike."""
        mine, other = (
            [[self._share(GOODPUT, run) for run in self.runs(name, level)] for level in self.counted]
            for name in (ours, theirs)
        )
        return strata_ratio(list(zip(mine, other, strict=True)))

    def mean_goodput(self, name: str) -> float:
        """Requests/s, averaged over the levels that count."""
        shares = ([self._share(GOODPUT, run) for run in self.runs(name, level)] for level in self.counted)
        return statistics.fmean(sum(one.count for one in level) / sum(one.over for one in level) for level in shares)

    def _share(self, metric: Metric, run: Run) -> Share:
        if metric is GOODPUT:
            return Share(sum(record.meets(self.slo) for record in run.records), run.wall_s)
        return Share(sum(record.tokens for record in run.good()), run.wall_s)

    def crossover(self, ours: str, theirs: str) -> dict[str, Any]:
        """From which level on `ours` has more goodput; levels at which neither has any say nothing."""
        levels: list[float] = []
        draws = []
        for level in self.counted:
            mine, other = ([self._share(GOODPUT, run) for run in self.runs(name, level)] for name in (ours, theirs))
            if any(share.count for share in (*mine, *other)):
                levels.append(level)
                draws.append(share_draws(mine, other))
        found = crossover(levels, draws, min((len(self.found.cells(level)) for level in self.counted), default=0))
        return {"metric": GOODPUT.key, "architecture": ours, "over": theirs, **found}

    def crossovers(self) -> list[dict[str, Any]]:
        """Of everything that splits, over replicated serving, or over what there is of whole serving."""
        whole = [name for name, side in self.sides.items() if side is Side.WHOLE]
        other = next((name for name in whole if name.startswith("replicated")), whole[0] if whole else None)
        moved = [name for name, side in self.sides.items() if side in (Side.SPLIT, Side.ADAPTIVE)]
        return [self.crossover(name, other) for name in moved] if other else []

    def winners(self) -> list[dict[str, Any]]:
        """By metric and level: who is best, and who may be as good."""
        return [self._winner(metric, level) for metric in METRICS for level in self.levels]

    def _winner(self, metric: Metric, level: int) -> dict[str, Any]:
        table = self.ratios[metric.key, level]
        if not metric.more_is_better:
            table = {a: {b: one.inverse for b, one in row.items()} for a, row in table.items()}
        # Each one's sum over its ratios to the others, so that the best is the same by value and by pairs.
        values = {name: sum(one.value for one in row.values()) for name, row in table.items()}
        best, rivals = standing(table, values)
        equal = bool(rivals) and all(table[best][name].outcome is Outcome.EQUAL for name in rivals)
        nothing = metric is GOODPUT and not any(
            run.goodput(self.slo) for name in self.names for run in self.runs(name, level)
        )
        nearest = min(table[best].values(), key=lambda one: one.lo, default=None)
        return {
            "metric": metric.key,
            "concurrency": level,
            "outcome": "none" if nothing else "wins" if not rivals else "equal" if equal else "undecided",
            "best": best,
            "rivals": rivals,
            "ratio": None if nearest is None else plain(nearest),
        }

    def pairs(self) -> Iterator[dict[str, Any]]:
        """All ratios with their intervals."""
        for (key, level), table in self.ratios.items():
            for place, ours in enumerate(self.names):
                for theirs in self.names[place + 1 :]:
                    one = table[ours][theirs]
                    pair = {"metric": key, "concurrency": level, "architecture": ours, "over": theirs}
                    yield {**pair, **plain(one), "outcome": one.outcome.value}

    def cells(self) -> list[dict[str, Any]]:
        """The keys of `bench load`, each with its median over the seeds and an interval, and what is only here."""
        made = []
        for level in self.levels:
            for name in self.names:
                runs = self.runs(name, level)
                per_seed = [self._report(run, self.cores[name]) for run in runs]
                head = {"architecture": name, "concurrency": level, "seeds": len(runs)}
                slo = {"ttft_s": self.slo.ttft_s, "tpot_s": self.slo.tpot_s, "gap_s": self.slo.gap_s}
                messages = [one for each in per_seed for one in (*each["error_messages"], *each["rejection_messages"])]
                made.append({**head, **over_seeds(per_seed, interval), "slo": slo, "messages": _joined(messages)})
        return made

    def _report(self, run: Run, cores: int | None) -> dict[str, Any]:
        report = load_report(run, self.slo)
        tpot = report["tpot_s"]["mean"]
        report["tokens_per_s_per_user"] = 1 / tpot if tpot else None
        report["output_tokens_per_s_per_core"] = report["output_tokens_per_s"] / cores if cores else None
        return {key: value for key, value in report.items() if key not in _LEFT_OUT}

    def pareto(self, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Tokens/s of a user and of a core, of each cell of known hardware, and whether no other beats it in both."""
        points = []
        for cell in cells:
            user, core = cell["tokens_per_s_per_user"], cell["output_tokens_per_s_per_core"]
            if user and core:
                point = {"architecture": cell["architecture"], "concurrency": cell["concurrency"]}
                points.append({**point, "per_user": user["median"], "per_core": core["median"]})
        fronts = unbeaten([(point["per_user"], point["per_core"]) for point in points])
        return [{**point, "unbeaten": front} for point, front in zip(points, fronts, strict=True)]


def plain(one: Ratio) -> dict[str, Any]:
    """For JSON."""
    return {"ratio": one.value, "lo": one.lo, "hi": one.hi, "seeds": one.seeds, "equal_within": EQUAL}


def _both(ours: Run, theirs: Run) -> tuple[list[Record], list[Record]]:
    """The requests that both completed, in the same order."""
    mine = {record.place: record for record in ours.good()}
    other = {record.place: record for record in theirs.good()}
    places = sorted(mine.keys() & other.keys())
    return [mine[place] for place in places], [other[place] for place in places]


def _joined(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    counts: dict[str, int] = {}
    for one in messages:
        counts[one["message"]] = counts.get(one["message"], 0) + one["count"]
    return [{"message": message, "count": count} for message, count in counts.items()]
