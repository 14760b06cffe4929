"""Before the GPU's kernels are used they are tried: what fails or computes something else is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'bascule[dev]'")

from cuda_support import DEVICE, DTYPE, saved

from bascule.engine.torch.cuda import decoder, trial
from bascule.engine.torch.cuda.decoder import CudaDecoder
from bascule.engine.torch.cuda.launch import Chunks
from bascule.models.spec import ModelSpec


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_STEPS", ([20, 0], [1, 9], [3, 1], [1, 1]))


def make(spec: ModelSpec, weights: dict[str, Tensor]) -> CudaDecoder:
    return CudaDecoder(spec, weights, processors=4, chunks=Chunks(32, 16))


@pytest.mark.parametrize("name", ["llama-all-biases-no-gqa", "qwen3-normed-heads"])
def test_sound_kernels_are_used(name: str, tmp_path: Path) -> None:
    assert trial.difference(saved(name, tmp_path), DTYPE, DEVICE, make) is None


@pytest.mark.parametrize("kernel", ["attend_one", "attend_chunks", "turn", "gate"])
def test_a_kernel_that_computes_something_else_is_found(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = saved("llama3-untied", tmp_path)
    sound = getattr(decoder, kernel)
    written = {"attend_one": 5, "attend_chunks": 4, "turn": 0}.get(kernel)

    def changed(*arguments: Any, **named: Any) -> Any:
        """What it answers, or writes to, is half of what it should be."""
        found = sound(*arguments, **named)
        if written is None:
            return found / 2
        arguments[written].mul_(0.5)
        return None

    monkeypatch.setattr(decoder, kernel, changed)
    obstacle = trial.difference(spec, DTYPE, DEVICE, make)
    assert obstacle is not None and "something else" in obstacle


def test_a_kernel_that_fails_is_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(decoder, "attend_one", fails)
    obstacle = trial.difference(saved("llama3-untied", tmp_path), DTYPE, DEVICE, make)
    assert obstacle is not None and "shared memory" in obstacle


def test_what_the_kernels_are_not_for_is_said(tmp_path: Path) -> None:
    spec = saved("llama3-untied", tmp_path)
    device = torch.device("cuda", 0)
    assert "bfloat16 only" in str(trial.why_not(spec, torch.float32, device))
