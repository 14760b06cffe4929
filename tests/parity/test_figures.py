"""Live serving beside the simulation of it, shortly; `benchmarks/sim_parity.py` is the long form."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import msgspec

from bascule.bench.load import Run, offer
from bascule.sim.cluster import Cluster, Pool
from bascule.sim.run import Simulation
from bascule.sim.worker import Kind
from bascule.traffic.workloads import talks
from bascule.types import CostModel, Role
from support.cluster import serve

COST = CostModel(step_s=0.02, token_s=0.0005, context_s=1e-6, stream_s=(0.03, 0.035, 0.04))
"""Slow enough for a busy machine to keep up with."""
REQUESTS, CLIENTS = 4, 4
ROUNDS = 4
"""One of them must be as simulated; the others may have met with a machine that stood still."""


def test_live_serving_takes_about_as_long_as_simulated(tmp_path: Path) -> None:
    """On a machine with other things to do it may take up to twice as long; never much less."""
    cost = tmp_path / "cost.json"
    cost.write_bytes(msgspec.json.encode(COST))
    flags = ("--engine", "mock", "--cost-model", str(cost), "--policy", "replicated", "--kv-memory", "1MiB")
    kind = Kind(name="core", cost=COST, kv_tokens=32_768)
    given = Cluster(policy="replicated", pools=(Pool(Role.MIXED, kind, 2),), kv_token_bytes=32)
    seen = []
    with serve("smollm2", *flags) as cluster:
        for seed in range(1, ROUNDS + 1):
            asked = talks("chat", REQUESTS, seed)
            live = asyncio.run(offer(cluster.url, cluster.model, asked, CLIENTS))
            simulated = Simulation(given).offer(asked, CLIENTS).run
            assert not [record.error for record in (*live.records, *simulated.records) if record.error]
            seen.append([figure(live) / figure(simulated) for figure in (_tpot, _seconds_a_token, _ttft)])
            if all(0.8 < ratio < 2 for ratio in seen[-1]):
                return
    raise AssertionError(f"live over simulated, of a token, the output and TTFT: {seen}")


def _tpot(run: Run) -> float:
    return run.figures()["tpot_mean"]


def _seconds_a_token(run: Run) -> float:
    return 1 / run.output_tokens_per_s


def _ttft(run: Run) -> float:
    return statistics.median(record.ttft for record in run.records)
