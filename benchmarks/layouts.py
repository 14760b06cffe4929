"""Our three policies beside vLLM's three layouts, on the same cores, model and requests; prints a Markdown table.

    python benchmarks/layouts.py --peers ../shared/peers --systems bascule,vllm --levels 1,8,16

`--peers` is a directory with `load.py` (the client) and `vllm_fleet.py` (starts vLLM; needs its `setup.sh` run once).
Each system is started, driven through all levels in closed loop, and stopped, one after another. A figure of one run is
as good as the machine is quiet: the column "foreign" tells how many cores something else kept busy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BASCULE = {
    "bascule single": ["--policy", "single"],
    "bascule replicated": ["--policy", "replicated"],
    "bascule split, shm": ["--policy", "disaggregated", "--transfer", "shm"],
    "bascule split, tcp": ["--policy", "disaggregated", "--transfer", "tcp"],
}
VLLM = {
    "vLLM single": ["single"],
    "vLLM replicated": ["replicated"],
    "vLLM split, tuned": ["disaggregated", "--tuned"],
}
START_S = 300.0
COLUMNS = ("TTFT p50 s", "TTFT p99 s", "TPOT mean ms", "ITL p99 s", "worst gap p50 s", "output tok/s", "goodput/s")


@contextmanager
def running(command: list[str], ready_file: Path, log: Path) -> Iterator[dict[str, Any]]:
    """A server process from its ready file to its end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not ready_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not become ready: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield json.loads(ready_file.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bascule_command(flags: list[str], ready_file: Path, arguments: argparse.Namespace) -> list[str]:
    kv = "2GiB" if "single" in flags else "1GiB"
    return [
        *(sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", "--ready-file", str(ready_file)),
        *("--kv-memory", kv, "--no-prefix-cache", "--log-level", "warning", *flags),
    ]


def vllm_command(flags: list[str], ready_file: Path, arguments: argparse.Namespace) -> list[str]:
    fleet = str(arguments.peers / "vllm_fleet.py")
    return [sys.executable, fleet, *flags, "--port", "8123", "--ready-file", str(ready_file)]


def measure(url: str, model: str, label: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Drive one system through all levels; returns the client's summaries."""
    report = folder / f"{label.replace(' ', '-')}.json"
    command = [sys.executable, str(arguments.peers / "load.py"), "--url", url, "--model", model, "--label", label]
    command += ["--workload", arguments.workload, "--concurrency", arguments.levels, "--requests", "12"]
    command += ["--slo", arguments.slo, "--no-requests", "--out", str(report)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    runs: list[dict[str, Any]] = json.loads(report.read_text())["runs"]
    return runs


def row(label: str, run: dict[str, Any], started: float) -> str:
    summary = run["summary"]
    figures = (
        f"{summary['ttft']['p50']:.3f}",
        f"{summary['ttft']['p99']:.3f}",
        f"{1000 * summary['tpot']['mean']:.1f}",
        f"{summary['itl']['p99']:.3f}",
        f"{summary['max_gap']['p50']:.3f}",
        f"{summary['output_tok_s']:.1f}",
        f"{summary['slo']['goodput_request_s']:.2f}",
    )
    counts = f"{summary['ok']} | {summary['errors']}"
    foreign = summary.get("foreign_cores")
    tail = f"{started:.0f} | {'-' if foreign is None else f'{foreign:.2f}'}"
    return f"| {run['level']:g} | {label} | {counts} | {' | '.join(figures)} | {tail} |"


def main() -> None:
    """Measure and print; the JSON reports stay in `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("../shared/peers"))
    parser.add_argument("--systems", default="bascule,vllm")
    parser.add_argument("--levels", default="1,8,16")
    parser.add_argument("--workload", default="mixed")
    parser.add_argument("--slo", default="2,0.06,0.2", help="TTFT, TPOT and longest gap in seconds")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="bascule-layouts-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[float, str]] = []
    for kind, systems in (("bascule", BASCULE), ("vllm", VLLM)):
        for label, flags in systems.items() if kind in arguments.systems.split(",") else ():
            ready_file = folder / f"ready-{os.getpid()}-{label.replace(' ', '-')}"
            command = (bascule_command if kind == "bascule" else vllm_command)(flags, ready_file, arguments)
            begin = time.monotonic()
            with running(command, ready_file, folder / f"{label.replace(' ', '-')}.log") as ready:
                started = time.monotonic() - begin
                model = arguments.model if kind == "bascule" else "smol"
                for run in measure(ready["url"], model, label, arguments, folder):
                    rows.append((run["level"], row(label, run, started)))
            print(f"{label}: done", file=sys.stderr)
    print(f"workload {arguments.workload}, SLO {arguments.slo} s, reports in {folder}\n")
    print("| concurrency | system | completed | errors | " + " | ".join(COLUMNS) + " | start s | foreign |")
    print("|" + "---|" * (len(COLUMNS) + 6))
    for _, line in sorted(rows, key=lambda pair: pair[0]):
        print(line)


if __name__ == "__main__":
    main()
