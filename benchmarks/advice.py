"""The planner's advice beside the best there was: what it costs to follow it.

    python benchmarks/advice.py --core CORE.json --both BOTH.json --found advice.jsonl
    python benchmarks/advice.py --core CORE.json --both BOTH.json --live 8 --seeds 3

`--core` and `--both` are cost models of a worker with one core and of one with two. Simulated: over a grid of length
mixes, loads, bandwidths and numbers of cores, the pick of `bascule plan --objective goodput` against all candidates
that use up the cores, each with more requests than the planner had, and with other seeds. Regret is the share of the
best one's goodput that following the pick costs. `--found` keeps each scenario when it is done, and goes on from there.

Live: N scenarios on two cores with the real model, all layouts in turns with the same requests; those that wait are
stopped. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from layouts import System, running
from msgspec import Struct
from msgspec.structs import replace
from routing import ARCHITECTURES, WARM_UP

from bascule.bench.load import Run, offer
from bascule.hardware import read_class
from bascule.planning.candidates import Budget, Candidate, candidates, largest
from bascule.planning.classes import WorkerClass, measured_class
from bascule.planning.demand import demand_of
from bascule.planning.fluid import Links
from bascule.planning.search import Ask, Search
from bascule.planning.trial import Result, Setting, Trials
from bascule.sim.classes import Memory
from bascule.traffic.workloads import talks
from bascule.types import Slo

SLO = Slo(2.0, 0.06, 0.2)
KV_TOKEN_BYTES = 23_040
TRUTH_SEED = 101
MORE = 1.5
"""Requests of the exhaustive simulations, for each of the planner's."""
LIVE = {**ARCHITECTURES, "adaptive 1+1": ["--policy", "adaptive", "--prefill", "1", "--decode", "1"]}
SPEEDS = {"4 GB/s": 4e9, "50 MB/s": 5e7}
LIVE_REQUESTS = 24


class Scenario(Struct, frozen=True, kw_only=True):
    """One question."""

    workload: str
    level: str
    """Clients, or `r` and a rate."""
    cores: int
    link: str

    def setting(self) -> Setting:
        rate = float(self.level[1:]) if self.level[0] == "r" else None
        return Setting(
            demand=demand_of(self.workload, None, rate, None if rate is not None else int(self.level)),
            slo=SLO,
            links=Links(between=SPEEDS[self.link], within=SPEEDS[self.link], machine_devices=64),
        )

    def __str__(self) -> str:
        return f"{self.workload} {self.level}, {self.cores} cores, {self.link}"


def grid() -> Iterator[Scenario]:
    """Two, four and eight cores; the loads grow with them."""
    levels = {
        "chat": ("8", "32", "r3"),
        "mixed": ("4", "16", "r1.5"),
        "summarise": ("2", "8", "r1"),
        "shared-prefix": ("8", "32", "r3"),
    }
    for cores in (2, 4, 8):
        for workload, offered in levels.items():
            for level in offered if cores < 8 else offered[1:2]:
                for link in SPEEDS if cores < 8 else list(SPEEDS)[:1]:
                    times = cores // 2
                    more = f"r{float(level[1:]) * times:g}" if level[0] == "r" else str(int(level) * times)
                    yield Scenario(workload=workload, level=more, cores=cores, link=link)


def live_grid() -> list[Scenario]:
    """On two cores."""
    levels = {"mixed": ("2", "8"), "chat": ("8", "24"), "summarise": ("2", "r0.8"), "shared-prefix": ("8", "r2")}
    return [
        Scenario(workload=workload, level=level, cores=2, link="4 GB/s")
        for number in (0, 1)
        for workload, offered in levels.items()
        for level in offered[number : number + 1]
    ]


def classes_of(arguments: argparse.Namespace) -> tuple[WorkerClass, ...]:
    """Workers of one core and of two, with as much KV memory in all."""
    return tuple(
        measured_class(name, cores, read_class(path), Memory(kv_bytes=cores << 30, kv_token_bytes=KV_TOKEN_BYTES))
        for name, cores, path in (("core", 1, arguments.core), ("both", 2, arguments.both))
    )


def advised(scenario: Scenario, classes: tuple[WorkerClass, ...]) -> tuple[Search, Result]:
    """The planner's pick."""
    ask = Ask(classes=classes, budget=Budget(devices=scenario.cores), setting=scenario.setting(), objective="goodput")
    search = Search(ask, Trials())
    return search, search.found().pick


def simulated(scenario: Scenario, classes: tuple[WorkerClass, ...], seeds: int) -> dict[str, Any]:
    """The pick, and what each candidate really does."""
    search, pick = advised(scenario, classes)
    setting = scenario.setting()
    setting = replace(setting, requests=int(MORE * setting.count))
    every = largest(candidates(classes, Budget(devices=scenario.cores), search.ask.architectures))
    trials = Trials()
    found = trials.results(every, setting, range(TRUTH_SEED, TRUTH_SEED + seeds), "")
    goodputs = {str(one.candidate): one.goodput for one in found}
    return {
        "scenario": str(scenario),
        "pick": str(pick.candidate),
        "goodputs": goodputs,
        "simulated": search.trials.simulations,
        "candidates": len(every),
    }


def regret_of(found: dict[str, Any]) -> float:
    best = max(found["goodputs"].values())
    return 1 - found["goodputs"][found["pick"]] / best if best else 0.0


def table(every: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each scenario, and regret in all; beside it that of always the same architecture."""
    yield "| scenario | pick | goodput/s | best | its goodput/s | regret |\n|---|---|---|---|---|---|"
    for found in every:
        goodputs = found["goodputs"]
        best = max(goodputs, key=lambda name: goodputs[name])
        yield (
            f"| {found['scenario']} | {found['pick']} | {goodputs[found['pick']]:.3g} | {best} | "
            f"{goodputs[best]:.3g} | {regret_of(found):.1%} |"
        )
    regrets = [regret_of(found) for found in every]
    yield (
        f"\n{len(every)} scenarios; regret: mean {statistics.fmean(regrets):.1%}, "
        f"median {statistics.median(regrets):.1%}, worst {max(regrets):.1%}\n"
    )
    yield "| always | regret: mean | worst |\n|---|---|---|"
    for name in sorted({each.split(" ")[0] for found in every for each in found["goodputs"]}):
        lost = []
        for found in every:
            mine = [value for each, value in found["goodputs"].items() if each.split(" ")[0] == name]
            best = max(found["goodputs"].values())
            if mine and best:
                lost.append(1 - max(mine) / best)
        yield f"| the best {name} | {statistics.fmean(lost):.1%} | {max(lost):.1%} |"


# ---------------------------------------------------------------- live


def layout_of(candidate: Candidate) -> str:
    """The name under which it is served here."""
    return "adaptive 1+1" if len(candidate.shares) == 2 and not candidate.splits else candidate.architecture


def live(arguments: argparse.Namespace, classes: tuple[WorkerClass, ...], folder: Path) -> list[dict[str, Any]]:
    """All layouts in turns, scenario by scenario and seed by seed."""
    scenarios = live_grid()[: arguments.live]
    picks = [layout_of(advised(scenario, classes)[1].candidate) for scenario in scenarios]
    found: list[dict[str, list[float]]] = [{} for _ in scenarios]
    with ExitStack() as stack:
        systems: list[System] = []
        for name, flags in LIVE.items():
            ready = folder / f"ready-{name.replace(' ', '-')}"
            command = [sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", *flags]
            command += ["--ready-file", str(ready), "--log-level", "warning"]
            command += ["--kv-memory", "2GiB" if name == "single" else "1GiB"]
            log = folder / f"{name.replace(' ', '-')}.log"
            systems.append(stack.enter_context(running(name, arguments.model, command, ready, log)))
            asyncio.run(offer(systems[-1].url, arguments.model, talks("mixed", WARM_UP, 10_000), WARM_UP))
            systems[-1].signal(signal.SIGSTOP)
        for seed in range(1, arguments.seeds + 1):
            for number, scenario in enumerate(scenarios):
                for system in systems[seed % len(systems) :] + systems[: seed % len(systems)]:
                    run = turn(system, scenario, 100 * seed + number, arguments)
                    found[number].setdefault(system.label, []).append(run.goodput(SLO))
                    wrong = sum(bool(record.error) for record in run.records)
                    print(f"seed {seed}: {scenario}: {system.label}, {wrong} errors", file=sys.stderr)
    return [
        {
            "scenario": str(scenario),
            "pick": pick,
            "goodputs": {name: statistics.fmean(goodputs) for name, goodputs in each.items()},
        }
        for scenario, pick, each in zip(scenarios, picks, found, strict=True)
    ]


def turn(system: System, scenario: Scenario, seed: int, arguments: argparse.Namespace) -> Run:
    """One scenario of one system, while the others stand still."""
    demand = scenario.setting().demand
    requests = max(arguments.requests, 3 * (demand.clients or 0))
    asked = talks(scenario.workload, requests, seed, demand.rate)
    system.signal(signal.SIGCONT)
    run = asyncio.run(offer(system.url, system.model, asked, demand.clients))
    system.signal(signal.SIGSTOP)
    return run


def main() -> None:
    """Ask, try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=Path, required=True)
    parser.add_argument("--both", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="scenarios with this in their name, such as '4 cores'")
    parser.add_argument("--found", type=Path, help="file that keeps scenarios, a line each")
    parser.add_argument("--done", action="store_true", help="print what the file has, and simulate nothing")
    parser.add_argument("--live", type=int, default=0, help="scenarios with the real model")
    parser.add_argument("--requests", type=int, default=LIVE_REQUESTS, help="of a live run, at the least")
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    classes = classes_of(arguments)
    if arguments.live:
        with tempfile.TemporaryDirectory(prefix="bascule-advice-") as folder:
            every = live(arguments, classes, Path(folder))
    else:
        every = over_grid(arguments, classes)
    for line in table(every):
        print(line)


def over_grid(arguments: argparse.Namespace, classes: tuple[WorkerClass, ...]) -> list[dict[str, Any]]:
    """All scenarios asked for, those in the file as they are."""
    kept: dict[str, dict[str, Any]] = {}
    if arguments.found is not None and arguments.found.exists():
        kept = {one["scenario"]: one for one in map(json.loads, arguments.found.read_text().splitlines())}
    every = []
    for scenario in grid():
        if arguments.only not in str(scenario):
            continue
        name = str(scenario)
        if name not in kept and arguments.done:
            continue
        if name not in kept:
            kept[name] = simulated(scenario, classes, arguments.seeds)
            if arguments.found is not None:
                with arguments.found.open("a") as file:
                    file.write(json.dumps(kept[name]) + "\n")
            print(f"{name}: {kept[name]['pick']}, regret {regret_of(kept[name]):.1%}", file=sys.stderr)
        every.append(kept[name])
    return every


if __name__ == "__main__":
    main()
