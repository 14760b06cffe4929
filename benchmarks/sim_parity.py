"""The simulator beside live serving: the same requests, policies and cost model, by mock workers in real processes.

    python benchmarks/sim_parity.py --cost-model ~/.cache/bascule/costs/NAME.json --live live.json

All live systems are up at once and get the same requests at the same time; their workers sleep for what the cost model
says. `--live` keeps what was measured: with that file there, only the simulation is run (anew). A level is a number
of clients in a closed loop, or `r` and a rate of Poisson arrivals (requests/s). Prints Markdown: each figure live and
simulated, the errors by figure, and in how many cells both rank the architectures alike. Beside the errors: how far the
same figures of the simulation move when its steps take 0.1 ms more, which is what such runs have of chance.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
from layouts import running
from routing import ARCHITECTURES, WARM_UP, run_together
from routing import requests_at as requests_of

from bascule.bench.load import Run, offer
from bascule.hardware import read_class
from bascule.sim.clients import ClientTimes
from bascule.sim.cluster import Cluster, Overheads, Pool
from bascule.sim.handoffs import HandoffTimes
from bascule.sim.run import Simulation
from bascule.sim.worker import Kind
from bascule.traffic.workloads import talks
from bascule.types import Role

KV_TOKENS = 47_104
MOCK_TOKEN_BYTES = 32
"""Of KV, in a mock worker."""
WARM_SEED = 10_000
BARE = Overheads(
    clients=ClientTimes(ask_s=0.0, ask_token_s=0.0, answer_s=0.0),
    handoffs=HandoffTimes(message_s=0.0, push_s=0.0, commit_s=0.0),
    submit_s=0.0,
    step_s=0.0,
    stream_s=0.0,
)
NUDGE_S = 1e-4
EQUAL = 0.05
"""Architectures within this of each other have no order that would mean anything."""
METRICS = ("ttft_p50", "ttft_p90", "tpot_mean", "output_tokens_per_s")
Figures = dict[str, float]
Cells = dict[str, list[Figures]]
"""By architecture, workload and level; one for each seed."""


def figures_of(run: Run) -> Figures:
    found = run.figures()
    found["ttft_p90"] = run.quantile([record.ttft for record in run.good()], 0.9)
    return {name: found[name] for name in (*METRICS, "errors", "rejected")}


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Workload, level and seed, in the order in which they are offered."""
    for seed in range(1, arguments.seeds + 1):
        for number, (workload, level) in enumerate(
            (workload, level) for workload in arguments.workloads.split(",") for level in arguments.levels.split(",")
        ):
            yield workload, level, 100 * seed + number


def key(name: str, workload: str, level: str) -> str:
    return f"{name} {workload} {level}"


def live(arguments: argparse.Namespace, folder: Path) -> Cells:
    """What the servers do."""
    found: Cells = {}
    with ExitStack() as stack:
        systems = []
        for name in arguments.architectures.split(","):
            ready = folder / f"ready-{name}"
            command = [sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", "--engine", "mock"]
            command += ["--ready-file", str(ready), "--cost-model", str(arguments.cost_model), "--log-level", "warning"]
            # Peers' KV is not in the simulation: there a prefix is computed on each worker.
            command += ["--kv-memory", str(KV_TOKENS * MOCK_TOKEN_BYTES), "--no-peer-fetch", *ARCHITECTURES[name]]
            systems.append(stack.enter_context(running(name, arguments.model, command, ready, folder / f"{name}.log")))
            asyncio.run(offer(systems[-1].url, arguments.model, talks("mixed", WARM_UP, WARM_SEED), WARM_UP))
        for workload, level, seed in cells(arguments):
            runs = asyncio.run(run_together(systems, workload, level, seed, arguments))
            for system, run in zip(systems, runs, strict=True):
                found.setdefault(key(system.label, workload, level), []).append(figures_of(run))
            print(f"live: {workload} {level}", file=sys.stderr)
    return found


def simulated(arguments: argparse.Namespace, overheads: Overheads) -> Cells:
    """What the simulator says of the same."""
    found: Cells = {}
    kind = Kind(name="core", cost=read_class(arguments.cost_model).cost, kv_tokens=KV_TOKENS)
    for name in arguments.architectures.split(","):
        split = (Pool(Role.PREFILL, kind, 1), Pool(Role.DECODE, kind, 1))
        pools = split if name == "disaggregated" else (Pool(Role.MIXED, kind, 2),)
        cluster = Cluster(policy=name, pools=pools, kv_token_bytes=MOCK_TOKEN_BYTES, overheads=overheads)
        simulation = Simulation(cluster)
        simulation.offer(talks("mixed", WARM_UP, WARM_SEED), WARM_UP)
        for workload, level, seed in cells(arguments):
            rate = float(level[1:]) if level[0] == "r" else None
            asked = talks(workload, requests_of(level, arguments), seed, rate)
            outcome = simulation.offer(asked, None if rate is not None else int(level))
            found.setdefault(key(name, workload, level), []).append(figures_of(outcome.run))
    return found


def medians(runs: list[Figures]) -> Figures:
    return {metric: statistics.median(run[metric] for run in runs) for metric in METRICS}


def apart(ours: Cells, theirs: Cells) -> dict[str, list[float]]:
    """How far each figure of each cell is from the other's."""
    pairs = [(medians(ours[name]), medians(theirs[name])) for name in ours]
    return {
        metric: sorted(abs(one[metric] - other[metric]) / other[metric] for one, other in pairs) for metric in METRICS
    }


def summary(told: str, found: dict[str, list[float]]) -> Iterator[str]:
    yield f"\n| {told} | median | 90 % | worst |\n|---|---|---|---|"
    every = sorted(value for values in found.values() for value in values)
    for metric, values in {**found, "all": every}.items():
        tail = values[int(0.9 * (len(values) - 1))]
        yield f"| {metric} | {statistics.median(values):.1%} | {tail:.1%} | {values[-1]:.1%} |"


def tables(ours: Cells, theirs: Cells, nudged: Cells, arguments: argparse.Namespace) -> Iterator[str]:
    alike = total = 0
    yield f"| workload | level | system | {' | '.join(f'{metric}: live, simulated' for metric in METRICS)} |"
    yield "|" + "---|" * (len(METRICS) + 3)
    names = arguments.architectures.split(",")
    for workload in arguments.workloads.split(","):
        for level in arguments.levels.split(","):
            median: dict[str, tuple[Figures, Figures]] = {}
            for name in names:
                was, says = (medians(side[key(name, workload, level)]) for side in (theirs, ours))
                median[name] = was, says
                row = " | ".join(f"{was[metric]:.3g}, {says[metric]:.3g}" for metric in METRICS)
                yield f"| {workload} | {level} | {name} | {row} |"
            total += 1
            alike += same_order(median)
    yield from summary("simulated against live", apart(ours, theirs))
    yield from summary("simulated, and with 0.1 ms more a step", apart(nudged, ours))
    yield f"\nOrder by output tok/s (equal within {EQUAL:.0%}) the same in {alike} of {total} cells."


def same_order(median: dict[str, tuple[Figures, Figures]]) -> bool:
    """Whether no pair that is clearly apart on both sides is the other way round."""
    names = list(median)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            ratios = [
                median[one][side]["output_tokens_per_s"] / median[other][side]["output_tokens_per_s"] for side in (0, 1)
            ]
            signs = {(ratio > 1) - (ratio < 1) for ratio in ratios if abs(ratio - 1) > EQUAL}
            if len(signs) > 1:
                return False
    return True


def main() -> None:
    """Measure, simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost-model", type=Path, required=True)
    parser.add_argument("--live", type=Path, help="file with what was measured; written if it is not there")
    parser.add_argument("--bare", action="store_true", help="simulate the cost model alone, to see what comes on top")
    parser.add_argument("--workloads", default="mixed")
    parser.add_argument("--levels", default="1,4,8,16,32,r0.5,r1,r1.5,r2,r2.5")
    parser.add_argument("--architectures", default="replicated,disaggregated,adaptive")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=16, help="of a run, at the least")
    parser.add_argument("--per-client", type=int, default=3, help="requests of each client of a closed loop")
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    if arguments.live is not None and arguments.live.exists():
        measured = msgspec.json.decode(arguments.live.read_bytes(), type=Cells)
    else:
        with tempfile.TemporaryDirectory(prefix="bascule-parity-") as folder:
            measured = live(arguments, Path(folder))
        if arguments.live is not None:
            arguments.live.write_bytes(msgspec.json.encode(measured))
    overheads = BARE if arguments.bare else Overheads()
    nudged = msgspec.structs.replace(overheads, step_s=overheads.step_s + NUDGE_S)
    for line in tables(simulated(arguments, overheads), measured, simulated(arguments, nudged), arguments):
        print(line)


if __name__ == "__main__":
    main()
