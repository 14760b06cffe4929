"""What router and API cost: added latency, streamed tokens and requests per second, and CPU seconds for each of them.

The server has one core for itself; workers and client share another. The workers compute nothing, so what is left is
the front: HTTP, JSON, tokenising, placement, messages, detokenising, events.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
import uvloop

from bascule.bench.cores import pinned
from bascule.bench.front_client import Counts, Target, first_token_seconds, stream_many
from bascule.errors import BasculeError, ConfigError

_START_S = 60.0
_STOP_S = 10.0


class FrontFailed(BasculeError):
    """The server or a worker did not come up."""


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """What is measured, and how often."""

    model: str
    runs: int
    latency_requests: int
    """Requests of a run at concurrency 1."""
    seconds: float
    """Of each of a run's two loads."""
    concurrency: int
    stream_tokens: int
    """Output tokens of a request where tokens are counted."""
    request_tokens: int
    """Output tokens of a request where requests are counted."""
    step_s: float
    """Seconds between the worker's steps where tokens are counted: each step is a token for each stream."""
    server_core: int
    client_core: int

    def __post_init__(self) -> None:
        for name in ("runs", "latency_requests", "seconds", "concurrency", "stream_tokens", "request_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be positive")
        if self.step_s < 0:
            raise ConfigError(f"--step is {self.step_s}, but must be 0 or more seconds")
        usable = os.sched_getaffinity(0)
        for core in (self.server_core, self.client_core):
            if core not in usable:
                raise ConfigError(f"core {core} is not usable here; choose from {sorted(usable)}")


@dataclass(frozen=True)
class Latency:
    """One run at concurrency 1, in seconds."""

    p50: float
    p99: float
    cpu_per_request_s: float
    """Of the server."""


@dataclass(frozen=True)
class Load:
    """One run at concurrency."""

    counts: Counts
    server_cpu_s: float
    worker_cpu_s: float


@dataclass
class _Figures:
    """What the runs brought, in order."""

    engine: list[Latency] = field(default_factory=list)
    bare: list[Latency] = field(default_factory=list)
    streams: list[Load] = field(default_factory=list)
    requests: list[Load] = field(default_factory=list)


def measure(settings: FrontSettings) -> dict[str, object]:
    """All figures, medians over the runs; raises FrontFailed where the server does not start, BadAnswer."""
    kept = _Figures()
    with (
        pinned(settings.client_core),
        _cluster(settings, _engine_command(settings.model, settings.client_core)) as engine,
        _cluster(settings, _source_command(settings.model, settings.step_s)) as paced,
        _cluster(settings, _source_command(settings.model, 0.0)) as bare,
    ):
        for figures in (_Figures(), *[kept] * settings.runs):  # the first run warms up
            figures.engine.append(engine.latency(settings))
            figures.bare.append(bare.latency(settings))
            figures.streams.append(paced.load(settings, settings.stream_tokens))
            figures.requests.append(bare.load(settings, settings.request_tokens))
    return _report(settings, kept)


@dataclass(frozen=True)
class _Cluster:
    """A router with its API, and one worker."""

    target: Target
    server: psutil.Process
    worker: psutil.Process

    def latency(self, settings: FrontSettings) -> Latency:
        """Requests of one token, so that no later step competes with the first token's way out."""
        cpu = _cpu_seconds(self.server)
        seconds = first_token_seconds(self.target, settings.latency_requests, 1)
        cpu = _cpu_seconds(self.server) - cpu
        seconds.sort()
        return Latency(median(seconds), seconds[int(0.99 * len(seconds))], cpu / len(seconds))

    def load(self, settings: FrontSettings, max_tokens: int) -> Load:
        """As many streams at once as the settings say."""
        server, worker = _cpu_seconds(self.server), _cpu_seconds(self.worker)
        counts = uvloop.run(stream_many(self.target, settings.concurrency, max_tokens, settings.seconds))
        return Load(counts, _cpu_seconds(self.server) - server, _cpu_seconds(self.worker) - worker)


def _report(settings: FrontSettings, figures: _Figures) -> dict[str, object]:
    streams, requests = figures.streams, figures.requests
    return {
        "model": settings.model,
        "runs": settings.runs,
        "concurrency": settings.concurrency,
        "added_ttft_s": _latency(figures.engine),
        "added_ttft_without_engine_s": _latency(figures.bare),
        "stream_tokens_per_s": median(load.counts.tokens / load.counts.wall_s for load in streams),
        "stream_tokens_per_chunk": median(load.counts.tokens / load.counts.chunks for load in streams),
        "stream_cpu_s_per_token": median(load.server_cpu_s / load.counts.tokens for load in streams),
        "stream_cpu_shares": _shares(streams),
        "stream_step_s": settings.step_s,
        "stream_tokens_per_request": settings.stream_tokens,
        "requests_per_s": median(load.counts.requests / load.counts.wall_s for load in requests),
        "request_cpu_s": median(load.server_cpu_s / load.counts.requests for load in requests),
        "request_cpu_shares": _shares(requests),
        "request_tokens": settings.request_tokens,
    }


def _latency(runs: list[Latency]) -> dict[str, float]:
    """Seconds."""
    return {
        "p50": median(run.p50 for run in runs),
        "p99": median(run.p99 for run in runs),
        "server_cpu": median(run.cpu_per_request_s for run in runs),
    }


def _shares(loads: Sequence[Load]) -> dict[str, float]:
    """CPU seconds per wall second: 1 is a whole core. The server's bound is its own core; the others share one."""
    return {
        "server": median(load.server_cpu_s / load.counts.wall_s for load in loads),
        "worker": median(load.worker_cpu_s / load.counts.wall_s for load in loads),
        "client": median(load.counts.cpu_s / load.counts.wall_s for load in loads),
    }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _engine_command(model: str, core: int) -> list[str]:
    """A worker with the mock engine, whose steps take no time but their own Python's.

    It has about as many blocks as a real model has in 1 GiB; the mock's own are so small that there would be millions.
    """
    place = ["--id", "mock", "--device", f"cpu:{core}"]
    return [sys.executable, "-m", "bascule", "worker", model, *place, "--engine", "mock", "--kv-memory", "2MiB"]


def _source_command(model: str, step_s: float) -> list[str]:
    return [sys.executable, "-m", "bascule.bench.token_source", model, "--step", str(step_s)]


@contextlib.contextmanager
def _cluster(settings: FrontSettings, worker: list[str]) -> Iterator[_Cluster]:
    """A router on the server's core and a worker on the client's, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="bascule-bench-") as folder, contextlib.ExitStack() as stack:
        bind, ready = f"tcp://127.0.0.1:{_free_port()}", Path(folder, "ready")
        router = [sys.executable, "-m", "bascule", "router", settings.model, "--bind", bind, "--port", "0"]
        router += ["--policy", "replicated", "--ready-file", str(ready), "--log-level", "error"]
        router += ["--no-check-reach"]  # a source takes no messages from peers
        server = stack.enter_context(_process(router, settings.server_core, Path(folder, "router")))
        source = stack.enter_context(_process([*worker, "--join", bind], settings.client_core, Path(folder, "worker")))
        content = _wait_ready(ready, {"router": server, "worker": source}, Path(folder))
        host, port = str(content["url"]).removeprefix("http://").rsplit(":", 1)
        yield _Cluster(
            Target(host, int(port), str(content["model"])), psutil.Process(server.pid), psutil.Process(source.pid)
        )


@contextlib.contextmanager
def _process(command: list[str], core: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child on one core: it inherits ours, so that all its threads have it from the start."""
    with log.open("wb") as output, pinned(core):
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_ready(ready: Path, children: dict[str, subprocess.Popen[bytes]], logs: Path) -> dict[str, object]:
    deadline = time.monotonic() + _START_S
    while not ready.exists():
        for name, child in children.items():
            if child.poll() is not None or time.monotonic() > deadline:
                said = Path(logs, name).read_text(errors="replace")[-2000:]
                raise FrontFailed(f"the {name} did not start (exit code {child.poll()}); it said: {said}")
        time.sleep(0.05)
    content: dict[str, object] = json.loads(ready.read_text())
    return content


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
