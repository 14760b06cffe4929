"""What `bascule bench compare` shows: how far it is and how much time is left; in the end the verdict with tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from bascule.bench.compare.figures import METRICS, Compared
from bascule.bench.compare.turns import Hearer
from bascule.bench.compare.verdict import crossover_words
from bascule.bench.load import Record
from bascule.cli.screen import print_whole

_REFRESH = 2
_MARKS = {"undecided": "undecided", "equal": "equal", "none": "none met the SLO"}


class Progress(Hearer):
    """A line that changes on a terminal; a line for each turn elsewhere."""

    def __init__(self, console: Console, minutes: float) -> None:
        self._console = console
        self._end = time.monotonic() + 60 * minutes
        self._words, self._requests, self._ended = "", 0, 0
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=_REFRESH, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def says(self, words: str) -> None:
        self._console.print(words, highlight=False, markup=False, soft_wrap=True)

    def turn(self, words: str, requests: int) -> None:
        self._words, self._requests, self._ended = words, requests, 0
        if not self._console.is_terminal:
            self.says(f"{self._left()}: {words}")

    def ended(self, record: Record) -> None:
        self._ended += 1

    def _left(self) -> str:
        seconds = max(0, round(self._end - time.monotonic()))
        return f"{seconds // 60}:{seconds % 60:02} left"

    def _render(self) -> RenderableType:
        of = f", {self._ended} of {self._requests} requests" if self._requests else ""
        return f"{self._left()}: {self._words}{of}"


def show(console: Console, compared: Compared, made: Mapping[str, Any]) -> None:
    """The verdict, the crossovers, who is ahead, and each architecture's figures."""
    _say(console, f"{made['workload']} on {made['model']}, {made['hardware']['words']}\n")
    if made["stopped"]:
        _say(console, f"ended early: {made['stopped']}\n")
    for sentence in (made["verdict"], *made["further"]):
        _say(console, sentence)
    for crossed in made["crossovers"]:
        _say(console, f"crossover, {crossover_words(crossed, compared.levels)}")
    print_whole(_ahead(compared, made), console.file)
    print_whole(_cells(made), console.file)
    for note in made["notes"]:
        _say(console, f"note: {note}")
    _say(console, f"took {made['took_s'] / 60:.1f} minutes")


def _ahead(compared: Compared, made: Mapping[str, Any]) -> Table:
    table = Table(title="who is ahead, by clients", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", *map(str, compared.levels)):
        table.add_column(name)
    found = {(one["metric"], one["concurrency"]): one for one in made["winners"]}
    for metric in METRICS:
        row = (found[metric.key, level] for level in compared.levels)
        table.add_row(metric.name, *(_MARKS.get(one["outcome"], one["best"]) for one in row))
    return table


def _cells(made: Mapping[str, Any]) -> Table:
    table = Table(title="medians over the seeds", title_justify="left", box=box.SIMPLE_HEAD)
    names = ("clients", "architecture", "seeds", "goodput/s", "tok/s", "TTFT p50", "p99 s", "TPOT ms", "gap p99 ms")
    for name in (*names, "429", "errors"):
        table.add_column(name, justify="left" if name == "architecture" else "right", no_wrap=True)
    for cell in made["cells"]:
        table.add_row(
            str(cell["concurrency"]),
            cell["architecture"],
            str(cell["seeds"]),
            _middle(cell["goodput_per_s"]),
            _middle(cell["output_tokens_per_s"]),
            _middle(cell["ttft_s"]["p50"]),
            _middle(cell["ttft_s"]["p99"]),
            _middle(cell["tpot_s"]["mean"], 1000),
            _middle(cell["itl_s"]["p99"], 1000),
            _middle(cell["rejected"]),
            _middle(cell["errors"]),
        )
    return table


def _middle(value: Mapping[str, float] | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value['median']:.3g}"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
