"""What processes hold while they run: memory and open files, fitted so that a slow leak shows."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

MB = 1e6
_SAMPLE_S = 1.0
_BINS = 120
"""Of the time that is judged."""
MOST_MB_PER_MIN = 1.0
_MOST_FILES = 4
"""More open files at the least moment of the last third than at that of the first: clients and peers come and go, but a
leak has one for each fault or request."""


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    rss: int
    """Bytes of resident memory, shared ones included."""
    files: int


@dataclass(frozen=True)
class Trend:
    """What became of one process's footprint behind its warm-up."""

    process: str
    minutes: float
    first_mb: float
    last_mb: float
    mb_per_min: float
    first_files: int
    """The least in the first third."""
    last_files: int
    """The least in the last third."""

    @property
    def faults(self) -> list[str]:
        """Why this is no steady process; empty if it is."""
        found = []
        if self.mb_per_min >= MOST_MB_PER_MIN:
            found.append(f"{self.process} grows by {self.mb_per_min:.2f} MB a minute")
        if self.last_files > self.first_files + _MOST_FILES:
            found.append(f"{self.process} has {self.last_files} open files, and had {self.first_files}")
        return found


def footprint_of(process: psutil.Process) -> Footprint:
    """Raises psutil.Error for one that is gone."""
    return Footprint(process.memory_info().rss, process.num_fds())


class Footprints:
    """Samples of all processes, from their first sight on."""

    def __init__(self, look: Callable[[], Mapping[str, Footprint]]) -> None:
        """`look` gives what each process holds now, by a name that no other process ever has."""
        self._look = look
        self._samples: dict[str, list[tuple[float, Footprint]]] = defaultdict(list)

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            now = time.monotonic()
            for name, footprint in (await asyncio.to_thread(self._look)).items():
                self._samples[name].append((now, footprint))
            await asyncio.sleep(_SAMPLE_S)

    def trends(self, warm_up_s: float, least_s: float) -> list[Trend]:
        """Of the processes that have lived for `least_s` behind their first `warm_up_s` seconds."""
        found = (trend_of(name, samples, warm_up_s, least_s) for name, samples in self._samples.items())
        return [trend for trend in found if trend is not None]


def trend_of(name: str, samples: Iterable[tuple[float, Footprint]], warm_up_s: float, least_s: float) -> Trend | None:
    """Of samples by their time (s), the first `warm_up_s` left out; None if what is left covers less than `least_s`.

    The fit is the median slope between any two bins of time, each the least of its samples: neither peaks nor a single
    step count, only what goes on.
    """
    samples = list(samples)
    judged = [(at, footprint) for at, footprint in samples if at - samples[0][0] >= warm_up_s]
    if not judged or judged[-1][0] - judged[0][0] < least_s:
        return None
    width = (judged[-1][0] - judged[0][0]) / _BINS
    bins: dict[int, list[Footprint]] = defaultdict(list)
    for at, footprint in judged:
        bins[int((at - judged[0][0]) / width)].append(footprint)
    minutes = np.array([number * width / 60 for number in bins])
    memory = np.array([min(one.rss for one in held) / MB for held in bins.values()])
    files = [min(one.files for one in held) for held in bins.values()]
    third = -(-len(files) // 3)
    return Trend(
        process=name,
        minutes=float(minutes[-1] - minutes[0]),
        first_mb=float(memory[0]),
        last_mb=float(memory[-1]),
        mb_per_min=_median_slope(minutes, memory),
        first_files=min(files[:third]),
        last_files=min(files[-third:]),
    )


def _median_slope(at: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Between any two points."""
    earlier, later = np.triu_indices(len(at), 1)
    return float(np.median((values[later] - values[earlier]) / (at[later] - at[earlier])))


def table(trends: Iterable[Trend]) -> str:
    """Markdown."""
    lines = ["| process | judged over | memory | slope | open files |", "|---|---|---|---|---|"]
    for one in sorted(trends, key=lambda trend: trend.process):
        memory = f"{one.first_mb:.1f} to {one.last_mb:.1f} MB"
        lines.append(
            f"| {one.process} | {one.minutes:.0f} min | {memory} | {one.mb_per_min:+.3f} MB/min "
            f"| {one.first_files} to {one.last_files} |"
        )
    return "\n".join(lines)
