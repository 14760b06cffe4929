"""A picture of how decisions grow: one panel over workers, one over blocks, both axes logarithmic, as SVG or a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bascule.bench.charts import INK, MUTED, line

_WIDTH, _HEIGHT = 940, 430
_PANEL_WIDTH, _PANEL_HEIGHT, _TOP = 350, 260, 80
_TARGET_S = 0.0005
_COLOURS = ("#2a6f97", "#e07a3f", "#3a8f5d", "#8a4f9e", "#b5384d", "#6b705c")


def growth_plot(cells: Sequence[dict[str, Any]], *, html: bool) -> str:
    """Draw the cells of `bench.router.growth`: medians as lines, 99th percentiles as thin broken ones."""
    times = [cell["decision_s"][which] for cell in cells for which in ("p50", "p99")]
    low, high = _decades_around([*times, _TARGET_S])
    panels = [
        _panel(cells, "workers", "blocks", 70, low, high),
        _panel(cells, "blocks", "workers", 520, low, high),
    ]
    heading = (
        f'<text x="70" y="34" font-size="18" font-weight="600">A routing decision, in milliseconds</text>'
        f'<text x="70" y="55" fill="{MUTED}">median (solid) and 99th percentile (broken), '
        f"prompts of {cells[0]['prompt_blocks']} blocks</text>"
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>{heading}{"".join(panels)}</svg>\n'
    )
    if not html:
        return svg
    head = '<meta charset="utf-8"><title>bascule bench router</title>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{svg}</body></html>\n'


def _panel(cells: Sequence[dict[str, Any]], over: str, each: str, left: int, low: float, high: float) -> str:
    """One panel: decision time over `over`, a pair of lines for each value of `each`."""
    first, last = _decades_around([cell[over] for cell in cells])

    def x(value: float) -> float:
        return left + _PANEL_WIDTH * math.log10(value / first) / math.log10(last / first)

    def y(seconds: float) -> float:
        return _TOP + _PANEL_HEIGHT * (1 - math.log10(seconds / low) / math.log10(high / low))

    bottom = _TOP + _PANEL_HEIGHT
    drawn = []
    for value in _ticks(first, last):
        drawn.append(line(x(value), _TOP, x(value), bottom))
        drawn.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:,.0f}</text>')
    for value in _ticks(low, high):
        drawn.append(line(left, y(value), left + _PANEL_WIDTH, y(value)))
        drawn.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{1000 * value:g}</text>')
    drawn.append(line(left, y(_TARGET_S), left + _PANEL_WIDTH, y(_TARGET_S), INK, "2 3"))
    drawn.append(f'<text x="{left + 4}" y="{y(_TARGET_S) - 5:.1f}" font-size="11">target of the median</text>')
    drawn.append(f'<text x="{left + _PANEL_WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">{over}</text>')
    for number, value in enumerate(sorted({cell[each] for cell in cells})):
        colour = _COLOURS[number % len(_COLOURS)]
        mine = sorted((cell for cell in cells if cell[each] == value), key=lambda cell: float(cell[over]))
        for which, style in (("p50", 'stroke-width="2.2"'), ("p99", 'stroke-width="1.2" stroke-dasharray="5 4"')):
            points = " ".join(f"{x(cell[over]):.1f},{y(cell['decision_s'][which]):.1f}" for cell in mine)
            drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
        drawn += [
            f'<circle cx="{x(cell[over]):.1f}" cy="{y(cell["decision_s"]["p50"]):.1f}" r="3" fill="{colour}"/>'
            for cell in mine
        ]
        drawn.append(
            f'<text x="{left + 6 + number * 88}" y="{bottom + 58}" fill="{colour}" font-weight="600">'
            f"{value:,} {each}</text>"
        )
    return "".join(drawn)


def _decades_around(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten that enclose all values, and are not equal."""
    low = math.floor(math.log10(min(values)))
    return 10.0**low, 10.0 ** max(math.ceil(math.log10(max(values))), low + 1)


def _ticks(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]
