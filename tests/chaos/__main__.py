"""`python -m chaos`: random faults against real processes, told by a seed; exit code 1 if anything went wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bascule.bench.footprints import Trend
from bascule.bench.footprints import table as footprint_table
from chaos.clients import Ended
from chaos.run import Chaos, Verdict, table, too_many_failed


def one_run(seed: int, requests: int, faults: int, limit_s: float, mean_gap_s: float) -> Verdict:
    """One cluster from its start to its end; its folder, with all logs, stays where something was wrong."""
    folder = Path(tempfile.mkdtemp(prefix=f"bascule-chaos-{seed}-"))
    verdict = asyncio.run(_run(seed, folder, requests, faults, limit_s, mean_gap_s))
    _tell(verdict, folder, f"--rounds 1 --seed {seed}")
    return verdict


def one_soak(seed: int, seconds: float, share: float, mean_gap_s: float) -> tuple[Verdict, list[Trend]]:
    """As `one_run`, but for so long, under `share` of the load that the cluster can take; and what processes held."""
    folder = Path(tempfile.mkdtemp(prefix=f"bascule-soak-{seed}-"))
    verdict, trends = asyncio.run(_soak(seed, folder, seconds, share, mean_gap_s))
    print(f"\n{footprint_table(trends)}\n")
    _tell(verdict, folder, f"--soak --seed {seed}")
    return verdict, trends


def _tell(verdict: Verdict, folder: Path, again: str) -> None:
    say = print
    say(f"seed {verdict.seed} ({verdict.layout}): {verdict.befallen} faults, and {verdict.client_faults} clients that")
    say(f"  misbehave, over {len(verdict.ended)} requests in {verdict.seconds:.0f} s")
    say(f"  requests: {dict(Counter(one.verdict for one in verdict.ended))}")
    for (manner, status, error), count in Counter(_error(one) for one in verdict.ended if one.error).items():
        say(f"  {count} x {manner}, {status}: {error}")
    say(f"  workers that ended unasked: {dict(verdict.unasked)}; faults without an occasion: {verdict.never_met}")
    for one in verdict.failed:
        say(f"  FAILED {one.explain()}")
    if verdict.violations or verdict.failed:
        for violation in verdict.violations:
            say(f"  VIOLATION {violation}")
        with (folder / "requests.json").open("w") as file:
            json.dump([one.explain() for one in verdict.ended if one.verdict not in ("exact", "left")], file, indent=1)
        say(f"  logs and requests.json: {folder}; again: python -m chaos {again}")
    else:
        shutil.rmtree(folder)
    sys.stdout.flush()


def _error(ended: Ended) -> tuple[str, int, str]:
    """What clients of one manner were told, without what differs from one to the next."""
    return ended.asked.manner, ended.status, re.sub(r"\d[\d.]*", "#", ended.error)[:160]


async def _run(seed: int, folder: Path, requests: int, faults: int, limit_s: float, mean_gap_s: float) -> Verdict:
    chaos = Chaos(seed, folder, mean_gap_s, lambda line: print(line, flush=True))
    return await chaos.run(requests, faults, limit_s)


async def _soak(
    seed: int, folder: Path, seconds: float, share: float, mean_gap_s: float
) -> tuple[Verdict, list[Trend]]:
    chaos = Chaos(seed, folder, mean_gap_s, lambda line: print(line, flush=True), steady=True)
    verdict = await chaos.soak(seconds, share)
    return verdict, chaos.trends


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next ones have the next numbers")
    parser.add_argument("--rounds", type=int, default=5, help="runs, each with a cluster of its own (5: every layout)")
    parser.add_argument("--requests", type=int, default=2000, help="at least, over all runs")
    parser.add_argument("--faults", type=int, default=300, help="at least, over all runs; those of clients not counted")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="after which it is given up, over all runs; of a soak, all of it"
    )
    parser.add_argument("--gap", type=float, default=0.9, help="mean seconds between two faults")
    parser.add_argument("--soak", action="store_true", help="one long run in which memory and open files are judged")
    parser.add_argument("--load", type=float, default=0.7, help="of a soak: share of what the cluster can take")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the processes
    if given.soak:
        verdict, _ = one_soak(given.seed, 60 * given.minutes, given.load, given.gap)
        print("steady" if not verdict.violations else f"{len(verdict.violations)} violations")
        return 1 if verdict.violations or too_many_failed([verdict]) else 0
    share = (-(-given.requests // given.rounds), -(-given.faults // given.rounds), 60 * given.minutes / given.rounds)
    verdicts = []
    for seed in range(given.seed, given.seed + given.rounds):
        print(f"seed {seed}", flush=True)
        verdicts.append(one_run(seed, *share, given.gap))
    ended = [one for verdict in verdicts for one in verdict.ended]
    found = Counter(one.verdict for one in ended)
    wrong = sum(len(verdict.violations) for verdict in verdicts)
    print(f"\n{table(verdicts)}\n")
    print(f"{sum(verdict.befallen for verdict in verdicts)} faults over {len(ended)} requests, {dict(found)}")
    failed, fair = sum(len(one.failed) for one in verdicts), sum(one.asked_fairly for one in verdicts)
    print(f"{failed} of {fair} requests of clients that behave failed though a worker was there")
    print(f"seeds {given.seed} to {given.seed + given.rounds - 1}: {wrong} violations")
    return 1 if wrong or too_many_failed(verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
