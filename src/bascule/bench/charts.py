"""Small charts as SVG: a histogram with its percentiles, points over time, lines over time, a bar of shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from bascule.bench.quantiles import quantile

INK, FAINT, MUTED, GROUND = "#22303c", "#d9dfe4", "#5b6b78", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2a6f97", "#e07a3f", "#3a8f5d", "#b5384d"
WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 34, 42
_BINS = 48


@dataclass(frozen=True)
class Axes:
    """A frame from (0, 0) or (`first`, 0) to (`last`, `top`), `width` pixels wide."""

    title: str
    x_name: str
    y_name: str
    first: float
    last: float
    top: float
    width: int = WIDTH

    def x(self, value: float) -> float:
        return _LEFT + (self.width - _LEFT - _RIGHT) * (value - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - value / self.top)

    def around(self, drawn: str) -> str:
        """The whole picture."""
        bottom = HEIGHT - _BOTTOM
        parts = [f'<text x="{_LEFT}" y="16" font-size="14" font-weight="600">{escape(self.title)}</text>']
        for value in ticks(0, self.top, 4):
            parts.append(line(_LEFT, self.y(value), self.width - _RIGHT, self.y(value)))
            parts.append(text(_LEFT - 6, self.y(value) + 4, f"{value:g}", "end"))
        for value in ticks(self.first, self.last, 6):
            parts.append(text(self.x(value), bottom + 16, f"{value:g}", "middle"))
        parts.append(text(self.width - _RIGHT, bottom + 33, self.x_name, "end", MUTED))
        parts.append(text(_LEFT, _TOP - 6, self.y_name, "start", MUTED))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {HEIGHT}" width="{self.width}" '
            f'height="{HEIGHT}" font-size="11" fill="{INK}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(parts)}{drawn}{line(_LEFT, bottom, self.width - _RIGHT, bottom, INK)}</svg>"
        )


def histogram(title: str, x_name: str, values: Sequence[float], bound: float = math.inf) -> str:
    """Share of the values in each of equal bins up to the 99.5th percentile; those beyond are in the last one.

    Percentiles are marked, and the bound where it lies within the picture.
    """
    if not values:
        return empty(title)
    last = nice(max(quantile(values, 0.995), 1e-9))
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, max(0, int(_BINS * value / last)))] += 1
    shares = [100 * count / len(values) for count in counts]
    axes = Axes(title, x_name, "% of all", 0.0, last, nice(max(shares)))
    width = last / _BINS
    drawn = [
        f'<rect x="{axes.x(number * width):.1f}" y="{axes.y(share):.1f}" fill="{BLUE}" opacity="0.75" '
        f'width="{axes.x(width) - axes.x(0) - 0.6:.2f}" height="{axes.y(0) - axes.y(share):.1f}"/>'
        for number, share in enumerate(shares)
        if share
    ]
    marks = [(f"p{100 * share:g}", quantile(values, share), INK) for share in (0.5, 0.9, 0.99)]
    if bound <= last:
        marks.append(("SLO", bound, RED))
    labels = []
    for number, (name, value, colour) in enumerate(marks):
        x = axes.x(min(value, last))
        drawn.append(line(x, _TOP, x, axes.y(0), colour, "3 3"))
        side, anchor = (3, "start") if x < 0.8 * WIDTH else (-3, "end")
        labels.append(text(x + side, _TOP + 10 + 12 * number, f"{name} {value:.3g}", anchor, colour))
    return axes.around("".join(drawn + labels))


def scatter(title: str, y_name: str, series: Mapping[str, tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Points over time, for each name a colour and (seconds, value); across the page."""
    points = [point for _, found in series.values() for point in found]
    if not points:
        return empty(title, 2 * WIDTH)
    last, top = nice(max(max(x for x, _ in points), 1e-9)), nice(max(max(y for _, y in points), 1e-9))
    axes = Axes(title, "s since the start", y_name, 0.0, last, top, 2 * WIDTH)
    drawn = [
        f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.2" fill="{colour}" opacity="0.6"/>'
        for colour, found in series.values()
        for x, y in found
    ]
    return axes.around(
        "".join(drawn) + legend(axes, {name: colour for name, (colour, found) in series.items() if found})
    )


def lines(title: str, y_name: str, series: Mapping[str, tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines over time, for each name a colour and (seconds, value); across the page."""
    points = [point for _, found in series.values() for point in found]
    if not points:
        return empty(title, 2 * WIDTH)
    last, top = nice(max(max(x for x, _ in points), 1e-9)), nice(max(max(y for _, y in points), 1e-9))
    axes = Axes(title, "s since the start", y_name, 0.0, last, top, 2 * WIDTH)
    drawn = []
    for colour, found in series.values():
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in found)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return axes.around("".join(drawn) + legend(axes, {name: colour for name, (colour, _) in series.items()}))


def shares_bar(title: str, parts: Mapping[str, tuple[str, int]]) -> str:
    """One bar across the page, cut by counts; for each name its colour and count."""
    total = sum(count for _, count in parts.values())
    if not total:
        return empty(title, 2 * WIDTH)
    width, x = 2 * WIDTH - _LEFT - _RIGHT, float(_LEFT)
    drawn, told = [], float(_LEFT)
    for name, (colour, count) in parts.items():
        if not count:
            continue
        drawn.append(
            f'<rect x="{x:.1f}" y="30" width="{width * count / total:.1f}" height="26" fill="{colour}"/>'
            f'<rect x="{told:.1f}" y="68" width="10" height="10" fill="{colour}"/>'
        )
        label = f"{name}: {count} ({100 * count / total:.1f} %)"
        drawn.append(text(told + 14, 77, label, "start"))
        x, told = x + width * count / total, told + 30 + 6.2 * len(label)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} 90" width="{2 * WIDTH}" height="90" '
        f'font-size="11" fill="{INK}" role="img" aria-label="{escape(title)}">'
        f'<text x="{_LEFT}" y="16" font-size="14" font-weight="600">{escape(title)}</text>{"".join(drawn)}</svg>'
    )


def empty(title: str, width: int = WIDTH) -> str:
    """Where there is nothing to draw."""
    return Axes(title, "", "", 0.0, 1.0, 1.0, width).around(
        text(width / 2, HEIGHT / 2, "nothing was measured", "middle")
    )


def legend(axes: Axes, colours: Mapping[str, str]) -> str:
    drawn, x = [], float(axes.width - _RIGHT)
    for name, colour in reversed(list(colours.items())):
        x -= 24 + 6.2 * len(name)
        drawn.append(f'<rect x="{x:.1f}" y="8" width="10" height="10" fill="{colour}"/>')
        drawn.append(text(x + 14, 17, name, "start"))
    return "".join(drawn)


def line(x1: float, y1: float, x2: float, y2: float, colour: str = FAINT, dashes: str = "") -> str:
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{style}/>'


def text(x: float, y: float, words: str, anchor: str, colour: str = INK) -> str:
    halo = f'paint-order="stroke" stroke="{GROUND}" stroke-width="3"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {halo}>{escape(words)}</text>'


def nice(value: float) -> float:
    """The least of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten that is not below `value` (above 0)."""
    scale = 10.0 ** math.floor(math.log10(value))
    return next((step * scale for step in (1, 1.5, 2, 3, 4, 5, 6, 8) if step * scale >= value * (1 - 1e-9)), 10 * scale)


def ticks(first: float, last: float, about: int) -> list[float]:
    """Round values from `first` to `last`, about so many."""
    step = nice((last - first) / about)
    return [round(first + number * step, 12) for number in range(int((last - first) / step + 1e-9) + 1)]
