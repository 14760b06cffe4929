"""`bascule bench front` runs, and its figures are of the kind that the contract names."""

from __future__ import annotations

import json
from pathlib import Path

from support.cluster import run_cli


def test_bench_front_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "front.json"
    few = ["--runs", "1", "--latency-requests", "10", "--seconds", "0.2", "--concurrency", "4"]
    few += ["--stream-tokens", "16", "--request-tokens", "2"]
    run = run_cli("bench", "front", "--json", str(file), *few, timeout=120.0)
    assert run.returncode == 0, run.stderr
    assert "TTFT" in run.stdout
    report = json.loads(file.read_text())
    for latency in (report["added_ttft_s"], report["added_ttft_without_engine_s"]):
        assert 0 < latency["p50"] <= latency["p99"] < 60
    assert report["stream_tokens_per_s"] > 0
    assert report["stream_tokens_per_chunk"] >= 0.9
    assert report["requests_per_s"] > 0
    for shares in (report["stream_cpu_shares"], report["request_cpu_shares"]):
        assert shares.keys() == {"server", "worker", "client"}


def test_bench_front_says_what_is_wrong_with_a_setting() -> None:
    run = run_cli("bench", "front", "--runs", "0")
    assert run.returncode == 2
    assert "--runs" in run.stderr
