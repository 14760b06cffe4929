"""`bascule plan` from the command line: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_rig import Run, runner
from msgspec.structs import replace
from planning_rig import COST, KV_TOKEN_BYTES

from bascule.analytic.predictor import Basis, Expected
from bascule.cli.main import app
from bascule.cli.serve import plan_workers
from bascule.config import PoolConfig, RoutingConfig
from bascule.planning.candidates import Candidate, Share
from bascule.planning.classes import Analytic
from bascule.planning.commands import commands
from bascule.planning.fluid import Links
from bascule.types import Role, Slo

MIXED = ("--workload", "mixed", "--requests", "40", "--seeds", "2")
FEW = ("--quick", *MIXED, "--concurrency", "2", "--devices", "2")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys, "plan")


def a_file(folder: Path, name: str, **fields: Any) -> Path:
    told = {"name": name, "cost": msgspec.to_builtins(COST), "kv_token_bytes": KV_TOKEN_BYTES, **fields}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(told))
    return path


@pytest.fixture
def core(tmp_path: Path) -> Path:
    return a_file(tmp_path, "core", price_per_hour=0.1)


def test_the_answer_has_what_scripts_rely_on_and_people_read(run: Run, core: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, printed, said = run(*MIXED, "--concurrency", 2, "--devices", 2, "--cost-model", core, "--json", out)
    assert code == 0, said
    told = json.loads(out.read_text())
    assert told["recommendation"]["pools"][0].keys() == {"role", "class", "count"}
    assert told["recommendation"]["architecture"] in ("single", "replicated", "adaptive", "disaggregated")
    assert 0 < told["expected"]["goodput_per_s"]["lo"] <= told["expected"]["goodput_per_s"]["hi"]
    assert told["cost"]["per_hour"] == pytest.approx(0.1 * told["recommendation"]["devices"])
    assert all(one["why_not"] for one in told["alternatives"]) and told["alternatives"]
    assert {one["about"] for one in told["rules_of_thumb"]} >= {"model size", "prompt length", "concurrency", "network"}
    assert {"network half as fast", "prompts twice as long"} <= {one["what"] for one in told["sensitivity"]}
    assert "crossover" in told and len(told["crossover_points"]) >= 3 and told["commands"]
    assert told["reason"] in printed and told["commands"][0] in printed and "Crossover: " in printed


@pytest.mark.parametrize(
    ("counts", "policy", "form"),
    [((1, 0, 0), "single", "serve"), ((0, 1, 2), "disaggregated", "serve"), ((0, 6, 6), "disaggregated", "apart")],
)
def test_the_commands_that_are_printed_are_taken(
    core: Path, counts: tuple[int, int, int], policy: str, form: str
) -> None:
    from planning_rig import a_class

    roles = dict(zip((Role.MIXED, Role.PREFILL, Role.DECODE), counts, strict=True))
    shares = tuple(Share(role, a_class(), count) for role, count in roles.items() if count)
    started = commands(
        Candidate(policy, shares), "smollm2", Slo(1.0, 0.06, 0.2), Links(between=1e9, within=1e9, machine_devices=8)
    )
    parsed = []
    for line in started.commands:
        words = shlex.split(line, comments=True)
        function, bound, *_ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
        parsed.append((getattr(function, "__name__", ""), bound.arguments))
    names = [name for name, _ in parsed]
    if form == "serve":
        assert names == ["serve"]
        told = parsed[0][1]
        pools: PoolConfig = told["pools"]
        routing: RoutingConfig = told["routing"]
        assert (pools.mixed or 0, pools.prefill or 0, pools.decode or 0) == counts and routing.policy == policy
        assert told["slo_config"].slo_ttft == 1.0 and told["engine_config"].kv_memory == "1024MiB"
        usable = PoolConfig(prefill=pools.prefill, decode=pools.decode, mixed=pools.mixed)
        assert len(plan_workers(usable, routing, ())) == sum(counts)
    else:
        assert names == ["cluster_key", "router", *["worker"] * sum(counts)]
        assert {told["role"] for name, told in parsed if name == "worker"} == {Role.PREFILL, Role.DECODE}
        places = [
            (line.split("machine ")[1], str(told["device"]))
            for line, (name, told) in zip(started.commands, parsed, strict=True)
            if name == "worker"
        ]
        assert len(set(places)) == 12, "no two on one device"
        assert {machine for machine, _ in places} == {"0", "1"}


def test_the_commands_start_the_engine_and_the_servers_that_were_simulated() -> None:
    from planning_rig import a_class

    links, slo = Links(between=1e9, within=1e9, machine_devices=8), Slo(1.0, 0.06, 0.2)
    core = a_class()
    gpu = replace(core, kind=replace(core.kind, chunk_tokens=2048, max_sequences=256), device="cuda")
    [line] = commands(Candidate("replicated", (Share(Role.MIXED, gpu, 2),)), "m", slo, links).commands
    assert "--devices cuda:0,cuda:1" in line and "--chunk-tokens 2048 --max-sequences 256" in line
    wide = replace(gpu, devices=4, analytic=Analytic(Basis.SEEN, Expected(0.1, 0.1), "sglang", "fp8"))
    started = commands(Candidate("replicated", (Share(Role.MIXED, wide, 3),)), "m", slo, links)
    assert [line[: line.index(" vllm")] for line in started.commands[:-1]] == [
        "CUDA_VISIBLE_DEVICES=0,1,2,3",
        "CUDA_VISIBLE_DEVICES=4,5,6,7",
        "CUDA_VISIBLE_DEVICES=0,1,2,3",
    ]
    assert "http://MACHINE-0:8001,http://MACHINE-0:8002,http://MACHINE-1:8003" in started.commands[-1]
    assert "sglang with fp8 weights" in started.note


def test_a_profile_of_traffic_and_a_trace_are_planned_for_and_repeat(run: Run, core: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        json.dumps({"timestamp": 400 * n, "input_length": 700, "output_length": 20, "hash_ids": [n % 4, 10 + n]})
        for n in range(40)
    ]
    trace.write_text("\n".join(lines))
    found = []
    for name in ("one.json", "two.json"):
        flags = ("--trace", trace, "--devices", 2, "--cost-model", core, "--seeds", 1, "--requests", 24)
        code, _, said = run(*flags, "--json", tmp_path / name)
        assert code == 0, said
        found.append(json.loads((tmp_path / name).read_text()))
    assert found[0] == found[1]
    assert found[0]["traffic"]["rate"] == pytest.approx(2.5, rel=0.05)
    assert found[0]["traffic"]["prefix_reuse"] == pytest.approx(0.66, abs=0.1)
    assert {"prefix reuse half as large", "prefix reuse twice as large"} <= {
        one["what"] for one in found[0]["sensitivity"]
    }


def test_catalogue_hardware_is_planned_with_in_money_and_says_how_sure_it_is(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ("--budget", 6, "--hardware", "h100_sxm,a100", "--tp", 1, "--model", "meta-llama/Llama-3.1-8B")
    code, printed, said = run("--quick", *MIXED, "--rate", 8, *flags, "--json", out)
    assert code == 0, said
    told = json.loads(out.read_text())
    assert told["cost"]["per_hour"] <= 6 and told["cost"]["per_million_output_tokens"] > 0
    assert 0 < told["confidence"]["step_error"] < 1 and "by the catalogue" in printed
    assert "--device cuda:0" in printed or "--devices cuda:0" in printed


def test_a_budget_that_is_too_small_ends_with_2_and_tells_what_would_do(run: Run, core: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ("--quick", "--workload", "chat", "--rate", 16, "--requests", 60, "--seeds", 2, "--slo-tpot", 0.03)
    code, printed, said = run(*flags, "--slo-ttft", 1, "--devices", 1, "--cost-model", core, "--json", out)
    assert code == 2 and "the smallest that would do is" in said
    assert "Recommendation: single" in printed
    told = json.loads(out.read_text())
    assert told["keeps_slo"] is False and told["smallest_that_would_do"]["devices"] > 1


def test_what_cannot_be_is_refused_with_what_to_do(run: Run, core: Path, tmp_path: Path) -> None:
    other = a_file(tmp_path, "other", model="70B")
    bare = a_file(tmp_path, "bare")
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    broken.write_text('{"timestamp": 0, "input_length": 9, "output_length": 9}\n{"timestamp": 1, "input_length": -9}')
    llama = ("--model", "meta-llama/Llama-3.1-8B")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--devices", 2), "give the traffic: either --workload NAME or --trace FILE"),
        (("--trace", empty, "--devices", 2, "--cost-model", core), "empty.jsonl is empty"),
        (("--trace", broken, "--devices", 2, "--cost-model", core), "broken.jsonl, line 2: "),
        (("--workload", "prose", "--rate", 1, "--devices", 2, "--cost-model", core), "workload 'prose' is not known"),
        (("--workload", "chat", "--devices", 2, "--cost-model", core), "Give --rate (requests/s) or --concurrency"),
        ((*MIXED, "--rate", -1, "--devices", 2, "--cost-model", core), "--rate is -1; it must be above 0"),
        ((*MIXED, "--concurrency", 0, "--devices", 2, "--cost-model", core), "--concurrency is 0; it must be above 0"),
        ((*MIXED, "--rate", 1, "--cost-model", core), "give a budget: --devices N, or --budget"),
        ((*MIXED, "--rate", 1, "--devices", -2, "--cost-model", core), "--devices is -2; it must be above 0"),
        ((*FEW, "--attainment", 1.5, "--cost-model", core), "--attainment is 1.5; it is a share"),
        ((*FEW, "--cost-model", core, "--slo-ttft", -1), "slo-ttft is -1.0, but must be from"),
        ((*FEW, "--cost-model", core, "--slo-ttft", 0.001), "The best reachable within 2 devices is TTFT 0."),
        ((*FEW, "--cost-model", core, "--architectures", "split"), "architecture 'split' is not known"),
        (FEW, "nothing to build from: give --cost-model FILE"),
        ((*FEW, "--cost-model", tmp_path / "none.json"), "none.json: No such file"),
        ((*FEW, "--pool-class", core), "is not NAME=FILE"),
        ((*FEW, "--pool-class", f"core={core}", "--cost-model", core), "two classes are called 'core'"),
        ((*FEW, "--cost-model", other, *llama), "class other is a cost model of 70B, and meta-llama/Llama-3.1-8B is"),
        ((*FEW, "--budget", 3, "--cost-model", bare), "class bare has no price"),
        ((*MIXED, "--rate", 1, "--budget", 0.01, "--cost-model", core), "a budget of 0.01 an hour holds no worker"),
        ((*FEW, "--hardware", "h100_sxm"), "--hardware h100_sxm needs --model"),
        (
            (*FEW, "--hardware", "h1000", *llama),
            "hardware 'h1000' is not in the catalogue; the nearest name is 'h100_sxm'",
        ),
        ((*FEW, "--hardware", "abacus", *llama), "there are a100_sxm, b200_sxm"),
        ((*FEW, "--hardware", "h10", *llama), "the nearest name is 'h100_sxm'"),
        ((*FEW, "--hardware", "h100", "--framework", "x", *llama), 'Invalid value "x" for --framework'),
        (
            (*FEW, "--hardware", "h100", *llama, "--json", "/nowhere/x.json"),
            "cannot write the report to /nowhere/x.json",
        ),
        (
            (*FEW, "--hardware", "h100_sxm", "--model", "meta-llama/Llama-3.1-9B"),
            "nearest name is 'meta-llama/Llama-3.1-8B'",
        ),
        ((*FEW, "--hardware", "h100_sxm", *llama, "--tp", 0), "--tp '0' is not a number of GPUs"),
        (
            (*FEW, "--hardware", "h100_sxm", *llama, "--weights", "int3"),
            "--weights 'int3' is not known; there are bf16",
        ),
    ]
    for flags, told in cases:
        code, _, said = run(*flags)
        assert code == 2 and told in " ".join(said.split()) and "Traceback" not in said, (flags, code, said)
