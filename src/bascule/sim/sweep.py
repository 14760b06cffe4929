"""Many simulations side by side: policies, levels or sizes, and seeds; in this process or in several."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from msgspec import Struct

from bascule.errors import ConfigError
from bascule.sim.cluster import Cluster
from bascule.sim.figures import outcome_figures
from bascule.sim.offered import speed_for, trace_talks
from bascule.sim.run import Progress, Simulation
from bascule.traffic.arrivals import Arrivals
from bascule.traffic.traces import TraceRequest, read_trace, repeated, scaled, turned
from bascule.traffic.workloads import Talk, talks

Heard = Callable[[int, int], None]
"""Told of a task, by its number, and of how many of its requests have ended."""


class Traffic(Struct, frozen=True, kw_only=True):
    """What is offered."""

    workload: str = ""
    """Of `traffic.workloads`; empty where a trace is offered."""
    trace: Path | None = None
    requests: int = 0
    """0 for a trace as long as it is."""
    load: float | None = None
    speed: float = 1.0
    """Of a trace, where no load is given."""


class Task(Struct, frozen=True, kw_only=True):
    """One simulation. `level` is a number of clients, or `r` and a rate; empty for a trace."""

    architecture: str
    cluster: Cluster
    traffic: Traffic
    level: str
    seed: int

    @property
    def workers(self) -> int:
        return sum(pool.count for pool in self.cluster.pools)


class Level(Struct, frozen=True):
    """How a workload is offered."""

    clients: int | None
    rate: float | None


def level_of(text: str) -> Level:
    """`16` is sixteen clients in a closed loop, `r2.5` are 2.5 requests/s; raises ConfigError."""
    try:
        if text.startswith("r"):
            return Level(None, Arrivals(float(text[1:])).rate)
        clients = int(text)
    except ValueError:
        raise ConfigError(f"level {text!r} is neither a number of clients nor r and a rate, such as r2.5") from None
    if clients < 1:
        raise ConfigError(f"level {text!r}: a closed loop has at least one client")
    return Level(clients, None)


def simulate(task: Task, progress: Progress | None = None) -> dict[str, Any]:
    """One simulation's figures, and what it cost to make them."""
    began, cpu = time.perf_counter(), time.process_time()
    level = level_of(task.level) if task.level else Level(None, None)
    offered = trace_of(task) if task.traffic.trace is not None else None
    rate = level.rate
    asked: Iterator[Talk]
    if offered is not None:
        asked = trace_talks(offered, task.cluster.block_tokens)
        rate = len(offered) / offered[-1].at if offered[-1].at else None
    else:
        asked = iter(talks(task.traffic.workload, task.traffic.requests, task.seed, level.rate))
    outcome = Simulation(task.cluster).offer(asked, level.clients, progress)
    if outcome.violations:
        raise RuntimeError(f"the books do not add up after a simulation: {outcome.violations[:3]}")
    return {
        **outcome_figures(outcome, task.cluster.slo),
        "rate_offered": rate,
        "took_s": time.perf_counter() - began,
        "took_cpu_s": time.process_time() - cpu,
    }


def simulate_all(tasks: Sequence[Task], jobs: int, heard: Heard) -> list[dict[str, Any]]:
    """The figures of each, in their order; `jobs` processes at a time."""
    if jobs < 2 or len(tasks) < 2:
        return [simulate(task, partial(heard, number)) for number, task in enumerate(tasks)]
    found: dict[int, dict[str, Any]] = {}
    deaf = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the others
    with ProcessPoolExecutor(
        min(jobs, len(tasks)), multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=deaf
    ) as pool:
        try:
            numbers = {pool.submit(simulate, task): number for number, task in enumerate(tasks)}
            for done in as_completed(numbers):
                number = numbers[done]
                found[number] = done.result()
                heard(number, found[number]["requests"])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return [found[number] for number in range(len(tasks))]


def trace_of(task: Task) -> list[TraceRequest]:
    """The trace as it is offered: as many requests as asked for, as fast as asked for.

    A seed above 1 shifts where in the trace it begins, so that seeds differ though the trace is one.
    """
    traffic = task.traffic
    assert traffic.trace is not None
    trace = read_trace(traffic.trace)
    wanted = traffic.requests or len(trace)
    if task.seed > 1:
        trace = turned(trace, Random(task.seed).randrange(len(trace)))
    trace = repeated(trace, -(-wanted // len(trace)))[:wanted]
    speed = traffic.speed if traffic.load is None else speed_for(traffic.load, trace, task.cluster)
    return scaled(trace, speed)
