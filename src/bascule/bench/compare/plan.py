"""How the minutes are spent: levels, requests of a run, seeds; from a short first measurement of each system."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from bascule.bench.load import RAMP_S

SEEDS = 5
"""Wanted where nobody says; with fewer, intervals grow fast."""
MOST_SEEDS = 12
_FEWEST_SEEDS = 3
_TURN_S = 0.5
"""Waking a system up and putting it to rest."""
_DECK = 10
"""Workloads deal their kinds of requests in tens: with whole tens all runs have the same mix."""
_SIZES = ((4.0, 40), (3.0, 30), (2.0, 20), (2.0, 10), (1.5, 10))
"""Requests for each client, and at the least, in the order in which they are wanted."""
_SMALL, _TINY = (1.0, 10), (1.0, 5)
_FEWER = 3
"""Runs of `_TINY` size only where so many ways of leaving levels out have been looked at."""
_GAIN = 1.05


class Pace(Struct, frozen=True):
    """What the first measurement says of a system."""

    alone_s: float
    """A request takes, alone."""
    crowd_rate: float
    """Requests/s with several at once."""


class Plan(Struct, frozen=True):
    """What is to be measured."""

    levels: tuple[int, ...]
    left_out: tuple[int, ...]
    """Levels for which there is no time."""
    requests: dict[int, int]
    """Of one run, by level."""
    seeds: int
    """That there is time for, as far as known."""
    size: tuple[float, int] = (1.0, 1)
    """Requests of a client, and of a run at the least."""
    turns: int = 1
    """Requests that a client has at the least, whatever the size: those of a conversation."""

    def of(self, level: int) -> int:
        """Requests of a run at a level, planned or left out."""
        return max(self.turns * level, _requests(level, *self.size))

    def widened(self, level: int) -> Plan:
        """With a level that was left out."""
        left = tuple(other for other in self.left_out if other != level)
        requests = dict(sorted({**self.requests, level: self.of(level)}.items()))
        return replace(self, levels=tuple(requests), left_out=left, requests=requests)


def seconds(level: int, requests: int, paces: Mapping[str, Pace]) -> float:
    """That a level takes with one seed, all systems."""
    total = 0.0
    for pace in paces.values():
        rate = min(level / pace.alone_s, max(pace.crowd_rate, 1 / pace.alone_s))
        total += requests / rate + pace.alone_s + _TURN_S + RAMP_S * (level - 1) / level
    return total


def plan(
    levels: Sequence[int],
    seeds: int | None,
    budget_s: float,
    paces: Mapping[str, Pace],
    turns: int = 1,
    asked: int | None = None,
) -> Plan:
    """The best of all plans that fit into so many seconds; the least of all where none does.

    A client has at least `turns` requests: those of a conversation. Where runs of `asked` requests are wanted, all
    levels are kept, and the time decides how many seeds there are.
    """
    if asked is not None:
        size = (1.0, asked)
        made = Plan(tuple(levels), (), {}, seeds or SEEDS, size, turns)
        return replace(made, requests={level: made.of(level) for level in levels})
    made = Plan((), (), {}, 0)
    for kept, size, rounds in _plans(levels, seeds):
        left_out = tuple(level for level in levels if level not in kept)
        made = Plan(kept, left_out, {}, rounds, size, turns)
        made = replace(made, requests={level: made.of(level) for level in kept})
        if rounds * sum(seconds(level, count, paces) for level, count in made.requests.items()) <= budget_s:
            break
    return made


def _plans(levels: Sequence[int], seeds: int | None) -> Iterator[tuple[tuple[int, ...], tuple[float, int], int]]:
    """Levels, size of the runs and seeds, the best first."""
    for left, kept in enumerate(_fewer(levels)):
        if seeds is not None:
            for size in (*_SIZES, _SMALL, _TINY):
                yield kept, size, seeds
            continue
        for rounds in (SEEDS, SEEDS - 1):
            for size in _SIZES:
                yield kept, size, rounds
        for rounds in (SEEDS - 1, _FEWEST_SEEDS):
            yield kept, _SMALL, rounds
        if left >= _FEWER - 1:
            yield kept, _TINY, _FEWEST_SEEDS
    if seeds is None:
        yield tuple(_fewer(levels))[-1], _TINY, _FEWEST_SEEDS - 1


def _fewer(levels: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All levels; without the last; every other one; the first and a middle one."""
    told: list[tuple[int, ...]] = []
    for kept in (levels, levels[:-1], levels[::2], levels[: -1 : max(1, len(levels) // 2)]):
        if kept and tuple(kept) not in told:
            told.append(tuple(kept))
    yield from told


def _requests(level: int, per_client: float, least: int) -> int:
    wanted = max(least, math.ceil(per_client * level))
    return wanted if least % _DECK else _DECK * math.ceil(wanted / _DECK)


def hopeless(met: Sequence[Mapping[str, int]], tokens_per_s: Sequence[Mapping[str, float]]) -> bool:
    """Whether higher levels than the last one need no look, from the first seed's runs at the levels so far.

    That is so where no system kept the SLO for any request, though one did at some lower level; where none ever did,
    when two levels more have brought no more output.
    """
    if len(met) < 2 or any(met[-1].values()):
        return False
    if any(count for level in met for count in level.values()):
        return True
    best = [max(level.values()) for level in tokens_per_s]
    return len(best) > 2 and max(best[-2:]) < _GAIN * max(best[:-2])
