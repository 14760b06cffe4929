"""More requests than can be served: each ends with all of its tokens or with a refusal, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bascule.bench.load import offer
from bascule.traffic.workloads import talks
from support.cluster import serve

COST = {"step_s": 0.004, "token_s": 0.0008}
RATE, REQUESTS = 100.0, 120
"""Requests per second; the two workers can serve about twelve."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "flags",
    [
        ("--policy", "adaptive", "--admission", "slo"),
        ("--policy", "disaggregated", "--queue-limit", "16", "--reserve-timeout", "1"),
    ],
    ids=["adaptive, by SLO", "disaggregated, 16 in line"],
)
def test_every_request_under_overload_gets_all_its_tokens_or_a_refusal_that_says_when_to_come_again(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    mock = ("--engine", "mock", "--cost-model", str(tmp_path / "cost.json"), "--kv-memory", "2MiB")
    with serve("smollm2", *mock, "--max-sequences", "8", *flags) as cluster:
        run = asyncio.run(offer(cluster.url, cluster.model, talks("chat", REQUESTS, 1, RATE)))
        refused = [record for record in run.records if record.rejected]
        assert [record.error for record in run.records if record.error and not record.rejected] == []
        assert len(run.good()) + len(refused) == len(run.records) == REQUESTS
        assert run.good() and refused
        assert all(record.retry_after >= 1 for record in refused)
        state = cluster.wait_idle()
        assert (state["active"], state["queued"], state["integrity_violations"]) == (0, 0, 0)
