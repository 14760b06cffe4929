"""What `bascule bench load` shows: how the run goes while it goes, and a table at its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from bascule.bench.load import Record, Watch
from bascule.bench.load_page import slo_words
from bascule.bench.quantiles import quantile
from bascule.types import Slo

_REFRESH = 4
_LATEST = 1000
_NAMES = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("end to end", "e2e_s"))
_SPREAD = ("mean", "p50", "p90", "p99", "max")


class Progress(Watch):
    """A few lines on a terminal that change as requests end; nothing elsewhere."""

    def __init__(self, console: Console, total: int | None) -> None:
        self._total = total
        self._sent = 0
        self._completed = self._failed = self._rejected = self._tokens = 0
        self._latest: deque[tuple[float, float, float]] = deque(maxlen=_LATEST)
        """TTFT, TPOT and longest gap; of a few only, as the client has better to do than to sort."""
        self._begin = time.perf_counter()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=_REFRESH, transient=True)
        self._shown = console.is_terminal

    def __enter__(self) -> Progress:
        self._begin = time.perf_counter()
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._live.stop()

    def sent(self) -> None:
        self._sent += 1

    def ended(self, record: Record) -> None:
        if not record.error:
            self._completed += 1
            self._tokens += record.tokens
            self._latest.append((record.ttft, record.tpot, record.gap))
        elif record.rejected:
            self._rejected += 1
        else:
            self._failed += 1

    def _render(self) -> RenderableType:
        took = max(time.perf_counter() - self._begin, 1e-9)
        ended = self._completed + self._failed + self._rejected
        of = f" of {self._total}" if self._total is not None else ""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_row(
            f"{took:.0f} s",
            f"{ended}{of} ended, {max(0, self._sent - ended)} under way, {self._rejected} rejected, "
            f"{self._failed} errors, {self._tokens / took:.0f} tokens/s",
        )
        for name, values in zip(("TTFT", "TPOT", "longest gap"), zip(*self._latest, strict=True), strict=False):
            shares = "  ".join(f"p{100 * share:g} {_ms(quantile(values, share))}" for share in (0.5, 0.9, 0.99))
            table.add_row(name, f"{shares}  (ms)")
        return table


def show(console: Console, report: Mapping[str, Any], settings: Mapping[str, str], told: Sequence[str]) -> None:
    """The figures for a person."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("ms")
    for name in _SPREAD:
        table.add_column(name, justify="right")
    for name, key in _NAMES:
        table.add_row(name, *(_ms(report[key][each]) for each in _SPREAD))
    _say(console, f"{settings['url']}, {settings['workload']}, {settings['load']}\n")
    console.print(table)
    bounds = slo_words(Slo(**report["slo"]))
    for line in (
        f"\n{report['requests']} requests in {report['wall_s']:.1f} s: {report['completed']} completed, "
        f"{report['rejected']} rejected (429), {report['errors']} errors",
        f"{report['requests_per_s']:.3g} requests/s, {report['output_tokens_per_s']:.4g} output tokens/s, "
        f"{report['input_tokens_per_s']:.4g} prompt tokens/s "
        f"({report['cached_tokens']} of {report['prompt_tokens']} prompt tokens cached)",
        f"goodput {report['goodput_per_s']:.3g} requests/s, {100 * (report['slo_met'] or 0):.1f} % of all: {bounds}",
        "tokens counted by "
        + (", ".join(f"{way} ({count})" for way, count in report["tokens_counted_by"].items()) or "nothing"),
        *(f"error, {one['count']} times: {one['message']}" for one in report["error_messages"]),
        *(f"rejected, {one['count']} times: {one['message']}" for one in report["rejection_messages"]),
        *(f"note: {sentence}" for sentence in told),
    ):
        _say(console, line)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:,.0f}"
