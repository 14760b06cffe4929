"""`bascule bench load` and `bascule traffic` with a real server whose workers compute nothing."""

from __future__ import annotations

import json
from pathlib import Path

from support.cluster import run_cli, serve

COST = {"step_s": 0.002, "token_s": 0.00002, "context_s": 1e-7, "stream_s": [0.002, 0.0025, 0.003, 0.004, 0.006]}


def test_load_on_a_real_server_is_counted_exactly_and_shows_in_its_traffic(tmp_path: Path) -> None:
    cost, log, figures = tmp_path / "cost.json", tmp_path / "decisions.jsonl", tmp_path / "load.json"
    cost.write_text(json.dumps(COST))
    flags = ("--engine", "mock", "--cost-model", str(cost), "--policy", "single", "--decision-log", str(log))
    offered = ("--workload", "multi-turn", "--rate", "20", "--requests", "24", "--warm-up", "2")
    with serve("smollm2", *flags) as cluster:
        run = run_cli("bench", "load", cluster.url, *offered, "--json", str(figures))
        assert run.returncode == 0, run.stderr
        report = json.loads(figures.read_text())
        assert (report["requests"], report["completed"], report["errors"]) == (24, 24, 0), report["error_messages"]
        assert report["tokens_counted_by"] == {"token_ids": 24}
        assert report["short_outputs"] == report["other_prompt_length"] == 0
        assert report["cached_tokens"] > 0.5 * report["prompt_tokens"], "a turn repeats those before it"
        seen = run_cli("traffic", cluster.url, "--json", "-")
        assert seen.returncode == 0, seen.stderr
        live = json.loads(seen.stdout)
        cluster.wait_idle()
    logged = json.loads(run_cli("traffic", str(log), "--json", "-").stdout)
    # The probe and the warm-up are there too.
    assert live["requests"] == logged["requests"] == 24 + 2 + 1
    assert live["prompt_tokens"] == logged["prompt_tokens"]
    assert live["concurrency"]["max"] >= 1
    assert logged["reuse"]["share"] > 0.5
    assert logged["generator"]["block_tokens"] == 16
