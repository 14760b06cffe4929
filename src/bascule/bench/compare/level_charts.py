"""Charts over levels: a line with its band for each architecture; and tokens of a user against tokens of a core."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from msgspec import Struct

from bascule.bench.charts import BLUE, GREEN, INK, MUTED, ORANGE, RED, empty, line, nice, text, ticks

WIDTH, HEIGHT = 470, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 16, 58, 40
COLOURS = (BLUE, ORANGE, GREEN, "#8a4f9e", RED, "#b08d2f", "#5f7f8c", "#a0527a")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4")


class Point(Struct, frozen=True):
    """A level's figure with its interval."""

    level: int
    middle: float
    lo: float
    hi: float


class _Scale(Struct, frozen=True):
    """From a value to a place on the picture; `log` steps by factors."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    def __call__(self, value: float) -> float:
        """Values beyond the ends lie on them."""
        first, last = (math.log(self.first), math.log(self.last)) if self.log else (self.first, self.last)
        value = min(max(value, self.first), self.last)
        share = ((math.log(value) if self.log else value) - first) / (last - first)
        return self.low + (self.high - self.low) * share


def over_levels(
    title: str, unit: str, series: Mapping[str, Sequence[Point]], colours: Mapping[str, str], *, log: bool = False
) -> str:
    """Medians as lines, intervals as bands; levels by powers of two. `log`: the figure by powers too, for latencies."""
    points = [point for found in series.values() for point in found if point.middle > 0 or not log]
    if not points:
        return empty(title, WIDTH)
    x = _levels_scale([point.level for point in points])
    if log:
        least, most = min(point.middle for point in points), max(point.middle for point in points)
        y = _Scale(least / 1.6, most * 1.6, HEIGHT - _BOTTOM, _TOP, True)
    else:
        # A band may be far wider than what there is to see.
        most = max(max(point.middle for point in points), 1e-9)
        y = _Scale(0.0, nice(min(max(point.hi for point in points), 1.5 * most) or 1e-9), HEIGHT - _BOTTOM, _TOP, False)
    drawn = []
    for number, (name, found) in enumerate(series.items()):
        seen = [point for point in found if point.middle > 0 or not log]
        edge = [(x(one.level), y(one.hi)) for one in seen] + [(x(one.level), y(one.lo)) for one in reversed(seen)]
        path, band = _path([(x(one.level), y(one.middle)) for one in seen]), _path(edge)
        dashes = f' stroke-dasharray="{_DASHES[number % len(_DASHES)]}"' if number % len(_DASHES) else ""
        drawn.append(f'<polygon points="{band}" fill="{colours[name]}" opacity="0.13"/>')
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"{dashes}/>')
        drawn += [_dot(x(one.level), y(one.middle), colours[name]) for one in seen]
    levels = sorted({point.level for point in points})
    across = [(x(level), str(level)) for level in levels]
    return _picture(title, unit, "clients", across, _heights(y), {name: colours[name] for name in series}, drawn)


def users_and_cores(
    title: str, points: Sequence[tuple[str, int, float, float, bool]], colours: Mapping[str, str]
) -> str:
    """Name, level, tokens/s of a user and of a core, and whether no other point beats it in both."""
    if not points:
        return empty(title, WIDTH)
    x = _Scale(0.0, nice(max(point[2] for point in points)), _LEFT, WIDTH - _RIGHT, False)
    y = _Scale(0.0, nice(max(point[3] for point in points)), HEIGHT - _BOTTOM, _TOP, False)
    front = sorted((one[2], one[3]) for one in points if one[4])
    drawn = [
        f'<polyline points="{_path([(x(user), y(core)) for user, core in front])}" fill="none" stroke="{MUTED}" '
        'stroke-dasharray="4 4"/>'
    ]
    for name, level, user, core, is_front in points:
        drawn.append(_dot(x(user), y(core), colours[name], 5 if is_front else 3.2, 1.0 if is_front else 0.6))
        if is_front:
            drawn.append(text(x(user) + 7, y(core) - 6, str(level), "start", colours[name]))
    across = [(x(value), f"{value:g}") for value in ticks(0, x.last, 5)]
    shown = {name: colours[name] for name in dict.fromkeys(point[0] for point in points)}
    return _picture(
        title, "output tokens/s of a core", "tokens/s of a user (1 / TPOT)", across, _heights(y), shown, drawn
    )


def _picture(
    title: str,
    y_name: str,
    x_name: str,
    across: Sequence[tuple[float, str]],
    heights: Sequence[tuple[float, str]],
    shown: Mapping[str, str],
    drawn: Sequence[str],
) -> str:
    parts = [f'<text x="{_LEFT}" y="15" font-size="14" font-weight="600">{escape(title)}</text>']
    told = float(_LEFT)
    for name, colour in shown.items():
        parts.append(f'<rect x="{told:.1f}" y="24" width="10" height="10" rx="2" fill="{colour}"/>')
        parts.append(text(told + 14, 33, name, "start"))
        told += 24 + 6.3 * len(name)
    parts.append(text(_LEFT, _TOP - 7, y_name, "start", MUTED))
    for place, words in heights:
        parts += [line(_LEFT, place, WIDTH - _RIGHT, place), text(_LEFT - 6, place + 4, words, "end")]
    parts += [text(place, HEIGHT - _BOTTOM + 16, words, "middle") for place, words in across]
    parts.append(text(WIDTH - _RIGHT, HEIGHT - 7, x_name, "end", MUTED))
    axis = line(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM, INK)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-size="11.5" fill="{INK}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}{''.join(drawn)}{axis}</svg>"
    )


def _levels_scale(levels: Sequence[int]) -> _Scale:
    first, last = min(levels), max(levels)
    if first == last:
        first, last = first / 2, last * 2  # type: ignore[assignment]
    return _Scale(first, last, _LEFT + 12, WIDTH - _RIGHT - 12, True)


def _heights(y: _Scale) -> list[tuple[float, str]]:
    if not y.log:
        return [(y(value), f"{value:g}") for value in ticks(0, y.last, 5)]
    decades = range(math.floor(math.log10(y.first)), math.ceil(math.log10(y.last)) + 1)
    values = [step * 10.0**power for power in decades for step in (1, 2, 5)]
    return [(y(value), f"{value:g}") for value in values if y.first <= value <= y.last]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _dot(x: float, y: float, colour: str, radius: float = 3.0, opacity: float = 1.0) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}" opacity="{opacity:g}"/>'
