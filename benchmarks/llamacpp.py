"""Our engine beside llama.cpp on one core and the same GGUF file: decode at one stream, and eight streams in all.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install xllamacpp
    python benchmarks/llamacpp.py --python /tmp/llama/bin/python --rounds 5

Both are servers on one core, driven by the same client from the other core, in turns; the one that waits is stopped.
The wheel is a generic build of llama.cpp (it picks kernels by CPU at run time as far as the wheel has them).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from bascule.models.catalog import pull

SERVER = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[3])})
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_parallel, p.n_ctx = sys.argv[1], 8, 8 * 1024
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.port = int(sys.argv[2])  # on 127.0.0.1
server = x.Server(p)
print("ready", flush=True)
time.sleep(100000)
"""
OUTPUT = 96
PROMPT = "Once upon a time, in a village by the sea, there lived an old fisherman who"


@contextmanager
def started(command: list[str], ready: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not (ready.exists() and ready.read_bytes().find(b"ready" if ready == log else b"{") >= 0):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"not ready: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            signal_tree(process, signal.SIGCONT)
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def signal_tree(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    whole = psutil.Process(process.pid)
    for each in (whole, *whole.children(recursive=True)):
        each.send_signal(number)


async def stream(client: httpx.AsyncClient, url: str, number: int) -> tuple[int, float, float]:
    """Tokens, and when the first and the last came."""
    body = {"model": "smollm2", "prompt": f"{number}. {PROMPT}", "max_tokens": OUTPUT, "stream": True, "temperature": 0}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    first = last = 0.0
    tokens = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line[6:])
            tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
            if data.get("choices"):
                last = time.perf_counter()
                first = first or last
    return tokens, first, last


async def drive(url: str, streams: int) -> tuple[float, float]:
    """Tokens/s of one stream between its first and last token (median), and of all together from the start."""
    async with httpx.AsyncClient(timeout=120) as client:
        begin = time.perf_counter()
        found = await asyncio.gather(*(stream(client, url, number) for number in range(streams)))
        total = sum(tokens for tokens, _, _ in found) / (time.perf_counter() - begin)
    return statistics.median((tokens - 1) / (last - first) for tokens, first, last in found), total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of the environment that has xllamacpp")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bascule-llama-"))
    core, other = sorted(os.sched_getaffinity(0))[:2]
    ready, log = folder / "ready.json", folder / "llama.log"
    ours = [sys.executable, "-m", "bascule", "serve", "smollm2", "--policy", "single", "--devices", f"cpu:{core}"]
    ours += ["--port", "0", "--ready-file", str(ready), "--no-prefix-cache", "--log-level", "warning"]
    theirs = [arguments.python, "-c", SERVER, str(pull("smollm2")), "8124", str(core)]
    rates: dict[tuple[str, int], list[float]] = {}
    with started(theirs, log, log) as llama, started(ours, ready, folder / "bascule.log") as bascule:
        systems = {
            "llama.cpp": (llama, "http://127.0.0.1:8124"),
            "bascule": (bascule, json.loads(ready.read_text())["url"]),
        }
        os.sched_setaffinity(0, {other})  # not before: servers would inherit it
        for process, _ in systems.values():
            signal_tree(process, signal.SIGSTOP)
        for number in range(arguments.rounds + 1):
            for streams in (1, 8):
                for label, (process, url) in systems.items():
                    signal_tree(process, signal.SIGCONT)
                    alone, total = asyncio.run(drive(url, streams))
                    signal_tree(process, signal.SIGSTOP)
                    if number:  # the first round warms up
                        rates.setdefault((label, streams), []).append(alone if streams == 1 else total)
    print(f"one core, {OUTPUT} tokens, medians of {arguments.rounds} rounds in turns\n")
    print("| streams | bascule tok/s | llama.cpp tok/s | ratio |\n|---|---|---|---|")
    for streams in (1, 8):
        mine, their = (statistics.median(rates[label, streams]) for label in ("bascule", "llama.cpp"))
        print(f"| {streams} | {mine:.1f} | {their:.1f} | {mine / their:.2f} |")


if __name__ == "__main__":
    main()
