"""What is left of the goodput when four times as many requests come as can be served, and how soon the others know.

    python benchmarks/overload.py --systems adaptive/slo,adaptive/queue,disaggregated/slo,disaggregated/queue

A system is a policy and an admission. Its workers compute nothing: they take the time that a cost model gives. Requests
come by themselves (Poisson). First the rate with the best goodput at the SLO is looked for. Then that rate and
`--times` it take turns: goodput under overload over that of the peak beside it, the time from request to 429, and
the memory of every process, fitted (`bascule.bench.footprints`) behind a warm-up: so many small requests as fill what
is bounded by a number of requests (`--fill`), then overload. Client, router and workers share the machine's cores.
Prints Markdown; `--json FILE` writes the figures.

Ends with 1 where a bound is broken: goodput of at least 0.9 of the peak with `slo` (without it all are late), 99 of 100
refusals within 50 ms of when their requests were to be sent, memory that grows by less than 1 MB a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from layouts import System, running
from msgspec import Struct
from msgspec import json as fast_json

from bascule.bench.endpoint import Endpoint
from bascule.bench.footprints import MOST_MB_PER_MIN, Footprint, Footprints, Trend, footprint_of
from bascule.bench.load import Offer, Run, offer
from bascule.bench.quantiles import quantile
from bascule.observe.decisions import KEPT
from bascule.traffic.workloads import Kind, talks
from bascule.types import Slo

RELAXED = Slo(5.0, 0.12, 0.5)
COST = {"step_s": 0.012, "token_s": 0.0008, "context_s": 1e-6}
"""A chat prompt takes a tenth of a second, so that a prefill worker does nine or so in a second."""
SETTLED_S = 10.0
LEAST_KEPT, MOST_REFUSAL_S = 0.9, 0.05
"""Share of the peak's goodput, and seconds to all but one of a hundred refusals."""
SMALL = Kind(10, (8, 16), (1, 2))
"""Requests that cost next to nothing, to fill what keeps the latest ones."""
FLAGS = ("--engine", "mock", "--kv-memory", "2MiB", "--log-level", "warning", "--request-timeout", "30")
FLAGS += ("--slo-ttft", str(RELAXED.ttft_s), "--slo-tpot", str(RELAXED.tpot_s), "--slo-gap", str(RELAXED.gap_s))


class Found(Struct, kw_only=True):
    """What one system came to."""

    system: str
    searched: dict[str, float]
    """Goodput by rate, in the search for the peak."""
    peak_rate: float
    peaks: list[float]
    """Goodput at that rate, round by round."""
    rate: float
    overloaded: list[float]
    """Goodput at this one, each behind the peak of its round."""
    requests: int
    completed: int
    rejected: int
    late: dict[str, int]
    """Completed, but beyond a bound of the SLO."""
    errors: list[str]
    without_retry_after: int
    refusal_s: dict[str, float]
    sent_late_s: dict[str, float]
    """How long after its time the client got round to sending what was refused; part of `refusal_s`."""
    trends: list[Trend]

    @property
    def kept(self) -> float:
        """Share of the peak."""
        rounds = zip(self.overloaded, self.peaks, strict=True)
        return statistics.median(overloaded / peak if peak else 0.0 for overloaded, peak in rounds)

    @property
    def faults(self) -> list[str]:
        """Which bounds are broken, and by what; empty if none is."""
        grown = [trend for trend in self.trends if trend.mb_per_min >= MOST_MB_PER_MIN]
        found = [f"{trend.process} grows by {trend.mb_per_min:.2f} MB a minute" for trend in grown]
        if self.system.endswith("/slo") and not self.kept >= LEAST_KEPT:
            found.append(f"goodput is {self.kept:.2f} of the peak's, less than {LEAST_KEPT:g}")
        if not self.rejected:
            found.append("nobody was refused: this was no overload")
        elif not self.refusal_s["p99"] <= MOST_REFUSAL_S:
            found.append(f"1 of 100 refusals took {1000 * self.refusal_s['p99']:.0f} ms or longer")
        if not self.trends:
            found.append("no process lived long enough for its memory to be judged")
        return [f"{self.system}: {fault}" for fault in found]


def processes(system: System) -> dict[str, Footprint]:
    found = {}
    for process in system.tree():
        with suppress(psutil.Error):
            arguments = process.cmdline()
            name = arguments[arguments.index("--id") + 1] if "--id" in arguments else "router"
            found[name] = footprint_of(process)
    return found


def goodput(run: Run, seconds: float) -> float:
    """Requests per second that met the SLO and ended while others came, but for the first `SETTLED_S`: what is done
    once nobody comes any more flatters a short run."""
    ended = [record.start + record.e2e for record in run.records if record.meets(RELAXED)]
    return sum(SETTLED_S <= end <= seconds for end in ended) / (seconds - SETTLED_S)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: quantile(values, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


async def measured(system: System, label: str, arguments: argparse.Namespace) -> Found:
    """Look for the peak, warm up, overload."""

    async def at(rate: float, seconds: float, seed: int) -> Run:
        asked = talks(arguments.workload, round(rate * seconds), seed, rate)
        return await offer(system.url, system.model, asked)

    await at(2.0, 5.0, 1)
    rates = [float(rate) for rate in arguments.rates.split(",")]
    searched = {rate: goodput(await at(rate, arguments.search, 2), arguments.search) for rate in rates}
    peak_rate = max(searched, key=lambda rate: searched[rate])
    rate = arguments.times * peak_rate
    await Offer(Endpoint(url=system.url, model=system.model), concurrency=32).run(
        talks(arguments.workload, arguments.fill, 4, kinds=[SMALL])
    )
    footprints = Footprints(lambda: processes(system))
    watching = asyncio.create_task(footprints.watch())
    clock, peaks, runs = asyncio.get_running_loop().time, list[float](), list[Run]()
    begun = clock()
    await at(rate, arguments.warm_up, 3)
    warm_s = clock() - begun
    for number in range(arguments.rounds):
        peaks.append(goodput(await at(peak_rate, arguments.search, 10 + number), arguments.search))
        runs.append(await at(rate, arguments.seconds, 20 + number))
    judged_s = clock() - begun - warm_s
    watching.cancel()
    run = Run(records=tuple(record for run in runs for record in run.records), wall_s=judged_s)
    refused = [record for record in run.records if record.rejected]
    good = run.good()
    return Found(
        system=label,
        searched={f"{each:g}": value for each, value in searched.items()},
        peak_rate=peak_rate,
        peaks=peaks,
        rate=rate,
        overloaded=[goodput(run, arguments.seconds) for run in runs],
        requests=len(run.records),
        completed=len(good),
        rejected=len(refused),
        late={
            "TTFT": sum(record.ttft > RELAXED.ttft_s for record in good),
            "TPOT": sum(record.tpot > RELAXED.tpot_s for record in good),
            "gap": sum(record.gap > RELAXED.gap_s for record in good),
        },
        errors=sorted({record.error for record in run.records if record.error and not record.rejected}),
        without_retry_after=sum(record.rejected and not record.retry_after >= 1 for record in run.records),
        refusal_s=quantiles([record.answered for record in refused]),
        sent_late_s=quantiles([record.late for record in refused]),
        trends=footprints.trends(warm_s, 0.9 * judged_s),
    )


def measure(label: str, arguments: argparse.Namespace, folder: Path) -> Found:
    policy, admission = label.split("/")
    name = label.replace("/", "-")
    (folder / "cost.json").write_text(json.dumps(COST))
    ready = folder / f"ready-{name}"
    command = [sys.executable, "-m", "bascule", "serve", arguments.model, "--port", "0", "--ready-file", str(ready)]
    command += [*FLAGS, "--cost-model", str(folder / "cost.json"), "--policy", policy, "--admission", admission]
    command += arguments.flags.split()
    with running(label, arguments.model, command, ready, folder / f"{name}.log") as system:
        return asyncio.run(measured(system, label, arguments))


def report(found: Sequence[Found]) -> None:
    columns = (
        "rate | goodput | of the peak | completed | beyond TTFT TPOT gap | 429 | errors | to 429: p50 | p99 | most"
    )
    print(f"\n| system | peak, at | {columns} |\n|{'---|' * 12}")
    for one in found:
        failed = one.requests - one.completed - one.rejected
        peak, overloaded = statistics.median(one.peaks), statistics.median(one.overloaded)
        cells = [one.system, f"{peak:.2f}/s at {one.peak_rate:g}/s", f"{one.rate:g}/s", f"{overloaded:.2f}/s"]
        cells += [f"{one.kept:.2f}", str(one.completed), " ".join(map(str, one.late.values())), str(one.rejected)]
        cells += [str(failed), *(f"{1000 * one.refusal_s[name]:.1f} ms" for name in ("p50", "p99", "max"))]
        print(f"| {' | '.join(cells)} |")
    print("\n| system | process | memory | slope |\n|---|---|---|---|")
    for one in found:
        for trend in one.trends:
            memory = f"{trend.first_mb:.1f} to {trend.last_mb:.1f} MB"
            print(f"| {one.system} | {trend.process} | {memory} | {trend.mb_per_min:+.2f} MB/min |")
    for one in found:
        for error in one.errors[:5]:
            print(f"\n{one.system}: {error}")
        if one.without_retry_after:
            print(f"\n{one.system}: {one.without_retry_after} refusals without Retry-After")
        late = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in one.sent_late_s.items())
        print(f"\n{one.system}, goodput by rate: {one.searched}, peaks {one.peaks}, under overload {one.overloaded}")
        print(f"\n{one.system}, sent late by the client, of those refused: {late}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems = "adaptive/slo,adaptive/queue,disaggregated/slo,disaggregated/queue"
    parser.add_argument("--systems", default=systems, help="POLICY/ADMISSION, separated by commas")
    parser.add_argument("--rates", default="9,11,13", help="requests/s among which the peak is looked for")
    parser.add_argument("--times", type=float, default=4.0, help="of the peak's rate")
    parser.add_argument(
        "--search", type=float, default=40.0, help="seconds at each rate, and of the peak in each round"
    )
    parser.add_argument("--fill", type=int, default=KEPT + 200, help="small requests before the warm-up")
    parser.add_argument("--warm-up", type=float, default=90.0, help="seconds of overload that are not judged")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--flags", default="", help="further flags of all servers")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bascule-overload-"))
    found = []
    for label in arguments.systems.split(","):
        found.append(measure(label, arguments, folder))
        report(found[-1:])
    print("\nall of them")
    report(found)
    if arguments.json is not None:
        arguments.json.write_bytes(fast_json.format(fast_json.encode(found)))
    if faults := [fault for one in found for fault in one.faults]:
        sys.exit("\n" + "\n".join(faults))
    print("\nno bound is broken")


if __name__ == "__main__":
    main()
