"""`bascule simulate`: what a cluster would do with this traffic, by the same policies and scheduler in virtual time."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bascule.cli.report import JsonTarget, write_json
from bascule.cli.worker import Flat
from bascule.config import RoutingConfig, SloConfig, parse_size
from bascule.errors import ConfigError
from bascule.policies.load import UNMEASURED
from bascule.sim.classes import Classes
from bascule.sim.cluster import Cluster, Death
from bascule.sim.sweep import Task, Traffic, level_of, simulate_all, trace_of
from bascule.sim.tiers import TierPlan
from bascule.sim.verdict import cells_of, crossover, verdict
from bascule.traffic.traces import read_trace
from bascule.traffic.workloads import WORKLOADS
from bascule.types import Tier

_LINK, _LOCAL_LINK = "12.5GB", "4GB"
"""Where neither flags nor a hardware file say anything."""


def simulate(
    *,
    cost_model: Path | None = None,
    hardware: Path | None = None,
    pool: tuple[str, ...] = (),
    policies: str = "replicated,disaggregated,adaptive",
    workers: str = "2",
    prefill: float = 0.5,
    workload: str = "mixed",
    trace: Path | None = None,
    levels: str = "1,4,8,16,32",
    requests: int = 0,
    load: float | None = None,
    speed: float = 1.0,
    seeds: int = 3,
    kv_memory: str = "1GiB",
    kv_token_bytes: int = 23_040,
    kv_host: str | None = None,
    kv_remote: str | None = None,
    block_size: int | None = None,
    chunk_tokens: int = 512,
    max_sequences: int = 64,
    slo: Annotated[SloConfig, Flat] = SloConfig(),
    admission: Literal["queue", "slo"] = RoutingConfig.admission,
    queue_limit: int = RoutingConfig.queue_limit,
    machine_workers: int = 8,
    link: str | None = None,
    local_link: str | None = None,
    fail: tuple[str, ...] = (),
    jobs: int | None = None,
    json: JsonTarget = None,
) -> None:
    """Simulate serving: the live router, policies, scheduler, block allocator and prefix index, on virtual time.

    Example: bascule simulate --cost-model core.json --levels 1,8,32,r2 --json figures.json

    Example: bascule simulate --hardware hw.json --pool prefill=1xcpu-2 --pool decode=2xcpu-1 --policies disaggregated

    Example: bascule simulate --cost-model h100.json --trace conversation.jsonl --workers 10,100 --load 0.7

    Parameters
    ----------
    cost_model
        JSON file that says what steps take, as for `serve --engine mock`; of every worker that --pool does not name.
    hardware
        Hardware file of `bascule profile` and `probe`: classes of workers, the first for every worker that --pool does
        not name, and how fast links are.
    pool
        Workers of one role and class, ROLE=COUNTxCLASS, such as prefill=4xh100.json, or the name of a class of
        --hardware; all policies get these. May be repeated.
    policies
        Routing policies to compare, with commas between.
    workers
        How many workers; several numbers with commas between simulate clusters of each size.
    prefill
        Share of the workers that only prefill, under disaggregated and thresholds.
    workload
        One of chat, summarise, mixed, shared-prefix, multi-turn; unless there is a trace.
    trace
        Recorded traffic: Mooncake JSONL, Azure CSV, or a decision log of `serve`.
    levels
        How a workload is offered: numbers of clients in a closed loop, or r and a rate (requests/s).
    requests
        Requests of each simulation (default: three for each client, at least 16; a trace as long as it is). A trace is
        repeated, with other blocks each time. With several sizes of cluster, those of the largest.
    load
        Speed up or slow down the trace until its work is this share of what the workers can do.
    speed
        Speed up the trace by this factor.
    seeds
        Simulations of each kind, with other requests, or another beginning of the trace.
    kv_memory
        Memory for KV blocks in each worker.
    kv_token_bytes
        Bytes of KV of one token.
    kv_host
        Memory of each machine in which blocks outlive their eviction.
    kv_remote
        The same in a store that all machines share.
    block_size
        Tokens in a KV block (default: 16, or what the trace names).
    chunk_tokens
        Most prompt tokens in a step.
    max_sequences
        Most sequences that a worker runs at once.
    admission
        queue or slo, as for `serve`.
    queue_limit
        Requests that may wait for a worker; more are refused.
    machine_workers
        Workers on one machine, which share its link to the others.
    link
        Bytes per second from machine to machine, each way (default: what --hardware says, else 12.5GB).
    local_link
        Bytes per second within a machine (default: what --hardware says, else 4GB).
    fail
        WORKER@SECONDS: that worker dies then. May be repeated.
    jobs
        Simulations at the same time (default: as many as cores).
    json
        File to write the figures to, `-` for standard output.
    """
    _check(trace, workload, load, requests, seeds)
    classes = Classes(
        cost_model,
        hardware,
        kv_bytes=parse_size(kv_memory, "kv-memory"),
        kv_token_bytes=kv_token_bytes,
        chunk_tokens=chunk_tokens,
        max_sequences=max_sequences,
    )
    given = classes.pools(pool)
    sizes = [sum(one.count for one in given)] if given else _sizes(workers)
    block_tokens = block_size or (16 if trace is None else _trace_block(trace))
    tasks: list[Task] = []
    for size in sizes:
        for policy in policies.split(","):
            pools = given or classes.default(policy, size, prefill)
            cluster = Cluster(
                policy=policy,
                pools=pools,
                slo=slo.slo,
                admission=admission,
                queue_limit=queue_limit,
                block_tokens=block_tokens,
                kv_token_bytes=classes.kv_token_bytes,
                machine_workers=machine_workers,
                link_bytes_per_s=_rate(link, "link", classes.rate(same_machine=False), _LINK),
                local_bytes_per_s=_rate(local_link, "local-link", classes.rate(same_machine=True), _LOCAL_LINK),
                tiers=_tiers(kv_host, kv_remote),
                deaths=tuple(_death(text) for text in fail),
            )
            for level in levels.split(",") if trace is None else [""]:
                traffic = Traffic(
                    workload="" if trace is not None else workload,
                    trace=trace,
                    requests=_count(requests, level, size, max(sizes), trace),
                    load=load,
                    speed=speed,
                )
                tasks += [
                    Task(architecture=policy, cluster=cluster, traffic=traffic, level=level, seed=seed)
                    for seed in range(1, seeds + 1)
                ]
    found = _run(tasks, jobs or os.cpu_count() or 1)
    cells = cells_of(tasks, found, classes.prices)
    report = {
        "workload": str(trace) if trace is not None else workload,
        "hardware": {"simulated": True, "workers": sizes, "classes": classes.described()},
        "cells": cells,
        "crossover": crossover(tasks, found) if len(sizes) == 1 else None,
        "verdict": verdict(cells),
    }
    if json != "-":
        _show(report)
    write_json(report, json)


def _check(trace: Path | None, workload: str, load: float | None, requests: int, seeds: int) -> None:
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; at least one simulation is needed")
    if requests < 0:
        raise ConfigError(f"--requests is {requests}; give 0 for the default, or more")
    if trace is None and workload not in WORKLOADS:
        raise ConfigError(f"workload {workload!r} is not known; there are {', '.join(WORKLOADS)}")
    if trace is None and load is not None:
        raise ConfigError("--load needs a --trace; the rate of a workload is its level, such as --levels r2")


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--workers {text!r} is not a number of workers, nor several with commas between")
    return [int(part) for part in parts]


def _trace_block(trace: Path) -> int:
    first = read_trace(trace)[0]
    return first.block_tokens if first.hash_ids else 16


def _rate(given: str | None, key: str, measured: float | None, default: str) -> float:
    """Bytes per second: as given, else as measured."""
    return measured if given is None and measured is not None else parse_size(given or default, key)


def _death(text: str) -> Death:
    worker, _, at = text.partition("@")
    try:
        return Death(float(at), worker)
    except ValueError:
        raise ConfigError(f"--fail {text!r} is not WORKER@SECONDS, such as decode-0@12.5") from None


def _tiers(host: str | None, remote: str | None) -> tuple[TierPlan, ...]:
    given = ((Tier.HOST, host), (Tier.REMOTE, remote))
    return tuple(
        TierPlan(tier=tier, capacity_bytes=parse_size(size, f"kv-{tier}"), cost=UNMEASURED[tier])
        for tier, size in given
        if size is not None
    )


def _count(requests: int, level: str, size: int, largest: int, trace: Path | None) -> int:
    """Requests of one simulation."""
    if trace is not None:
        return -(-requests * size // largest)
    if requests:
        return requests
    clients = level_of(level).clients
    return max(16, 3 * clients) if clients is not None else 32


def _run(tasks: list[Task], jobs: int) -> list[dict[str, Any]]:
    """With a bar of requests, or of simulations where several run at once."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        ended = [0] * len(tasks)
        shown = bar.add_task("requests", total=sum(_expected(task) for task in tasks))

        def heard(number: int, count: int) -> None:
            ended[number] = count
            bar.update(shown, completed=sum(ended))

        return simulate_all(tasks, jobs, heard)


def _expected(task: Task) -> int:
    return task.traffic.requests or (len(trace_of(task)) if task.traffic.trace is not None else 0)


def _show(report: dict[str, Any]) -> None:
    """A row a cell; columns that say nothing are left out."""
    cells = report["cells"]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "workers": lambda cell: f"{cell['workers']:,}",
        "policy": lambda cell: cell["architecture"],
        "level": lambda cell: f"{cell['concurrency']}" if "concurrency" in cell else f"{cell['rate'] or 0:.3g}/s",
        "TTFT p50": lambda cell: _middle(cell["ttft_s"]["p50"], ".3f"),
        "p90 s": lambda cell: _middle(cell["ttft_s"]["p90"], ".3f"),
        "TPOT ms": lambda cell: _middle(cell["tpot_s"]["mean"], ".1f", 1000),
        "gap p99 s": lambda cell: _middle(cell["itl_s"]["p99"], ".3f"),
        "tok/s": lambda cell: _middle(cell["output_tokens_per_s"], ",.0f"),
        "goodput/s": lambda cell: _middle(cell["goodput_per_s"], ".3g"),
        "cost/M": lambda cell: _middle(cell.get("cost_per_million_output_tokens"), ".3g"),
        "refused": lambda cell: _middle(cell["rejected"], ".0f"),
        "errors": lambda cell: _middle(cell["errors"], ".0f"),
        "busy": lambda cell: "/".join(_middle(share, ".2f") for share in cell["busy"].values()),
    }
    found = {name: [read(cell) for cell in cells] for name, read in columns.items()}
    kept = {name: values for name, values in found.items() if set(values) - {"-", "0"}}
    table = Table(title=f"{report['workload']}, simulated; medians", title_justify="left", box=box.SIMPLE_HEAD)
    for name in kept:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*kept.values(), strict=True):
        table.add_row(*row)
    console = Console()
    console = Console(width=max(console.width, 140))
    console.print(table)
    crossed = report["crossover"]
    if crossed is not None:
        console.print(f"disaggregated has the goodput of replicated, or more, from {crossed['value']:g} on")
    console.print(report["verdict"])
    served_s, took_s, cpu_s = (
        sum(cell[name]["median"] * cell["seeds"] for cell in cells) for name in ("wall_s", "took_s", "took_cpu_s")
    )
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**10
    console.print(
        f"{served_s:,.0f} s of serving, simulated in {took_s:.1f} s ({cpu_s:.1f} s of processor time), with at most "
        f"{peak:.0f} MiB in a process"
    )


def _middle(value: dict[str, float] | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(factor * value["median"], form)
