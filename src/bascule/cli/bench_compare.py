"""`bascule bench compare`: single, replicated, split and adaptive serving at equal hardware, and what pays."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import uvloop
from cyclopts import Parameter
from rich.console import Console

from bascule.bench.compare.architectures import NAMES, Architecture, Side, architectures_of
from bascule.bench.compare.document import html as as_html
from bascule.bench.compare.document import markdown as as_markdown
from bascule.bench.compare.figures import Compared
from bascule.bench.compare.report import About, blocks
from bascule.bench.compare.report import report as report_of
from bascule.bench.compare.systems import OurSystem, Stage, System
from bascule.bench.compare.turns import Comparison, Found, Traffic
from bascule.bench.endpoint import find
from bascule.bench.load_report import doubts
from bascule.cli.bench_compare_view import Progress, show
from bascule.cli.models import pull_with_progress
from bascule.cli.report import JsonTarget, check_target, write_json, write_text
from bascule.config import SloConfig, parse_size
from bascule.errors import ConfigError
from bascule.machine import memory_bytes
from bascule.models import catalog, load
from bascule.traffic.prompts import vocabulary_of
from bascule.traffic.synthetic import read_traffic
from bascule.traffic.workloads import VOCABULARY, WORKLOADS
from bascule.worker.profile import cpu_name

_LEAST_MINUTES = 0.1


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What every architecture gets, all of it and no more."""

    cores: int | None = None
    """Processor cores (default: all that may be used)."""
    kv_memory: str = "2GiB"
    """Memory for KV blocks, dealt out evenly to an architecture's workers."""
    side_by_side: bool | None = None
    """Keep all systems in memory and stop those that wait, or start them in turns (default: as memory allows)."""

    def __post_init__(self) -> None:
        parse_size(self.kv_memory, "kv-memory")
        usable = len(os.sched_getaffinity(0))
        if self.cores is not None and not 1 <= self.cores <= usable:
            raise ConfigError(f"--cores {self.cores}: from 1 to {usable} may be used here")

    @property
    def core_list(self) -> list[int]:
        return sorted(os.sched_getaffinity(0))[: self.cores]

    @property
    def kv_bytes(self) -> int:
        return parse_size(self.kv_memory, "kv-memory")


@dataclass(frozen=True, kw_only=True)
class Servers:
    """What the systems are, beside their architecture."""

    engine: Literal["torch", "mock"] = "torch"
    """What computes in our workers: torch, or a mock that takes the time that a cost model says."""
    cost_model: Path | None = None
    """JSON file with the cost model of a mock worker, where there are several workers."""
    cost_model_whole: Path | None = None
    """Of the one mock worker that has all cores (architecture single)."""
    flags: Annotated[str, Parameter(allow_leading_hyphen=True)] = ""
    """Further flags of `serve` for all of ours, in one string: "--quantize none --no-prefix-cache"."""
    against: tuple[str, ...] = ()
    """URL of another OpenAI-compatible server with the same model; NAME=URL gives it a name. May be repeated."""
    against_cores: int | None = None
    """Cores that those servers have; without, their hardware is not known to be equal."""
    api_key: Annotated[str | None, Parameter(env_var="OPENAI_API_KEY")] = None
    """For those servers."""

    def __post_init__(self) -> None:
        if self.engine == "torch" and (self.cost_model or self.cost_model_whole):
            raise ConfigError("--cost-model goes with --engine mock only")
        if self.engine == "mock" and self.cost_model is None:
            raise ConfigError("--engine mock needs --cost-model FILE, which says what steps take")
        if self.against_cores is not None and (not self.against or self.against_cores < 1):
            raise ConfigError("--against-cores is a number of cores, and goes with --against")

    def of(self, architecture: Architecture) -> list[str]:
        """Flags of `serve`."""
        if self.engine == "torch":
            return shlex.split(self.flags)
        file = self.cost_model if architecture.workers > 1 else self.cost_model_whole
        return ["--engine", "mock", "--cost-model", str(file), *shlex.split(self.flags)]

    def choose(self, names: str | None) -> tuple[list[Architecture], str]:
        """The architectures, and what is to be said of the choice."""
        whole_known = self.engine == "torch" or self.cost_model_whole is not None
        chosen = architectures_of(names or ",".join(NAMES if whole_known else NAMES[1:]))
        if not whole_known and any(one.workers == 1 for one in chosen):
            raise ConfigError("a mock with all cores needs --cost-model-whole FILE; or leave single out")
        left_out = names is None and not whole_known
        return chosen, "single was left out: there is no --cost-model-whole" if left_out else ""


def compare(
    model: str = "smollm2",
    /,
    *,
    workload: str | None = None,
    trace: Path | None = None,
    architectures: str | None = None,
    levels: str = "1,2,4,8,16,32",
    seeds: int | None = None,
    requests: int | None = None,
    minutes: float = 30.0,
    hardware: Annotated[Hardware | None, Parameter(name="*")] = None,
    servers: Annotated[Servers | None, Parameter(name="*")] = None,
    slo: Annotated[SloConfig | None, Parameter(name="*")] = None,
    seed: int = 1,
    vocabulary: str = f"{VOCABULARY.start}:{VOCABULARY.stop}",
    json: JsonTarget = None,
    html: str | None = None,
    markdown: str | None = None,
) -> None:
    """Compare architectures at equal hardware: the same cores, KV memory, model, caching and requests.

    Starts a server for each, all on the same cores; they take turns, level by level and seed by seed, in a random order
    and with the very same requests, and stand still in between. Says who is ahead at which load, where that is
    undecided, from how many clients on splitting pays, and whether it pays here at all. Ctrl-C ends the measurement;
    what was measured until then is reported.

    Example: bascule bench compare smollm2 --workload mixed --minutes 30 --html compare.html

    Example: bascule bench compare --architectures replicated:3,2p1d,1p2d --cores 6 --against vllm=http://127.0.0.1:8001

    Parameters
    ----------
    model
        `smollm2`, a directory in Hugging Face format, a GGUF file or a hub id.
    workload
        `chat`, `summarise`, `mixed` (the default), `shared-prefix` or `multi-turn`.
    trace
        File with requests instead: Mooncake JSON lines, Azure CSV, a decision log, or a profile of `bascule traffic`.
        Their lengths and shared blocks are kept, their times are not.
    architectures
        Of `single`, `replicated`, `disaggregated`, `adaptive` and XpYd (2p1d: two prefill workers, one decode worker),
        with commas between; `replicated:3` has three workers (default: the first four).
    levels
        Clients at once, with commas between; 1 is always among them.
    seeds
        Runs of each level with other requests (default: as many as there is time for, at most 12).
    requests
        Requests of each run, at the least one for each client (default: as many as there is time for).
    minutes
        Time for everything. Runs are cut to it, and levels left out where it does not suffice.
    seed
        Another one gives other requests and another order of turns.
    vocabulary
        `LOW:HIGH`, the token ids that prompts are made of.
    json
        File to write the figures to, `-` for standard output.
    html
        File to write the report to: one page that needs nothing else.
    markdown
        File to write the report to, as Markdown.
    """
    given, ours = hardware or Hardware(), servers or Servers()
    bounds = slo or SloConfig()
    chosen, said = ours.choose(architectures)
    cores, kept = given.core_list, _slo_flags(bounds)
    flags = {one.name: [*one.flags(cores, given.kv_bytes), *kept, *ours.of(one)] for one in chosen}
    traffic = _traffic(workload, trace, seed, vocabulary)
    clients = _levels(levels)
    for name, value in (("seeds", seeds), ("requests", requests)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}, but must be at least 1")
    if not minutes >= _LEAST_MINUTES:
        raise ConfigError(f"--minutes {minutes:g} is too short to start a server in; give at least {_LEAST_MINUTES:g}")
    for target in (json, html, markdown):
        check_target(target)
    if model in catalog.CATALOG:
        pull_with_progress(model)
    load(model)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="bascule-compare-") as folder, Progress(console, minutes) as progress:
        mine = [OurSystem(one.name, cores, model, flags[one.name], Path(folder)) for one in chosen]

        async def measure() -> tuple[list[System], Found]:
            systems = [*mine, *await _others(ours, traffic.vocabulary, flags)]
            stage = Stage(systems, given.kv_bytes, given.side_by_side)
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, _stopped, stop)
            comparison = Comparison(stage, traffic, clients, seeds, minutes, bounds.slo, stop, progress, requests)
            try:
                return systems, await comparison.run()
            finally:
                progress.turn("stopping", 0)
                stage.end()

        systems, found = uvloop.run(measure())
    if said:
        found.notes.append(said)
    others = systems[len(chosen) :]
    sides = {one.name: one.side for one in chosen} | {one.name: Side.OTHER for one in others}
    compared = Compared(found, bounds.slo, sides, {one.name: one.cores for one in systems})
    commands = [_own_command(), *(f"bascule serve {shlex.join([model, *flags[one.name]])}" for one in chosen)]
    about = About(
        workload=traffic.workload,
        model=model,
        hardware=_hardware(given, ours),
        commands=commands,
        systems={one.name: f"{one.words}, policy {one.policy}" for one in chosen} | _other_words(others),
        settings=_settings(compared, traffic, seed),
        doubts=_doubts(compared, {one.name for one in others if not one.endpoint.ids}),
    )
    _write(compared, report_of(compared, about), json, html, markdown)
    if found.failure is not None:
        raise found.failure


def _write(compared: Compared, made: dict[str, Any], json: str | None, html: str | None, markdown: str | None) -> None:
    if json != "-":
        show(Console(), compared, made)
    write_json(made, json)
    if html is not None:
        write_text(as_html(f"bascule bench compare: {made['workload']}", list(blocks(compared, made))), html)
    if markdown is not None:
        write_text(as_markdown(list(blocks(compared, made))), markdown)


def _traffic(workload: str | None, trace: Path | None, seed: int, vocabulary: str) -> Traffic:
    if workload is not None and trace is not None:
        raise ConfigError("--trace stands in the place of --workload; give one of them")
    ids = vocabulary_of(vocabulary)
    if trace is not None:
        return Traffic(str(trace), tuple(read_traffic(trace)), seed, ids)
    if (workload := workload or "mixed") not in WORKLOADS:
        raise ConfigError(f"workload {workload!r} is not known; there are {', '.join(WORKLOADS)}")
    return Traffic(workload, (), seed, ids)


def _levels(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise ConfigError(f"--levels {text!r} are not numbers of clients from 1 to 4096 with commas between")
    return sorted({1, *map(int, parts)})


def _slo_flags(bounds: SloConfig) -> list[str]:
    values = (("ttft", bounds.slo_ttft), ("tpot", bounds.slo_tpot), ("gap", bounds.slo_gap))
    return [f"--slo-{name}={value:g}" for name, value in values]


async def _others(servers: Servers, vocabulary: range, taken: Collection[str]) -> list[System]:
    """Those of --against, which have to answer; raises ConfigError."""
    found: list[System] = []
    for text in servers.against:
        name, _, url = text.partition("=") if "=" in text.partition("://")[0] else ("", "", text)
        endpoint = await find(url, api_key=servers.api_key, vocabulary=vocabulary)
        name = name or endpoint.url.partition("://")[2]
        if name in {*taken, *(system.name for system in found)}:
            raise ConfigError(f"--against {text}: there is a {name} already; give it another name, NAME=URL")
        found.append(System(name, servers.against_cores, endpoint))
    return found


def _other_words(systems: Sequence[System]) -> dict[str, str]:
    return {
        system.name: f"{system.endpoint.url}, model {system.endpoint.model}, "
        + (f"{system.cores} cores as told" if system.cores else "hardware not known to be equal")
        for system in systems
    }


def _stopped(stop: asyncio.Event) -> None:
    """The first Ctrl-C or SIGTERM ends the measurement, a second one the program."""
    stop.set()
    loop = asyncio.get_running_loop()
    loop.remove_signal_handler(signal.SIGINT)
    loop.remove_signal_handler(signal.SIGTERM)


def _hardware(given: Hardware, servers: Servers) -> dict[str, Any]:
    cores, all_cores = len(given.core_list), len(os.sched_getaffinity(0))
    kind = cpu_name() if servers.engine == "torch" else "mock workers, which compute nothing"
    return {
        "cores": cores,
        "cores_of_machine": all_cores,
        "cpu": cpu_name(),
        "memory_bytes": memory_bytes(),
        "kv_bytes": given.kv_bytes,
        "engine": servers.engine,
        "words": f"{cores} cores of {all_cores} ({kind}), {given.kv_memory} of KV memory in all",
    }


def _settings(compared: Compared, traffic: Traffic, seed: int) -> Mapping[str, str]:
    runs = [run for run in compared.found.runs.values() if run.good()]
    prompts = [record.sent_tokens for run in runs for record in run.good()]
    outputs = [record.tokens for run in runs for record in run.good()]
    lengths = "-"
    if prompts:
        lengths = (
            f"prompts {min(prompts)} to {max(prompts)}, {sum(prompts) / len(prompts):.0f} on average; "
            f"outputs {min(outputs)} to {max(outputs)}, {sum(outputs) / len(outputs):.0f} on average"
        )
    return {"workload": traffic.workload, "tokens": lengths, "first seed": str(seed)}


def _doubts(compared: Compared, by_text: Collection[str]) -> list[str]:
    """What speaks against the figures; said once, with the systems and runs that it is said of."""
    told: dict[str, int] = {}
    for (name, _), run in compared.found.runs.items():
        for sentence in doubts(run, text_prompts=name in by_text):
            kind = f"{name}: {sentence}" if compared.sides[name] is Side.OTHER else _first_part(sentence)
            told[kind] = told.get(kind, 0) + 1
    runs = len(compared.found.runs)
    unknown = [name for name, cores in compared.cores.items() if cores is None]
    return [
        *(f"the hardware of {name} is not known to be equal (--against-cores tells its cores)" for name in unknown),
        *(f"in {count} of {runs} runs: {sentence}" for sentence, count in told.items()),
    ]


def _first_part(sentence: str) -> str:
    """Without the figures of one run."""
    if sentence.startswith("the client was short of time"):
        return "the client was short of time; it shares the cores with the servers, with all of them alike"
    return sentence


def _own_command() -> str:
    """As it was typed, without a key."""
    words = ["bascule", *sys.argv[1:]]
    for place, word in enumerate(words):
        if word.startswith("--api-key="):
            words[place] = "--api-key=..."
        elif words[place - 1] == "--api-key":
            words[place] = "..."
    return shlex.join(words)
