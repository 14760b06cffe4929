"""What a KV store that fails costs: latency beside a server without one, whether the answers stay, who counts it.

    python benchmarks/kv_faults.py --rounds 1

Two servers of one worker on one core each: one without a store, one with a Redis server or a directory as its tier.
Both get the same greedy requests, one after the other on the same core, and take turns in being the first. Prompts are
1,000 to 1,500 tokens of prefix and a short question, and device memory holds hardly more than one of them, so that a
prefix that comes again is in the store or nowhere. In each round the tier first works: prefixes are saved, and found.
Then the fault begins, the same prefixes are asked for again, and new ones twice each; then it ends, and the tier is
waited for until it is used again. A round takes eight minutes on two cores.

The faults are real: `faults.py`. Those of the disk befall a small file system in memory that is mounted for them,
which takes root. Prints Markdown: ratios of paired requests to the server without a store, with a 95 % bootstrap
interval over the pairs; the longest that a request took more; the metrics that moved while the fault lasted. Exit code
1 if an answer differed, a request failed, or a fault's median of TTFT or p90 of requests is over 1.2.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from faults import TIER, Fault, disk, remote
from kv_store import HTTP, TOKEN_BYTES, Answer, ask
from layouts import System, running
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

CORES = (0, 1)
OUTPUT, QUESTION, SHORT = 4, 40, 40
OLD, NEW = 3, 2
"""Prefixes that lie in the tier when the fault begins, and those that are new then."""
LENGTHS = (1000, 1500)
DRAWS = 2000
MOST = 1.2
"""What a failing tier may cost, as a ratio to the server without a store."""
TOLD_S = 4.0
"""After which the router knows what its worker has counted."""
BACK_S = 90.0
SAVED_S = 60.0
COUNTED = ("bascule_kv_store_faults_total", "bascule_kv_store_invalid_total", "bascule_kv_store_evictions_total")


@dataclass
class Pair:
    """The same request to both servers."""

    without: Answer
    stored: Answer

    @property
    def same(self) -> bool:
        return self.without.tokens == self.stored.tokens


def pin(system: System, core: int) -> None:
    """Its worker, all threads of it."""
    for process in system.tree()[1:]:
        for thread in process.threads():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, {core})


@dataclass
class Found:
    """What was seen of one fault."""

    healthy: list[Pair] = field(default_factory=list)
    faulty: list[Pair] = field(default_factory=list)
    counted: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metrics before the first fault and after the last."""


@dataclass
class Bench:
    """Both servers, and the texts that are asked for."""

    without: System
    stored: System
    tier: str
    log: Path
    draw: random.Random
    token_bytes: int
    turn: int = 0

    def text(self, length: int) -> list[int]:
        return self.draw.choices(range(100, 40_000), k=length)

    def prefixes(self, count: int) -> list[list[int]]:
        return [self.text(self.draw.randint(*LENGTHS)) for _ in range(count)]

    def pair(self, prefix: list[int]) -> Pair:
        """Ask both; they take turns in being the first, and change cores: one core may have other work to do."""
        self.turn += 1
        prompt = prefix + self.text(QUESTION)
        order = [self.without, self.stored][:: 1 if self.turn % 2 else -1]
        first, second = (self.without, self.stored)[:: 1 if self.turn % 4 < 2 else -1]
        pin(first, CORES[0])
        pin(second, CORES[1])
        answers = {system.label: ask(system, prompt, OUTPUT) for system in order}
        return Pair(answers[self.without.label], answers[self.stored.label])

    def keep(self, prefix: list[int]) -> None:
        """Have a prefix computed, and saved before the next one takes its place on the device."""
        before = self.saved()
        ask(self.stored, prefix + self.text(QUESTION), 1)
        expected = before + 0.95 * len(prefix) * self.token_bytes
        deadline = time.monotonic() + SAVED_S
        while self.saved() < expected and time.monotonic() < deadline:
            time.sleep(0.1)

    def saved(self) -> float:
        return sum(sample.value for sample in self.samples() if sample.labels.get("way") == "saved")

    def samples(self) -> list[Sample]:
        text = HTTP.get(f"{self.stored.url}/metrics").text
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def counts(self) -> Counter[str]:
        """The tier's faults, invalid blocks and evictions, as the router tells them, and tokens found there."""
        time.sleep(TOLD_S)
        return Counter(
            {
                "{}{{{}}}".format(
                    sample.name.removeprefix("bascule_"), sample.labels.get("reason", self.tier)
                ): sample.value
                for sample in self.samples()
                if sample.name in (*COUNTED, "bascule_kv_hit_tokens_total") and sample.labels["tier"] == self.tier
            }
        )

    def wait_back(self) -> None:
        """Until the tier is used again: each prompt is an occasion to look whether it is back."""
        deadline = time.monotonic() + BACK_S
        # The line that says that it is given up has both of these in it, the other one only the second.
        while 2 * (said := self.log.read_text()).count("doing without it") > said.count("answers again"):
            if time.monotonic() > deadline:
                sys.exit(f"{self.tier} did not come back within {BACK_S:g} s of its fault's end: {said[-2000:]}")
            ask(self.stored, self.text(SHORT), 1)
            time.sleep(0.3)


def one_round(bench: Bench, fault: Fault, found: Found) -> None:
    """With the tier at work, then with the fault."""
    old, new = bench.prefixes(OLD), bench.prefixes(NEW)
    for prefix in old:
        bench.keep(prefix)
    found.healthy += [bench.pair(prefix) for prefix in old]
    before = bench.counts()
    fault.begin()
    try:
        for number, prefix in enumerate([*old, *new, *new]):
            if number:
                fault.again()
            found.faulty.append(bench.pair(prefix))
        after = bench.counts()
    finally:
        fault.end()
    bench.wait_back()
    for name in after:
        first, _ = found.counted.get(name, (before[name], 0))
        found.counted[name] = (first, after[name])


def within(fault: Fault, rounds: int, bench: Bench) -> Found:
    found = Found()
    for number in range(rounds):
        one_round(bench, fault, found)
        print(f"{fault.name}: round {number + 1}", file=sys.stderr)
    return found


Figure = Callable[[Sequence[Pair]], float]


def ttft(pairs: Sequence[Pair]) -> float:
    """The median of the pairs' ratios."""
    return statistics.median(pair.stored.ttft_s / pair.without.ttft_s for pair in pairs)


def whole(pairs: Sequence[Pair]) -> float:
    """p90 of whole requests, over the same of the other server."""
    return p90([pair.stored.total_s for pair in pairs]) / p90([pair.without.total_s for pair in pairs])


def p90(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.9 * len(values)))]


def interval(pairs: Sequence[Pair], figure: Figure) -> str:
    draw = random.Random(1)
    drawn = sorted(figure(draw.choices(pairs, k=len(pairs))) for _ in range(DRAWS))
    return f"{figure(pairs):.2f} ({drawn[int(0.025 * DRAWS)]:.2f}-{drawn[int(0.975 * DRAWS)]:.2f})"


def row(fault: Fault, found: Found) -> str:
    pairs = found.healthy + found.faulty
    longest = max(pair.stored.ttft_s - pair.without.ttft_s for pair in found.faulty)
    loaded = sum(sum(pair.stored.loaded.values()) for pair in found.healthy)
    share = loaded / sum(pair.stored.prompt for pair in found.healthy)
    moved = [f"{name} {was:g} → {now:g}" for name, (was, now) in sorted(found.counted.items()) if now != was]
    cells = [
        fault.name,
        f"{ttft(found.healthy):.2f}",
        f"{share:.0%}",
        interval(found.faulty, ttft),
        interval(found.faulty, whole),
        f"{longest:+.2f}",
        "; ".join(moved) or "nothing",
        f"{sum(pair.same for pair in pairs)} of {len(pairs)}",
    ]
    return f"| {' | '.join(cells)} |"


def server(label: str, core: int, flags: list[str], folder: Path, arguments: argparse.Namespace) -> tuple[System, Path]:
    ready, log = folder / f"ready-{label}", folder / f"{label}.log"
    command = [sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", "--policy", "single"]
    command += ["--devices", f"cpu:{core}", "--ready-file", str(ready), "--dtype", arguments.dtype]
    command += ["--kv-memory", str(arguments.token_bytes * (LENGTHS[1] + 400)), *flags]
    return arguments.stack.enter_context(running(label, arguments.model, command, ready, log)), log


def measure(tier: str, without: System, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """All faults of a tier; what was not as it must be."""
    stack: ExitStack = arguments.stack
    if tier == "remote":
        place = stack.enter_context(remote())
        flags = ["--kv-remote", f"redis://127.0.0.1:{place.port}"]
    else:
        place = stack.enter_context(disk(folder))
        flags = ["--kv-disk", f"{place.directory}:{TIER}"]
    stored, log = server(tier, CORES[1], flags, folder, arguments)
    bench = Bench(without, stored, tier, log, random.Random(arguments.seed), arguments.token_bytes)
    ask(without, text := bench.text(LENGTHS[0]))
    ask(stored, text)
    wrong = []
    for fault in place.faults():
        if arguments.only in fault.name:
            found = within(fault, arguments.rounds, bench)
            print(row(fault, found), flush=True)
            if not all(pair.same for pair in found.healthy + found.faulty):
                wrong.append(f"{fault.name}: an answer was not that of the server without a store")
            if max(ttft(found.faulty), whole(found.faulty)) > MOST:
                wrong.append(f"{fault.name}: over {MOST} times the server without a store")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tiers", default="remote,disk")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for logs and the mount (default: a temporary one)")
    arguments = parser.parse_args()
    arguments.token_bytes = TOKEN_BYTES * (2 if arguments.dtype == "float32" else 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    print("| fault | TTFT before | loaded before | TTFT | p90 of requests | longest, s | counted by | same answers |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bascule-bench-") as temporary, ExitStack() as outer:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        arguments.stack = outer
        without, _ = server("none", CORES[0], [], folder, arguments)
        for tier in arguments.tiers.split(","):
            with ExitStack() as arguments.stack:
                wrong += measure(tier, without, arguments, folder)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
