"""One system prompt for all traffic must not send all traffic to one worker, nor be computed again and again."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

from bascule.bench.load import Record, offer
from bascule.traffic.workloads import Ask, Talk
from support.cluster import Cluster, serve

WORKERS, REQUESTS, CLIENTS, SHARED, OWN, OUTPUT = 4, 160, 8, 2000, 40, 16
TRIES = 6
COST = {"step_s": 0.016, "token_s": 0.0004, "context_s": 4e-7, "stream_s": [0.016, 0.018, 0.02, 0.024, 0.032]}
"""Steps that are long beside what a busy machine takes from them."""


def conversation(number: int, attempt: int) -> Talk:
    shared = range(1000 + SHARED * attempt, 1000 + SHARED * (attempt + 1))
    own = range(20_000 + OWN * number, 20_000 + OWN * (number + 1))
    return Talk((Ask((*shared, *own), OUTPUT),))


def home(cluster: Cluster, record: Record) -> str:
    decision = cluster.http.get(f"{cluster.ready['admin_url']}/admin/decisions/{record.request}").json()
    return str(decision["chosen"]).rpartition("decode=")[2]


def test_one_system_prompt_is_spread_over_the_workers_and_found_in_the_cache(tmp_path: Path) -> None:
    """A worker that a busy machine lets stand still for a moment rightly gets less: then another prompt is tried. A
    router that sends them all to the same few does so each time."""
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(COST))
    flags = ("--engine", "mock", "--cost-model", str(cost), "--policy", "adaptive", "--mixed", str(WORKERS))
    with serve("smollm2", *flags) as cluster:
        seen: list[Counter[str]] = []
        while not seen or (uneven(seen[-1]) and len(seen) < TRIES):
            asked = [conversation(number, attempt=len(seen)) for number in range(REQUESTS)]
            run = asyncio.run(offer(cluster.url, cluster.model, asked, CLIENTS))
            assert not [record.error for record in run.records if record.error]
            seen.append(Counter(home(cluster, record) for record in run.records))
            possible = (REQUESTS - 1) * SHARED
            assert sum(record.cached for record in run.records) >= 0.9 * possible
            cluster.wait_idle()
        assert not uneven(seen[-1]), seen


def uneven(loads: Counter[str]) -> bool:
    return len(loads) < WORKERS or max(loads.values()) > 1.3 * min(loads.values())
