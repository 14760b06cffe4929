"""Rotary position embedding: which angle each position turns each pair of a head's numbers by, and the turning."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bascule.models.spec import ModelSpec, RopeKind, RopeScaling


class RopeTables(NamedTuple):
    """Cosines and signed sines for the tokens of one step, each [tokens, 1, head_dim] and float32."""

    cos: Tensor
    sin: Tensor


class Rope:
    """The angles of one model (RoFormer, section 3.4, in the half-split form of Hugging Face)."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(spec).to(device)

    def tables(self, positions: Tensor) -> RopeTables:
        """Tables for `positions` [tokens]."""
        cos, sin = self.angles(positions)
        return RopeTables(
            cos=torch.cat((cos, cos), dim=-1).unsqueeze(1),
            sin=torch.cat((-sin, sin), dim=-1).unsqueeze(1),
        )

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `positions` [tokens], each [tokens, head_dim / 2] and float32."""
        angles = torch.outer(positions.float(), self._frequencies)
        return angles.cos(), angles.sin()


def rotate(heads: Tensor, tables: RopeTables) -> Tensor:
    """Turn `heads` [tokens, heads, head_dim]; number i is paired with number i + head_dim / 2. Returns float32."""
    half = heads.shape[-1] // 2
    swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
    return torch.addcmul(heads * tables.cos, swapped, tables.sin)


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Radians a position, [head_dim / 2] float32, after the model's own scaling for long contexts."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    match scaling.kind:
        case RopeKind.NONE:
            return frequencies
        case RopeKind.LINEAR:
            return frequencies / scaling.factor
        case RopeKind.FACTORS:
            return frequencies / torch.tensor(scaling.factors)
        case RopeKind.LLAMA3:
            return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow down the frequencies that turn less than `low_freq_factor` times in the original context (Llama 3.1).

    Those that turn more than `high_freq_factor` times stay, and between the two the share kept grows linearly.
    """
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
