"""`bascule bench load`: offers load to any OpenAI-compatible server, and says what its clients saw."""

from __future__ import annotations

import asyncio
import resource
import signal
from typing import Annotated

import uvloop
from cyclopts import Parameter
from rich.console import Console

from bascule.bench.endpoint import Endpoint, find
from bascule.bench.load import Offer, Run
from bascule.bench.load_page import load_page
from bascule.bench.load_report import doubts, load_report
from bascule.cli.bench_load_requests import Requests
from bascule.cli.bench_load_view import Progress, show
from bascule.cli.report import JsonTarget, write_json, write_text
from bascule.config import SloConfig
from bascule.errors import BasculeError, ConfigError

_WARM_UP_CLIENTS = 4


class NothingCompleted(BasculeError):
    """No request of the run came to its end."""


def load(
    url: str,
    /,
    *,
    requests: Annotated[Requests | None, Parameter(name="*")] = None,
    model: str | None = None,
    api_key: Annotated[str | None, Parameter(env_var="OPENAI_API_KEY")] = None,
    insecure: Annotated[bool, Parameter(negative=())] = False,
    timeout: float = 300.0,
    slo: Annotated[SloConfig | None, Parameter(name="*")] = None,
    json: JsonTarget = None,
    html: str | None = None,
) -> None:
    """Offer load to an OpenAI-compatible server (Bascule, vLLM, SGLang, ...) and measure what its clients see.

    Closed loop: --concurrency clients, each with its next request as soon as the last one has ended. Open loop:
    requests come by themselves, at --rate or as in --trace, and their times count from when they were to be sent,
    however busy server and client are. Ctrl-C ends the run and prints what was measured until then. The exit code is
    1 if no request was completed.

    Example: bascule bench load http://127.0.0.1:8000 --workload mixed --rate 2 --duration 60 --html load.html

    Parameters
    ----------
    url
        The server, with or without `/v1`.
    model
        Which of the server's models (default: the only one).
    api_key
        Sent as a bearer token.
    insecure
        Accept any TLS certificate.
    timeout
        Seconds until a request without an end is an error.
    json
        File to write the figures to, `-` for standard output.
    html
        File to write a report to: one page that needs nothing else.
    """
    asked = requests or Requests()
    asked.ready()
    if not timeout > 0:
        raise ConfigError(f"--timeout: {timeout:g} is no time to wait; give seconds above 0")
    bounds = (slo or SloConfig()).slo
    _many_files()
    endpoint, run = uvloop.run(_measure(url, model, api_key, not insecure, timeout, asked))
    report = load_report(run, bounds)
    told = list(doubts(run, text_prompts=not endpoint.ids))
    settings = {
        "url": endpoint.url,
        "model": endpoint.model,
        "workload": asked.name,
        "load": asked.words,
        "seed": str(asked.seed),
    }
    if json != "-":
        show(Console(), report, settings, told)
    offered = {"concurrency": asked.concurrency, "rate": asked.rate, "seed": asked.seed}
    write_json({**settings, **offered, **report, "doubts": told}, json)
    if html is not None:
        write_text(load_page(run, bounds, report, settings, told), html)
    if not run.good():
        first = next((record.error for record in run.records if record.error), "the run was stopped before")
        raise NothingCompleted(f"no request was completed; the first said: {first}")


async def _measure(
    url: str, model: str | None, api_key: str | None, verify: bool, timeout: float, asked: Requests
) -> tuple[Endpoint, Run]:
    stop = asyncio.Event()
    endpoint = await find(url, model, api_key, verify=verify, vocabulary=asked.token_ids)
    console = Console(stderr=True)
    console.print(
        f"{endpoint.url}, model {endpoint.model}, {asked.name}: {asked.words}", highlight=False, soft_wrap=True
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _stopped, stop)
    if asked.warm_up:
        clients = min(_WARM_UP_CLIENTS, asked.warm_up)
        warming = Offer(endpoint, concurrency=clients, timeout_s=timeout, stop=stop)
        before = await warming.run(asked.warm_up_talks())
        if wrong := [record.error for record in before.records if record.error]:
            console.print(f"{len(wrong)} requests of the warm-up failed, the first with: {wrong[0]}", markup=False)
    with Progress(console, asked.total) as progress:
        offer = Offer(
            endpoint,
            concurrency=asked.concurrency,
            timeout_s=timeout,
            duration_s=asked.duration_s,
            stop=stop,
            watch=progress,
        )
        return endpoint, await offer.run(asked.talks())


def _stopped(stop: asyncio.Event) -> None:
    """The first Ctrl-C ends the run, a second one the program."""
    stop.set()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


def _many_files() -> None:
    """As many connections at once as this user may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
