"""Which requests `bascule bench load` offers, and when: its flags, checked, and the talks that they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from bascule.errors import ConfigError
from bascule.traffic.arrivals import Arrivals
from bascule.traffic.prompts import trace_talks, vocabulary_of
from bascule.traffic.synthetic import read_traffic
from bascule.traffic.traces import TraceRequest, scaled
from bascule.traffic.workloads import VOCABULARY, Talk, all_talks

_REQUESTS = 100
_OTHER_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Raises ConfigError for flags that do not go together, or cannot be."""

    workload: str | None = None
    """`chat`, `summarise`, `mixed` (the default), `shared-prefix` or `multi-turn`."""
    trace: Path | None = None
    """File with requests instead: Mooncake JSON lines, Azure CSV, a decision log, or a profile of `bascule traffic`."""
    concurrency: int | None = None
    """Clients of a closed loop."""
    rate: float | None = None
    """Requests/s of an open loop."""
    burstiness: float | None = None
    """Coefficient of variation of the gaps between requests: 1 (the default) is Poisson, above it they cluster."""
    bursts: str | None = None
    """`ON:OFF`, seconds with and without requests in turns; --rate is the mean over both."""
    requests: int | None = None
    """How many at most (default: 100 of a workload without --duration, all of a trace)."""
    duration: float | None = None
    """Seconds after which no request begins."""
    speed: float | None = None
    """Replay the trace so many times as fast."""
    seed: int = 1
    """Equal seeds give equal requests at equal times."""
    warm_up: int = 4
    """Requests before the run, which count nowhere."""
    vocabulary: str = f"{VOCABULARY.start}:{VOCABULARY.stop}"
    """`LOW:HIGH`, the token ids that prompts are made of."""

    def __post_init__(self) -> None:
        for wrong, told in (
            (
                self.concurrency is not None and self.rate is not None,
                "--concurrency is a closed loop and --rate an open one; give one of them",
            ),
            (
                self.trace is not None and self.rate is not None,
                "a trace has times of its own; give --speed instead of --rate",
            ),
            (
                self.trace is not None and self.workload is not None,
                "--trace stands in the place of --workload; give one of them",
            ),
            (
                self.trace is None and self.concurrency is None and self.rate is None,
                "say how requests are to come: --concurrency N, --rate R or --trace FILE",
            ),
            (self.trace is None and self.speed is not None, "--speed goes with --trace only"),
            (self.rate is None and self.burstiness is not None, "--burstiness goes with --rate only"),
            (self.rate is None and self.bursts is not None, "--bursts goes with --rate only"),
        ):
            if wrong:
                raise ConfigError(told)
        for name, value, least in (
            ("concurrency", self.concurrency, 1),
            ("requests", self.requests, 1),
            ("warm-up", self.warm_up, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name}: {value} is too few; give at least {least}")
        if self.duration is not None and not self.duration > 0:
            raise ConfigError(f"--duration: {self.duration:g} is no time to measure in; give seconds above 0")

    def ready(self) -> None:
        """Read and check all that the flags name; raises ConfigError."""
        _ = self.token_ids, self.arrivals, self.recorded
        all_talks(self.workload or "mixed", self.seed)

    @cached_property
    def token_ids(self) -> range:
        return vocabulary_of(self.vocabulary)

    @cached_property
    def arrivals(self) -> Arrivals | None:
        """None where the rate is not given."""
        if self.rate is None:
            return None
        on, off = 1.0, 0.0
        if self.bursts is not None:
            try:
                on, off = (float(part) for part in self.bursts.split(":"))
            except ValueError as error:
                raise ConfigError(
                    f"--bursts: {self.bursts!r} is not ON:OFF in seconds; write for example 10:20"
                ) from error
        return Arrivals(self.rate, 1.0 if self.burstiness is None else self.burstiness, on, off)

    @cached_property
    def recorded(self) -> list[TraceRequest] | None:
        """The trace's requests, none where there is no trace."""
        if self.trace is None:
            return None
        return scaled(read_traffic(self.trace, self.requests, self.seed), 1.0 if self.speed is None else self.speed)

    @property
    def duration_s(self) -> float:
        return math.inf if self.duration is None else self.duration

    @property
    def total(self) -> int | None:
        """Requests to come, where that is known."""
        if self.recorded is not None:
            return len(self.recorded)
        return _REQUESTS if self.requests is None and self.duration is None else self.requests

    def talks(self) -> Iterator[Talk]:
        """What is offered, one by one."""
        if self.recorded is not None:
            return trace_talks(self.recorded, self.seed, self.token_ids)
        coming = all_talks(self.workload or "mixed", self.seed, self.arrivals, self.token_ids)
        return coming if self.total is None else _first(coming, self.total)

    def warm_up_talks(self) -> Iterator[Talk]:
        """Of the same kind, with other tokens, so that no cache is warmed for the run."""
        seed = self.seed + _OTHER_SEED
        if self.recorded is not None:
            return trace_talks(islice(self.recorded, self.warm_up), seed, self.token_ids)
        return _first(all_talks(self.workload or "mixed", seed, None, self.token_ids), self.warm_up)

    @property
    def name(self) -> str:
        return str(self.trace) if self.trace is not None else self.workload or "mixed"

    @property
    def words(self) -> str:
        """How they come, for a person."""
        if self.concurrency is not None:
            return f"closed loop, {self.concurrency} client{'s' if self.concurrency > 1 else ''}"
        if self.arrivals is None:
            return f"open loop, at the trace's times{f', {self.speed:g} times as fast' if self.speed else ''}"
        bursts = f", {self.bursts} s on and off" if self.bursts else ""
        return f"open loop, {self.arrivals.rate:g} requests/s, burstiness {self.arrivals.burstiness:g}{bursts}"


def _first(coming: Iterable[Talk], requests: int) -> Iterator[Talk]:
    """Talks until so many requests are in them; the last one is cut where it would go beyond."""
    for talk in coming:
        asks = talk.asks[:requests]
        requests -= len(asks)
        yield replace(talk, asks=asks)
        if requests <= 0:
            return
