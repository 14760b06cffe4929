"""Two workers on two hosts with a slow link between them: what each codec costs and saves, and when splitting pays.

    python benchmarks/slow_link.py --rates 100,1000,10000 --rounds 5 --json FILE

The hosts are network namespaces of this machine (root and iproute2 needed), with a token bucket at both ends of the
cable between them, whose rate is measured before anything else. The router and one worker (core 0) are on one host, the
other worker (core 1) is on the other one. The link has a rate and no delay. For each rate (Mbit/s):

- codecs: a cluster for each `--transfer-codec`, all up at once and in turns, request by request, with the same prompts,
  of which no two are alike. TTFT, time to the second token (which a handoff delays), TPOT over all 32, bytes on the
  cable; and `auto` beside the best of those that it chooses from, paired, with a bootstrap interval.
- routing: a closed loop of clients. `adaptive` with a prefill worker and, over the link, a mixed one; the same two with
  every request split; and the far one alone, with whole requests.

Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from routing import FEWEST_SEEDS, ratio

from bascule.bench.apart import Apart, Piece, running_apart
from bascule.bench.load import Record, offer
from bascule.bench.namespaces import Cable, NoNamespaces, two_hosts
from bascule.bench.transports import BenchFailed
from bascule.cli.models import pull_with_progress
from bascule.kv.codecs.choice import AUTOMATIC
from bascule.models import catalog
from bascule.traffic.workloads import VOCABULARY, Ask, Talk, talks

WARM_UP = 3
NEAR_ENOUGH = 1.05
"""Of the best codec's time, for `auto`."""
FIGURES = {"TTFT": "ttft", "second token": "second", "after the first": "late", "TPOT": "tpot"}


SYSTEMS = {
    "adaptive": ("adaptive", ("prefill", "mixed")),
    "split": ("disaggregated", ("prefill", "decode")),
    "whole": ("replicated", ("mixed",)),
}
"""Policy, and roles of the workers."""


@dataclass(frozen=True)
class Answer:
    """One request over the link: seconds, and bytes that crossed it."""

    ttft: float
    second: float
    """To the second token, from sending the request."""
    tpot: float
    """Mean of the times between tokens, that before the second one included."""
    crossed: int

    @property
    def late(self) -> float:
        """From the first token to the second one: what of a handoff nothing hides."""
        return self.second - self.ttft


@dataclass
class Loop:
    """One closed loop of one system."""

    latencies: list[float]
    ttft: float
    tpot: float
    split: float
    """Share of requests that were handed over."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.latencies)


@dataclass
class AtRate:
    """All that was found at one rate (Mbit/s)."""

    megabits: float
    measured: float
    """Mbit/s of one connection, headers not counted."""
    answers: dict[int, dict[str, list[Answer]]] = field(default_factory=dict)
    """By prompt length and codec, round by round."""
    loops: dict[str, list[Loop]] = field(default_factory=dict)
    """By system, seed by seed."""


def pieces(cable: Cable, roles: Sequence[str], flags: tuple[str, ...]) -> list[Piece]:
    """Workers by role: `prefill` on the near host, all others on the far one."""
    hosts = {"prefill": (cable.near, "cpu:0")}
    return [Piece(f"{role}-0", role, *hosts.get(role, (cable.far, "cpu:1")), flags) for role in roles]


def checked(run_records: Sequence[Record], what: str) -> Sequence[Record]:
    """The same records; ends the program where one has failed."""
    if wrong := [record.error for record in run_records if record.error]:
        sys.exit(f"{what}: {len(wrong)} requests failed, the first with: {wrong[0]}")
    return run_records


def hold(cluster: Apart, asked: Sequence[Talk], clients: int, what: str) -> Sequence[Record]:
    with cluster.near.inside():
        run = asyncio.run(offer(cluster.url, cluster.model, asked, clients))
    return checked(run.records, what)


def prompts(seed: int, count: int, length: int, output: int) -> list[Talk]:
    draw = random.Random(f"{seed} {length}")
    return [Talk((Ask(tuple(draw.choices(VOCABULARY, k=length)), output),)) for _ in range(count)]


def codecs(cable: Cable, found: AtRate, options: argparse.Namespace, folder: Path) -> None:
    """Every codec's cluster in turns, each with the same requests."""
    with ExitStack() as stack:
        clusters: dict[str, Apart] = {}
        for number, codec in enumerate(options.codecs):
            flags = ("--no-prefix-cache", "--kv-memory=512MiB", f"--transfer-codec={codec}")
            two = pieces(cable, ("prefill", "decode"), flags)
            started = running_apart(cable, options.model, 8100 + number, two, folder, "--policy=disaggregated")
            clusters[codec] = stack.enter_context(started)
        for number in range(options.rounds + 1):
            names = options.codecs[number % len(options.codecs) :] + options.codecs[: number % len(options.codecs)]
            for length in options.lengths:
                asked = prompts(number, 1 if number else WARM_UP, length if number else min(options.lengths), 32)
                for codec in names:
                    told = f"{found.megabits:g} Mbit/s, round {number}, {length} tokens, {codec}"
                    answer = over_the_link(cable, clusters[codec], asked, told)
                    if number:  # the round before is for warming up
                        found.answers.setdefault(length, {}).setdefault(codec, []).append(answer)


def over_the_link(cable: Cable, cluster: Apart, asked: Sequence[Talk], told: str) -> Answer:
    """The last of some requests, one after the other."""
    for talk in asked:
        before = cable.sent()
        record = hold(cluster, [talk], 1, told)[0]
        if not (route := cluster.chosen(record.request)).startswith("remote"):
            sys.exit(f"{told}: was to be handed over, and went {route}")
    answer = Answer(record.ttft, record.ttft + record.gaps[0], record.tpot, cable.sent() - before)
    print(f"{told}: {answer}", file=sys.stderr)
    return answer


def routing(cable: Cable, found: AtRate, options: argparse.Namespace, folder: Path) -> None:
    """Three systems in turns, each with the same closed loops."""
    with ExitStack() as stack:
        clusters: dict[str, Apart] = {}
        for number, (name, (policy, roles)) in enumerate(SYSTEMS.items()):
            flags = ("--kv-memory=1GiB", f"--transfer-codec={options.routing_codec}")
            several = pieces(cable, roles, flags)
            started = running_apart(cable, options.model, 8200 + number, several, folder, f"--policy={policy}")
            clusters[name] = stack.enter_context(started)
        names = list(SYSTEMS)
        for seed in range(options.seeds + 1):
            asked = talks(options.workload, options.requests, 1000 + seed)
            for name in names[seed % len(names) :] + names[: seed % len(names)]:
                told = f"{found.megabits:g} Mbit/s, seed {seed}, {name}"
                records = hold(clusters[name], asked, options.clients, told)
                went = [clusters[name].chosen(record.request).startswith("remote") for record in records]
                loop = Loop(
                    latencies=[record.e2e for record in records],
                    ttft=statistics.fmean(record.ttft for record in records),
                    tpot=statistics.fmean(record.tpot for record in records),
                    split=statistics.fmean(went),
                )
                print(f"{told}: mean {loop.mean:.3f} s, split {loop.split:.2f}", file=sys.stderr)
                if seed:  # the first is for warming up
                    found.loops.setdefault(name, []).append(loop)


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Ratio of two paired series with its interval, and whether it is within 5 %."""
    middle, low, high = ratio(ours, theirs)
    if len(ours) < FEWEST_SEEDS:
        return f"{middle:.3f} undecided (rounds: {len(ours)})"
    told = "within" if high <= NEAR_ENOUGH else "**over**" if low > NEAR_ENOUGH else "undecided"
    return f"{middle:.3f} ({low:.3f}-{high:.3f}) {told}"


def codec_tables(all_found: Sequence[AtRate], options: argparse.Namespace) -> Iterator[str]:
    """Medians, and auto beside the best of the others."""
    yield "\n**codecs**, medians\n"
    yield "| Mbit/s | prompt | codec | TTFT s | second token s | after the first, s | TPOT ms | MB on the cable |"
    yield "|" + "---|" * 8
    for found in all_found:
        for length, by_codec in found.answers.items():
            for codec in (codec for codec in options.codecs if codec in by_codec):
                answers = by_codec[codec]
                ttft, second, late, tpot = (statistics.median(series(answers, each)) for each in FIGURES.values())
                crossed = statistics.median(answer.crossed for answer in answers) / 1e6
                row = f"{ttft:.3f} | {second:.3f} | {late:.3f} | {1000 * tpot:.1f} | {crossed:.1f}"
                yield f"| {found.megabits:g} | {length} | {codec} | {row} |"
    if "auto" not in options.codecs or not {*AUTOMATIC} & {*options.codecs}:
        return
    for title, allowed in (("those that it chooses from", AUTOMATIC), ("all", options.codecs)):
        yield f"\n**auto over the best of {title}** (95 % bootstrap interval over the rounds)\n"
        yield f"| Mbit/s | prompt | {' | '.join(FIGURES)} |"
        yield "|" + "---|" * (2 + len(FIGURES))
        for found in all_found:
            for length, by_codec in found.answers.items():
                cells = [beside_the_best(by_codec, figure, allowed) for figure in FIGURES.values()]
                yield f"| {found.megabits:g} | {length} | {' | '.join(cells)} |"


def beside_the_best(by_codec: dict[str, list[Answer]], figure: str, allowed: Sequence[str]) -> str:
    """How auto compares with the one of `allowed` that has the lowest median."""
    others = {codec: series(by_codec[codec], figure) for codec in by_codec if codec in allowed and codec != "auto"}
    best = min(others, key=lambda codec: statistics.median(others[codec]))
    return f"{verdict(series(by_codec['auto'], figure), others[best])}, best {best}"


def series(answers: Sequence[Answer], figure: str) -> list[float]:
    return [getattr(answer, figure) for answer in answers]


def routing_tables(all_found: Sequence[AtRate], options: argparse.Namespace) -> Iterator[str]:
    """What each system handed over, its latencies (means over the seeds), and adaptive beside the others, paired."""
    codec, clients = options.routing_codec, options.clients
    yield f"\n**routing**, workload `{options.workload}`, {clients} clients, `--transfer-codec {codec}`\n"
    yield "| Mbit/s | system | handed over | mean latency s | TTFT s | TPOT ms | latency of adaptive over it |"
    yield "|" + "---|" * 7
    for found in all_found:
        ours = [sum(loop.latencies) for loop in found.loops["adaptive"]]
        for name in SYSTEMS:
            runs = found.loops[name]
            split, mean, ttft = (
                statistics.fmean(getattr(loop, figure) for loop in runs) for figure in ("split", "mean", "ttft")
            )
            middle, low, high = ratio(ours, [sum(loop.latencies) for loop in runs])
            against = "" if name == "adaptive" else f"{middle:.2f} ({low:.2f}-{high:.2f})"
            tpot = 1000 * statistics.fmean(loop.tpot for loop in runs)
            yield f"| {found.megabits:g} | {name} | {split:.2f} | {mean:.2f} | {ttft:.2f} | {tpot:.1f} | {against} |"


def measure(options: argparse.Namespace) -> list[AtRate]:
    """All parts at all rates."""
    parts: dict[str, Any] = {"codecs": codecs, "routing": routing}
    if options.model in catalog.CATALOG:
        pull_with_progress(options.model)
    all_found: list[AtRate] = []
    with two_hosts() as cable, tempfile.TemporaryDirectory(prefix="bascule-slow-link-") as folder:
        for megabits in map(float, options.rates.split(",")):
            cable.limit(1e6 * megabits)
            rate = statistics.median(cable.measured() for _ in range(3)) / 1e6
            print(
                f"A link of {megabits:g} Mbit/s carries {rate:.0f} (one connection, headers not counted).", flush=True
            )
            all_found.append(AtRate(megabits, rate))
            for part in options.parts.split(","):
                parts[part](cable, all_found[-1], options, Path(folder))
            if options.json:
                options.json.write_bytes(msgspec.json.encode(all_found))
    return all_found


def read(path: Path) -> list[AtRate]:
    return msgspec.json.decode(path.read_bytes(), type=list[AtRate])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="100,1000,10000", help="Mbit/s")
    parser.add_argument("--parts", default="codecs,routing")
    parser.add_argument("--codecs", default="none,int8,int4,fp8,auto")
    parser.add_argument("--lengths", default="1000,2000", help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--routing-codec", default="none")
    parser.add_argument("--workload", default="mixed")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--requests", type=int, default=10, help="of each closed loop")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path, help="write all that was found there")
    parser.add_argument("--read", type=Path, help="print the tables of what --json wrote, and measure nothing")
    options = parser.parse_args()
    options.codecs = options.codecs.split(",")
    options.lengths = [int(length) for length in options.lengths.split(",")]
    try:
        all_found = read(options.read) if options.read else measure(options)
    except NoNamespaces as error:
        sys.exit(f"two hosts cannot be made within this machine: {error}")
    except BenchFailed as error:
        sys.exit(str(error))
    for line in (
        *(codec_tables(all_found, options) if any(found.answers for found in all_found) else ()),
        *(routing_tables(all_found, options) if any(found.loops for found in all_found) else ()),
    ):
        print(line)


if __name__ == "__main__":
    main()
