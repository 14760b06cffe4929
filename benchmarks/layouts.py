"""Our layouts beside vLLM's, on the same cores, model and requests; prints Markdown tables of medians and ratios.

    python benchmarks/layouts.py --peers ../shared/peers --levels 1,8,16 --rounds 5

`--peers` is a directory with `load.py` (the client) and `vllm_fleet.py` (starts vLLM; needs its `setup.sh` run once).
For each layout all systems are up at once and take turns, round after round, with the same requests in a round: what
disturbs the machine disturbs all of them. A system that waits for its turn is stopped (SIGSTOP), so that threads which
spin do not take a core from the one that is measured. Memory (PSS of all processes) is read before the first request.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

LAYOUTS = {
    "single": (["--policy", "single"], ["single"]),
    "replicated": (["--policy", "replicated"], ["replicated"]),
    "split": (["--policy", "disaggregated"], ["disaggregated", "--tuned"]),
}
FORMS = {"bf16": "none", "4-bit": "auto"}
START_S = 300.0
METRICS = {
    "TTFT p50 s": lambda summary: summary["ttft"]["p50"],
    "TTFT p99 s": lambda summary: summary["ttft"]["p99"],
    "TPOT mean ms": lambda summary: 1000 * summary["tpot"]["mean"],
    "ITL p99 s": lambda summary: summary["itl"]["p99"],
    "output tok/s": lambda summary: summary["output_tok_s"],
    "goodput/s": lambda summary: summary["slo"]["goodput_request_s"],
}


@dataclass
class System:
    """A server under test, and what its runs gave, by level and metric."""

    label: str
    model: str
    process: subprocess.Popen[bytes]
    url: str = ""
    start_s: float = 0.0
    idle_mib: float = 0.0
    found: dict[tuple[float, str], list[float]] = field(default_factory=dict)
    errors: int = 0

    def tree(self) -> list[psutil.Process]:
        whole = psutil.Process(self.process.pid)
        return [whole, *whole.children(recursive=True)]

    def signal(self, number: signal.Signals) -> None:
        for process in self.tree():
            process.send_signal(number)

    def take(self, run: dict[str, Any]) -> None:
        self.errors += run["summary"]["errors"]
        for metric, read in METRICS.items():
            self.found.setdefault((run["level"], metric), []).append(read(run["summary"]))

    def median(self, level: float, metric: str) -> float:
        return statistics.median(self.found[level, metric])


@contextmanager
def running(label: str, model: str, command: list[str], ready_file: Path, log: Path) -> Iterator[System]:
    """A server from its ready file to its end."""
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    system = System(label, model, process)
    try:
        while not ready_file.exists():
            if process.poll() is not None or time.monotonic() > begin + START_S:
                sys.exit(f"{label} did not become ready: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        system.start_s = time.monotonic() - begin
        system.url = json.loads(ready_file.read_text())["url"]
        time.sleep(5)
        system.idle_mib = sum(process.memory_full_info().pss for process in system.tree()) / 2**20
        yield system
    finally:
        if process.poll() is None:
            system.signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def commands(layout: str, arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, list[str], Path]]:
    """Label, model name, command and ready file of each system of a layout."""
    ours, theirs = LAYOUTS[layout]
    kv = "2GiB" if layout == "single" else "1GiB"
    for form in arguments.forms.split(","):
        ready = folder / f"ready-{os.getpid()}-{layout}-{form}"
        serve = [sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", "--ready-file", str(ready)]
        serve += ["--kv-memory", kv, "--no-prefix-cache", "--log-level", "warning", "--quantize", FORMS[form], *ours]
        yield f"bascule {form}", arguments.model, serve, ready
    if arguments.peers is not None:
        ready = folder / f"ready-{os.getpid()}-{layout}-vllm"
        fleet = [sys.executable, str(arguments.peers / "vllm_fleet.py"), *theirs, "--port", "8123"]
        yield "vLLM", "smol", [*fleet, "--ready-file", str(ready)], ready


def turn(system: System, level: str, seed: int, arguments: argparse.Namespace, report: Path) -> None:
    """One system's run of one level."""
    command = [sys.executable, str(arguments.client / "load.py"), "--url", system.url, "--model", system.model]
    command += ["--workload", arguments.workload, "--concurrency", level, "--requests", "12", "--seed", str(seed)]
    command += ["--label", system.label, "--slo", arguments.slo, "--no-requests", "--out", str(report)]
    system.signal(signal.SIGCONT)
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    system.signal(signal.SIGSTOP)
    for run in json.loads(report.read_text())["runs"]:
        system.take(run)


def measure(layout: str, arguments: argparse.Namespace, folder: Path) -> list[System]:
    """All systems of a layout, in turns."""
    with ExitStack() as stack:
        systems: list[System] = []
        for label, model, command, ready in commands(layout, arguments, folder):
            log = folder / f"{layout}-{label.replace(' ', '-')}.log"
            systems.append(stack.enter_context(running(label, model, command, ready, log)))
            systems[-1].signal(signal.SIGSTOP)
        for number in range(arguments.rounds):
            for level in arguments.levels.split(","):
                for system in systems:
                    turn(system, level, number + 1, arguments, folder / "report.json")
                    print(f"{layout}, round {number + 1}, level {level}: {system.label}", file=sys.stderr)
    return systems


def table(layout: str, systems: list[System], arguments: argparse.Namespace) -> Iterator[str]:
    """Medians, and each of our rows' ratio to vLLM's in brackets."""
    peer = systems[-1] if systems[-1].label == "vLLM" else None
    yield f"\n**{layout}**\n"
    yield f"| concurrency | system | {' | '.join(METRICS)} | errors | idle MiB | start s |"
    yield "|" + "---|" * (len(METRICS) + 5)
    for level in map(float, arguments.levels.split(",")):
        for system in systems:
            cells = []
            for metric in METRICS:
                value = system.median(level, metric)
                other = peer.median(level, metric) if peer is not None and system is not peer else 0.0
                cells.append(f"{value:.3g}" + (f" ({value / other:.2f})" if other else ""))
            tail = f"{system.errors} | {system.idle_mib:.0f} | {system.start_s:.1f}"
            yield f"| {level:g} | {system.label} | {' | '.join(cells)} | {tail} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("../shared/peers"))
    parser.add_argument("--alone", action="store_true", help="without vLLM")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--forms", default=",".join(FORMS), help="of our weights")
    parser.add_argument("--levels", default="1,8,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workload", default="mixed")
    parser.add_argument("--slo", default="2,0.06,0.2", help="TTFT, TPOT and longest gap in seconds")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.peers.joinpath("load.py").exists():
        sys.exit(
            f"{arguments.peers} has no load.py, the client of this comparison, which is no part of this repository: "
            "name its folder with --peers. bascule bench compare compares our own layouts with a client of ours."
        )
    arguments.client = arguments.peers
    if arguments.alone:
        arguments.peers = None
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="bascule-layouts-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"workload {arguments.workload}, SLO {arguments.slo} s, medians of {arguments.rounds} rounds (ratio to vLLM)")
    for layout in arguments.layouts.split(","):
        for line in table(layout, measure(layout, arguments, folder), arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
