"""The benchmark of GPUs, as far as none is needed: its model, its table, and what it says where there is none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.bench.engine import DecodeCell, EngineReport, LimitRates, PrefillCell
from bascule.engine.torch.weights import load_weights
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import resolve

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 96, "vocab": 120}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_the_model_is_whole_and_the_same_every_time(gpu: Any, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        gpu.write_model(folder, TINY)
    spec = ModelDirectory(folders[0]).spec()
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (2, 64, 4, 2, 16)
    assert spec.rope_scaling.factor == 8.0 and spec.eos_token_ids == ()
    one, two = (load_weights(spec, resolve(str(folder)), torch.bfloat16) for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)
    stamp = (folders[0] / "outer.safetensors").stat().st_mtime_ns
    gpu.write_model(folders[0], TINY)
    assert (folders[0] / "outer.safetensors").stat().st_mtime_ns == stamp
    gpu.write_model(folders[0], TINY | {"vocab": 130})
    assert ModelDirectory(folders[0]).spec().vocab == 130


def test_shares_are_of_the_limits_of_the_same_run(gpu: Any, tmp_path: Path) -> None:
    gpu.write_model(tmp_path, TINY)
    spec = ModelDirectory(tmp_path).spec()
    weights = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 96)
    assert gpu.prefill_flops(spec, 100) == 2 * 100 * weights + 2 * 2 * 2 * 64 * 100 * 100 / 2
    report = EngineReport(
        machine="",
        model="",
        threads=1,
        rounds=1,
        limits=LimitRates(read_bytes_per_s=2e9, gemm_flops=gpu.prefill_flops(spec, 100) / 0.05),
        decode=[DecodeCell(weights="bf16", batch=batch, context=50, limit_s=batch * 1e-3) for batch in (1, 4)],
        prefill=[PrefillCell(weights="bf16", tokens=100, chunk=100)],
    )
    ours, theirs = gpu.Times({1: [2e-3, 9e-3, 1e-3], 4: [5e-3]}, [0.1]), gpu.Times({1: [4e-3], 4: [8e-3]}, [0.2])
    lines = gpu.tables(spec, [report], {"ours": ours, "theirs": theirs}, 50, 100).splitlines()
    assert "| 1 | 1.00 | 2.00 | 50% | 4.00 | 25% |" in lines
    assert "| 4 | 4.00 | 5.00 | 80% | 8.00 | 50% |" in lines
    assert "| 100 tokens | 1,000 | 50% | 500 | 25% |" in lines
    assert len({line.count("|") for line in lines[2:6]}) == 1


def test_without_a_gpu_it_says_so() -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)
    assert ended.returncode == 1
    assert ended.stderr.strip() == "this needs a CUDA device and torch's build for CUDA, and torch finds none here"
