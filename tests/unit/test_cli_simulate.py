"""`bascule simulate` from the command line: its report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bascule.cli.simulate import simulate
from bascule.errors import ConfigError
from bascule.types import CostModel

COST = CostModel(step_s=0.002, token_s=0.0002, context_s=1e-6, stream_s=(0.006, 0.007, 0.009))


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    path = tmp_path / "core.json"
    path.write_bytes(msgspec.json.encode(COST))
    return path


def a_class(folder: Path, name: str, **fields: object) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"name": name, "cost": msgspec.to_builtins(COST), **fields}))
    return path


def trace(folder: Path, lines: list[str]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def mooncake(requests: int) -> list[str]:
    return [
        json.dumps({"timestamp": 500 * n, "input_length": 1200, "output_length": 9, "hash_ids": [0, n + 1, n + 100]})
        for n in range(requests)
    ]


def test_the_report_has_a_cell_for_each_policy_and_level_and_a_verdict(
    cost: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    simulate(cost_model=cost, levels="1,4", requests=16, seeds=2, jobs=2, json=str(out))
    report = json.loads(out.read_text())
    assert [(cell["architecture"], cell["concurrency"]) for cell in report["cells"]] == [
        (name, level) for name in ("replicated", "disaggregated", "adaptive") for level in (1, 4)
    ]
    for cell in report["cells"]:
        assert cell["seeds"] == 2 and cell["completed"]["median"] >= 16 and cell["errors"]["hi"] == 0
        assert 0 < cell["ttft_s"]["p50"]["lo"] <= cell["ttft_s"]["p50"]["median"] <= cell["ttft_s"]["p90"]["hi"]
    assert {"workload", "hardware", "crossover", "verdict"} <= report.keys()
    assert report["verdict"] in capsys.readouterr().out


def test_processes_give_the_same_figures_as_none(cost: Path, tmp_path: Path) -> None:
    found = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.json"
        simulate(cost_model=cost, policies="adaptive", levels="r3", requests=12, seeds=2, jobs=jobs, json=str(out))
        [cell] = json.loads(out.read_text())["cells"]
        found.append({name: value for name, value in cell.items() if not name.startswith("took")})
    assert found[0] == found[1]


def test_classes_of_workers_serve_together_and_cost_what_they_cost(tmp_path: Path) -> None:
    fast, slow = (
        a_class(tmp_path, name, price_per_hour=price, kv_tokens=50_000)
        for name, price in (("fast", 3.0), ("slow", 1.0))
    )
    path, out = trace(tmp_path, mooncake(20)), tmp_path / "out.json"
    pools = (f"prefill=1x{fast}", f"decode=2x{slow}")
    simulate(pool=pools, policies="disaggregated", trace=path, load=0.5, seeds=1, json=str(out))
    [cell] = json.loads(out.read_text())["cells"]
    assert cell["workers"] == 3 and cell["completed"]["median"] == 20 and cell["handoffs"]["median"] == 20
    expected = 5.0 / 3600 / cell["output_tokens_per_s"]["median"] * 1e6
    assert cell["cost_per_million_output_tokens"]["median"] == pytest.approx(expected)


def test_a_trace_is_repeated_and_shared_out_over_sizes_of_cluster(cost: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    path = trace(tmp_path, mooncake(20))
    simulate(cost_model=cost, policies="adaptive", workers="2,4", trace=path, requests=60, load=0.6, json=str(out))
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["workers"], cell["requests"]["median"]) for cell in cells] == [(2, 30), (4, 60)]
    assert cells[1]["rate"] == pytest.approx(2 * cells[0]["rate"], rel=0.1)


def test_what_cannot_be_is_refused_with_what_to_do(cost: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"step_s": -1}')
    zero = tmp_path / "zero.json"
    zero.write_text("{}")
    a, b = a_class(tmp_path, "a", model="8B"), a_class(tmp_path, "b", model="70B")
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "give --hardware FILE"),
        ({"cost_model": tmp_path / "none.json"}, "none.json: No such file"),
        ({"cost_model": broken}, "broken.json is neither a hardware file nor a class of workers"),
        ({"cost_model": zero}, "steps take no time"),
        ({"pool": (f"prefill=1x{a}", f"decode=1x{b}"), "policies": "disaggregated"}, "8B, .*b.json of 70B"),
        ({"pool": ("prefill=x",)}, "is not ROLE=COUNTxCLASS"),
        ({"cost_model": cost, "levels": "r0"}, "a rate of 0 is not possible"),
        ({"cost_model": cost, "levels": "many"}, "level 'many' is neither"),
        ({"cost_model": cost, "workload": "prose"}, "workload 'prose' is not known"),
        ({"cost_model": cost, "policies": "adaptiv"}, "did you mean adaptive"),
        ({"cost_model": cost, "workers": "none"}, "--workers 'none' is not a number"),
        ({"cost_model": cost, "workers": "1"}, "disaggregated needs a prefill and a decode worker"),
        ({"cost_model": cost, "load": 0.5}, "--load needs a --trace"),
        ({"cost_model": cost, "trace": trace(tmp_path, [])}, "is empty"),
        ({"cost_model": cost, "fail": ("mixed-0",)}, "is not WORKER@SECONDS"),
        ({"cost_model": cost, "seeds": 0}, "--seeds is 0"),
    ]
    for flags, told in cases:
        with pytest.raises(ConfigError, match=told):
            simulate(**{"jobs": 1, "seeds": 1, **flags})  # type: ignore[arg-type]
