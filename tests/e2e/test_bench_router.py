"""`bascule bench router` runs, and its figures are of the kind that the contract names."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.cluster import run_cli

SMALL = ["--workers", "20", "--blocks", "12000", "--prompt-blocks", "20", "--decisions", "20"]


def test_bench_router_writes_its_figures_and_a_plot(tmp_path: Path) -> None:
    file, plot = tmp_path / "router.json", tmp_path / "router.svg"
    run = run_cli("bench", "router", *SMALL, "--json", str(file), "--plot", str(plot))
    assert run.returncode == 0, run.stderr
    assert "block events/s" in run.stdout
    report = json.loads(file.read_text())
    assert (report["workers"], report["blocks"], report["prompt_blocks"]) == (20, 12000, 20)
    for times, most in ((report["decision_s"], 60), (report["decision_cpu_s"], 1)):
        assert 0 < times["p50"] <= times["p99"] < most, "a machine may stand still for seconds"
    assert report["events_per_s"] > 10_000
    assert report["bytes_per_block"] > 0
    sizes = {(cell["workers"], cell["blocks"]) for cell in report["growth"]}
    assert sizes == {(workers, blocks) for workers in (1, 10, 20) for blocks in (10_000, 12_000)}
    assert ET.parse(plot).getroot().tag.endswith("svg")


def test_bench_router_writes_a_page_and_prints_json(tmp_path: Path) -> None:
    plot = tmp_path / "router.html"
    run = run_cli(
        "bench", "router", "--workers", "2", "--blocks", "100", "--decisions", "10", "--json", "-", "--plot", str(plot)
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["blocks"] == 100
    assert plot.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("wrong", [["--workers", "0"], ["--plot", "a.png"], ["--decisions", "1"]])
def test_bench_router_says_what_is_wrong_with_a_setting(wrong: list[str]) -> None:
    run = run_cli("bench", "router", *wrong)
    assert run.returncode == 2
    assert wrong[0] in run.stderr
