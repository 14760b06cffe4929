"""Single, replicated, disaggregated and adaptive serving side by side on the same two cores and requests.

    python benchmarks/routing.py --workloads mixed,shared-prefix --levels 1,4,8,16,32,r1,r2,r3 --seeds 3

A level is a number of clients in a closed loop, or `r` and a rate of Poisson arrivals (requests/s). All systems are up
at once and take turns, level by level and seed by seed, with the same requests; one that waits is stopped (SIGSTOP).
With `--engine mock` the workers compute nothing and take the time that `--cost-model` (and `--cost-model-whole` for the
worker that has both cores) gives; then all systems run at the same time. Prints Markdown: goodput at the three SLOs,
latencies, the ratio of adaptive to the better of replicated and disaggregated with a bootstrap interval over the seeds,
where disaggregated overtakes replicated, and how far predictions were from what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from layouts import System, running

from bascule.bench.load import Run, offer
from bascule.traffic.workloads import talks
from bascule.types import Slo

SLOS = {"interactive": Slo(1.0, 0.05, 0.15), "standard": Slo(2.0, 0.06, 0.2), "relaxed": Slo(5.0, 0.12, 0.5)}
ARCHITECTURES = {
    "single": ["--policy", "single"],
    "replicated": ["--policy", "replicated"],
    "disaggregated": ["--policy", "disaggregated"],
    "adaptive": ["--policy", "adaptive"],
}
WARM_UP = 4
DRAWS = 2000
FEWEST_SEEDS = 3
"""Fewer runs have no interval worth telling."""


@dataclass
class Cell:
    """One workload at one level: each architecture's runs, in the order of the seeds."""

    workload: str
    level: str
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def goodput(self, name: str, slo: Slo) -> list[float]:
        return [run.goodput(slo) for run in self.runs[name]]

    def median(self, name: str, figure: str) -> float:
        return statistics.median(run.figures()[figure] for run in self.runs[name])


def requests_at(level: str, arguments: argparse.Namespace) -> int:
    """Enough for a steady state, few enough for an evening."""
    least = arguments.requests
    return max(least, arguments.per_client * int(level)) if level[0] != "r" else 2 * least


def run_once(system: System, workload: str, level: str, seed: int, arguments: argparse.Namespace) -> Run:
    rate = float(level[1:]) if level[0] == "r" else None
    asked = talks(workload, requests_at(level, arguments), seed, rate)
    clients = None if rate is not None else int(level)
    return asyncio.run(offer(system.url, system.model, asked, clients))


async def run_together(
    systems: list[System], workload: str, level: str, seed: int, arguments: argparse.Namespace
) -> list[Run]:
    rate = float(level[1:]) if level[0] == "r" else None
    asked = talks(workload, requests_at(level, arguments), seed, rate)
    clients = None if rate is not None else int(level)
    return await asyncio.gather(*(offer(system.url, system.model, asked, clients) for system in systems))


def measure(arguments: argparse.Namespace, folder: Path) -> list[Cell]:
    """All cells, all systems in turns (at once where their workers only sleep)."""
    cells = [Cell(w, level) for w in arguments.workloads.split(",") for level in arguments.levels.split(",")]
    with ExitStack() as stack:
        systems = []
        for name in arguments.architectures.split(","):
            ready = folder / f"ready-{name}"
            for left in (ready, folder / f"decisions-{name}.jsonl"):
                left.unlink(missing_ok=True)
            command = [
                sys.executable,
                "-m",
                "bascule",
                "serve",
                arguments.model,
                "--port",
                "0",
                "--ready-file",
                str(ready),
            ]
            command += ["--log-level", "warning", "--decision-log", str(folder / f"decisions-{name}.jsonl")]
            command += ["--kv-memory", "2GiB" if name == "single" else "1GiB", *ARCHITECTURES[name]]
            command += ["--admission", arguments.admission, *arguments.flags.split()]
            if arguments.engine == "mock":
                model = arguments.cost_model_whole if name == "single" else arguments.cost_model
                command += ["--engine", "mock", "--cost-model", str(model)]
            system = stack.enter_context(running(name, arguments.model, command, ready, folder / f"{name}.log"))
            asyncio.run(offer(system.url, system.model, talks("mixed", WARM_UP, 10_000), WARM_UP))
            systems.append(system)
            if arguments.engine != "mock":
                system.signal(signal.SIGSTOP)
        for seed in range(1, arguments.seeds + 1):
            for number, cell in enumerate(cells):
                if arguments.engine == "mock":
                    found = asyncio.run(
                        run_together(systems, cell.workload, cell.level, 100 * seed + number, arguments)
                    )
                    for system, run in zip(systems, found, strict=True):
                        cell.runs.setdefault(system.label, []).append(run)
                    print(f"seed {seed}: {cell.workload} {cell.level}", file=sys.stderr)
                    continue
                for system in systems[seed % len(systems) :] + systems[: seed % len(systems)]:
                    system.signal(signal.SIGCONT)
                    run = run_once(system, cell.workload, cell.level, 100 * seed + number, arguments)
                    system.signal(signal.SIGSTOP)
                    cell.runs.setdefault(system.label, []).append(run)
                    wrong = [record.error for record in run.records if record.error]
                    told = f", {len(wrong)} errors, first {wrong[0]}" if wrong else ""
                    print(f"seed {seed}: {cell.workload} {cell.level} {system.label}{told}", file=sys.stderr)
    return cells


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Of two paired series: of their sums, with a 95 % bootstrap interval over the pairs."""
    rng = random.Random(1)
    pairs = list(zip(ours, theirs, strict=True))

    def of(drawn: Sequence[tuple[float, float]]) -> float:
        below = sum(other for _, other in drawn)
        above = sum(own for own, _ in drawn)
        return above / below if below else (1.0 if not above else math.inf)

    draws = sorted(of(rng.choices(pairs, k=len(pairs))) for _ in range(DRAWS))
    return of(pairs), draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS)]


def verdict(value: tuple[float, float, float], seeds: int) -> str:
    middle, low, high = value
    if seeds < FEWEST_SEEDS:
        return f"{middle:.2f} undecided (seeds: {seeds})"
    told = f"{middle:.2f} ({low:.2f}-{high:.2f})"
    if low > 1.0:
        return f"{told} better"
    if high < 0.97:
        return f"{told} **worse**"
    return f"{told} {'no worse' if low >= 0.97 else 'undecided'}"


def tables(cells: list[Cell], names: list[str]) -> Iterator[str]:
    for slo_name, slo in SLOS.items():
        bounds = f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s, gap {slo.gap_s:g} s"
        yield f"\n**goodput at `{slo_name}`** ({bounds}), requests/s\n"
        compared = {"replicated", "disaggregated", "adaptive"} <= set(names)
        yield f"| workload | level | {' | '.join(names)} |" + (" adaptive / better of both |" if compared else "")
        yield "|" + "---|" * (len(names) + 2 + compared)
        for cell in cells:
            values = {name: cell.goodput(name, slo) for name in names}
            row = " | ".join(f"{statistics.fmean(values[name]):.2f}" for name in names)
            told = ""
            if compared:
                better = max(("replicated", "disaggregated"), key=lambda name: sum(values[name]))
                told = f" {verdict(ratio(values['adaptive'], values[better]), len(values[better]))} |"
            yield f"| {cell.workload} | {cell.level} | {row} |{told}"
    figures = ("ttft_p50", "ttft_p99", "tpot_mean", "itl_p50", "itl_p99", "output_tokens_per_s", "errors")
    yield "\n**latencies** (s), medians over the seeds\n"
    yield f"| workload | level | system | {' | '.join(figures)} |"
    yield "|" + "---|" * (len(figures) + 3)
    for cell in cells:
        for name in names:
            row = " | ".join(f"{cell.median(name, figure):.3g}" for figure in figures)
            yield f"| {cell.workload} | {cell.level} | {name} | {row} |"


def crossovers(cells: list[Cell]) -> Iterator[str]:
    """From which closed-loop level on disaggregated has the higher goodput at `standard`, by workload."""
    yield "\n**crossover** (disaggregated over replicated, goodput at `standard`, closed loop)\n"
    for workload in dict.fromkeys(cell.workload for cell in cells):
        line = [cell for cell in cells if cell.workload == workload and cell.level[0] != "r"]
        ahead = [
            cell.level
            for cell in line
            if sum(cell.goodput("disaggregated", SLOS["standard"])) > sum(cell.goodput("replicated", SLOS["standard"]))
        ]
        yield f"- {workload}: " + (f"ahead at {', '.join(ahead)}" if ahead else "none in this range")


def errors(folder: Path, names: list[str]) -> Iterator[str]:
    """Median of |predicted - actual| / actual over all requests of the runs, from the decision logs."""
    yield "\n**prediction**, median absolute error over all completed requests\n"
    yield "| system | requests | TTFT | TPOT |"
    yield "|---|---|---|---|"
    for name in names:
        found: dict[str, list[float]] = {"ttft_s": [], "tpot_s": []}
        log = folder / f"decisions-{name}.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            record = json.loads(line)
            for term, values in found.items():
                predicted, actual = record.get("predicted", {}).get(term), record.get("actual", {}).get(term)
                if predicted is not None and actual:
                    values.append(abs(predicted - actual) / actual)
        told = " | ".join(f"{statistics.median(values):.3f}" if values else "-" for values in found.values())
        yield f"| {name} | {len(found['ttft_s'])} | {told} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="mixed,shared-prefix")
    parser.add_argument("--levels", default="1,4,8,16,32,r1,r2,r3")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-client", type=int, default=3, help="requests of each client of a closed loop")
    parser.add_argument("--requests", type=int, default=16, help="of a run, at the least")
    parser.add_argument("--engine", choices=("torch", "mock"), default="torch")
    parser.add_argument("--cost-model", type=Path, help="of a worker with one core (mock)")
    parser.add_argument("--cost-model-whole", type=Path, help="of the worker with both cores (mock)")
    parser.add_argument("--admission", choices=("queue", "slo"), default="queue")
    parser.add_argument("--flags", default="", help="further flags of all servers")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="bascule-routing-"))
    folder.mkdir(parents=True, exist_ok=True)
    names = arguments.architectures.split(",")
    cells = measure(arguments, folder)
    for line in (*tables(cells, names), *(crossovers(cells) if len(names) == 4 else ()), *errors(folder, names)):
        print(line)


if __name__ == "__main__":
    main()
