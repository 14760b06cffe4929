"""`bascule bench front`: what router and API add to a request, and how much one core of them carries."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from bascule.bench.front import FrontSettings, measure
from bascule.cli.report import JsonTarget, write_json


def front(
    *,
    model: str = "smollm2",
    json: JsonTarget = None,
    runs: int = 5,
    latency_requests: int = 200,
    seconds: float = 1.5,
    concurrency: int = 64,
    stream_tokens: int = 256,
    request_tokens: int = 8,
    step: float = 0.0008,
    server_core: int | None = None,
    client_core: int | None = None,
) -> None:
    """Measure the router and API in front of workers that compute nothing.

    The server has one core, workers and client another. The figures are medians over the runs; CPU seconds are the
    server's own and hardly depend on what else the machine does.

    Example: bascule bench front --json front.json

    Parameters
    ----------
    model
        Whose tokenizer to use: `smollm2`, a directory in Hugging Face format, a GGUF file or a hub id.
    json
        File to write the figures to, `-` for standard output.
    runs
        Runs that count, after one to warm up.
    latency_requests
        Requests of a run at concurrency 1.
    seconds
        Length of each of a run's two loads.
    concurrency
        Streams at once.
    stream_tokens
        Output tokens of a request where tokens are counted.
    request_tokens
        Output tokens of a request where requests are counted.
    step
        Seconds between the worker's steps where tokens are counted; each step is a token for each stream.
    server_core
        Core of the router and API (default: the first usable one).
    client_core
        Core of the workers and the client (default: the last usable one).
    """
    cores = sorted(os.sched_getaffinity(0))
    report = measure(
        FrontSettings(
            model=model,
            runs=runs,
            latency_requests=latency_requests,
            seconds=seconds,
            concurrency=concurrency,
            stream_tokens=stream_tokens,
            request_tokens=request_tokens,
            step_s=step,
            server_core=cores[0] if server_core is None else server_core,
            client_core=cores[-1] if client_core is None else client_core,
        )
    )
    if json != "-":
        _show(report)
    write_json(report, json)


def _show(report: dict[str, Any]) -> None:
    table = Table(
        show_header=False, title=f"front, {report['model']}, medians of {report['runs']} run(s)", title_justify="left"
    )
    for name, key in (("mock engine", "added_ttft_s"), ("no engine", "added_ttft_without_engine_s")):
        p50, p99 = (f"{1000 * report[key][which]:.2f}" for which in ("p50", "p99"))
        table.add_row(f"added TTFT at concurrency 1, {name}", f"p50 {p50} ms, p99 {p99} ms")
    table.add_row(
        f"streamed tokens/s, {report['concurrency']} streams, a step each {1000 * report['stream_step_s']:g} ms",
        f"{report['stream_tokens_per_s']:,.0f}, {report['stream_tokens_per_chunk']:.2f} in a chunk, "
        f"{1e6 * report['stream_cpu_s_per_token']:.1f} µs of CPU each",
    )
    table.add_row(
        f"streamed requests/s at {report['concurrency']}, {report['request_tokens']} tokens each",
        f"{report['requests_per_s']:,.0f}, {1e6 * report['request_cpu_s']:.0f} µs of CPU each",
    )
    for name, key in (("tokens", "stream_cpu_shares"), ("requests", "request_cpu_shares")):
        shares = ", ".join(f"{who} {share:.2f}" for who, share in report[key].items())
        table.add_row(f"cores in use while counting {name}", shares)
    Console().print(table)
