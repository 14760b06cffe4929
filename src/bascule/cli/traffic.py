"""`bascule traffic`: what traffic is like, from a file or a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bascule.cli import servers
from bascule.cli.admin_api import NotAnswered, ask
from bascule.cli.report import JsonTarget, write_json
from bascule.errors import ConfigError
from bascule.observe.decisions import KEPT
from bascule.traffic.profile import Spread, TrafficProfile, profile_of
from bascule.traffic.synthetic import read_traffic
from bascule.traffic.traces import TraceRequest, listed_requests, scaled

_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def traffic(
    source: str,
    /,
    *,
    ttft: float | None = None,
    tpot: float | None = None,
    speed: float = 1.0,
    json: JsonTarget = None,
) -> None:
    """Profile traffic: lengths, arrivals, burstiness, requests at once, reuse of prefixes, conversations.

    A file is a trace (Mooncake JSON lines or Azure CSV), the decision log of a server (`serve --decision-log`), or what
    --json has written. A URL is that of a running Bascule, whose latest requests are taken. What --json writes also
    makes traffic of the same kind: `bascule bench load --trace` takes it.

    Example: bascule traffic trace.jsonl --ttft 0.5 --tpot 0.03 --json traffic.json

    Parameters
    ----------
    source
        File, or address of a server (http://...).
    ttft
        Seconds to a request's first token, to know how many run at once where the source does not say.
    tpot
        Seconds for each further token; goes with --ttft.
    speed
        Take the traffic so many times as fast.
    json
        File to write the profile to, `-` for standard output.
    """
    if (ttft is None) != (tpot is None):
        raise ConfigError("--ttft and --tpot go together: a request takes TTFT and TPOT times its further tokens")
    for name, value in (("ttft", ttft), ("tpot", tpot)):
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"--{name}: {value:g} is not possible; give seconds from 0 on")
    is_server = source.startswith(("http://", "https://"))
    trace = scaled(_latest(source) if is_server else read_traffic(Path(source)), speed)
    profile = profile_of(trace, (ttft, tpot) if ttft is not None and tpot is not None else None)
    if json != "-":
        _show(Console(), source, profile)
    write_json(msgspec.to_builtins(profile), json)


def _latest(url: str) -> list[TraceRequest]:
    """The latest requests of a running server, by its API's or its admin API's address."""
    url = url.rstrip("/")
    url = next((server.admin_url for server in servers.running() if server.url == url), url)
    listed = f"{url}/admin/decisions?limit={KEPT}"
    try:
        found = ask(listed, lambda answer: isinstance(answer["decisions"], list), given_as="this, serve's admin API,")
    except NotAnswered as error:
        raise ConfigError(str(error)) from error
    requests = listed_requests(found["decisions"])
    if not requests:
        raise ConfigError(f"{url} has not completed any requests yet; there is nothing to profile")
    return requests


def _show(console: Console, source: str, profile: TrafficProfile) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    _row(table, "prompt tokens", profile.prompt_tokens, 0)
    _row(table, "output tokens", profile.output_tokens, 0)
    if profile.concurrency is not None:
        _row(table, "requests at once", profile.concurrency, 1)
    if profile.sessions is not None:
        _row(table, "turns of a conversation", profile.sessions.turns, 1)
        if profile.sessions.pause_s is not None:
            _row(table, "seconds between turns", profile.sessions.pause_s, 1)
    arrived = profile.arrivals
    _say(console, f"{source}: {profile.requests} requests in {arrived.duration_s:.0f} s, {arrived.rate:.3g} a second\n")
    console.print(table)
    console.print()
    for line in _lines(profile):
        _say(console, line)


def _lines(profile: TrafficProfile) -> list[str]:
    arrived, lines = profile.arrivals, []
    if arrived.gap_cv is not None:
        windows = ", ".join(f"{value:.2f} in {window} s" for window, value in arrived.dispersion.items())
        dispersed = f"; index of dispersion {windows}" if windows else ""
        lines.append(f"burstiness: gaps vary by {arrived.gap_cv:.2f} of their mean{dispersed} (1 is Poisson)")
    if profile.concurrency is None:
        lines.append("requests at once: not told here; give --ttft and --tpot")
    else:
        lines.append(f"requests at once follow from {profile.service_s:.2f} s for a request, on average")
    if profile.reuse is None:
        lines.append("prefix reuse: not told here, as blocks of prompts are not named")
    else:
        reuse = profile.reuse
        near = ", ".join(f"{100 * share:.1f} % within {limit} s" for limit, share in reuse.by_distance.items())
        lines.append(f"prefix reuse: {100 * reuse.share:.1f} % of prompt tokens were in an earlier prompt: {near}")
        lines.append(f"  a cache that keeps everything would hold {reuse.distinct_tokens:,} tokens")
    if profile.cached_share is not None:
        lines.append(f"the server's caches had {100 * profile.cached_share:.1f} % of prompt tokens")
    if profile.sessions is not None:
        how = "as the requests say" if profile.sessions.told else "guessed from prompts that begin with earlier ones"
        lines.append(f"conversations: {profile.sessions.count}, {how}")
    return lines


def _row(table: Table, name: str, spread: Spread, digits: int) -> None:
    values: dict[str, Any] = msgspec.structs.asdict(spread)
    table.add_row(name, *(f"{values[column]:,.{digits}f}" for column in _COLUMNS))


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
