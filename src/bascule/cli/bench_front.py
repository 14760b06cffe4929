"""`bascule bench front`: what router and API add to a request, and how much one core of them carries."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from bascule.bench.front import FrontSettings, measure
from bascule.cli.report import write_json


def front(
    *,
    model: str = "smollm2",
    json: str | None = None,
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
        import pprint
        pprint.pprint(report)
    write_json(report, json)
