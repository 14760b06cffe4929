"""Whether a model is computed by the kernels on a GPU here: they are tried on the device before they are used."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from msgspec.structs import replace
from torch import Tensor

from bascule.engine.protocol import Slice
from bascule.engine.torch.model import Decoder
from bascule.engine.torch.plan import Forward, StepPlan, plan_step
from bascule.engine.torch.weights import expected_shapes
from bascule.models.spec import ModelSpec
from bascule.types import SamplingParams

_HEAD_SIZES = (16, 32, 64, 128, 256)
_BLOCK = 16
_VOCAB = 64
_STEPS = ([300, 0], [1, 40], [30, 1], [1, 1], [1, 1])
"""Tokens that two sequences get: a prompt, a chunk beside a single token, and the same step of decoding twice."""
_ALLOWED = 0.05
"""Of the logits' size: bfloat16 leaves a hundredth, a mistake leaves nothing of them."""


def why_not(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels are not for this model on this CUDA device, in a sentence; None if they are.

    Takes seconds: they are compiled, and compute one layer of the model's shape beside torch.
    """
    if dtype is not torch.bfloat16:
        return "the kernels for GPUs compute bfloat16 only"
    if spec.head_dim not in _HEAD_SIZES:
        return f"the kernels for GPUs want heads of {', '.join(map(str, _HEAD_SIZES))} numbers, not {spec.head_dim}"
    if find_spec("triton") is None:
        return "Triton is not installed, which compiles the kernels for GPUs"
    from bascule.engine.torch.cuda.decoder import cuda_decoder  # needs Triton

    obstacle = difference(spec, dtype, device, cuda_decoder)
    gc.collect()  # a decoder and its graphs know each other
    torch.cuda.empty_cache()
    return obstacle


@torch.inference_mode()
def difference(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, make: Callable[[ModelSpec, dict[str, Tensor]], Forward]
) -> str | None:
    """How a decoder that `make` builds fails or differs from the plain one over random weights; None if it does not."""
    small = replace(spec, layers=1, vocab=_VOCAB)
    weights = _random_weights(small, dtype, device)
    try:
        found = _logits(make(small, dict(weights)), small, dtype, device)
    except Exception as error:  # whatever a compiler, a driver or a device may think of
        return f"the kernels for GPUs fail here ({type(error).__name__}: {error})"
    expected = _logits(Decoder(small, weights), small, dtype, device)
    for step, (mine, wanted) in enumerate(zip(found, expected, strict=True)):
        off = float((mine - wanted).norm() / wanted.norm())
        if not off < _ALLOWED:
            return f"the kernels for GPUs compute something else here than torch (step {step}: {off:.2g} of the logits)"
    return None


def _random_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    found = {}
    for name, shape in expected_shapes(spec).items():
        numbers = torch.randn(shape, generator=generator, device=device)
        scaled = numbers / math.sqrt(shape[-1]) if len(shape) > 1 else 1 + numbers / 4
        found[name] = scaled.to(dtype)
    return found


def _logits(decoder: Forward, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """After each of `_STEPS`, over KV memory that is not-a-number where nobody has written."""
    blocks = range(-(-sum(max(counts) for counts in _STEPS) // _BLOCK))
    tables = [[2 * block + 1 for block in blocks], [2 * block for block in reversed(blocks)]]
    shape = (2, 2 * len(blocks) * _BLOCK, spec.kv_heads, spec.head_dim)
    kv = torch.full(shape, float("nan"), dtype=dtype, device=device)
    done = [0, 0]
    found = []
    for counts in _STEPS:
        found.append(decoder.forward(_plan(counts, done, tables), kv).clone())
        done = [before + count for before, count in zip(done, counts, strict=True)]
    return found


def _plan(counts: list[int], done: list[int], tables: list[list[int]]) -> StepPlan:
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    return plan_step(
        [
            Slice([(7 * at + 3) % _VOCAB for at in range(start, start + count)], start, table, greedy)
            for count, start, table in zip(counts, done, tables, strict=True)
            if count
        ],
        _BLOCK,
    )
