"""Weights in the layouts that the native kernels read (`engine/native/native.h`), and quantised ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from bascule.models.gguf_file import RawTensor

GROUP = 32
"""Inputs that share a scale and an offset."""
PANEL = 32
"""Outputs that lie side by side in a packed matrix."""
_HALF = PANEL // 2


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight matrix [outputs, inputs] as codes: weight = code * scale + offset.

    `codes` is uint8 [outputs, inputs]: 0 to 15 where `bits` is 4; where it is 8, two's complement of -128 to 127.
    `scale` and `offset` are float16 [outputs, inputs / GROUP].
    """

    bits: int
    codes: Tensor
    scale: Tensor
    offset: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantised(self) -> Tensor:
        """The weights, float32 [outputs, inputs]."""
        codes = self.codes.view(torch.int8) if self.bits == 8 else self.codes
        groups = codes.float().view(len(codes), -1, GROUP)
        return (groups * self.scale.float()[..., None] + self.offset.float()[..., None]).view(len(codes), -1)


def quantised_as_stored(raw: RawTensor) -> Quantised | None:
    """The codes of a GGUF tensor, exactly; None for a type that has no such form."""
    if raw.type not in _BLOCK_BYTES:
        return None
    blocks = torch.from_numpy(np.array(raw.data)).view(len(raw.data), -1, _BLOCK_BYTES[raw.type])
    match raw.type:
        case GGMLQuantizationType.Q4_0:
            scale = _float16(blocks[..., :2])
            return Quantised(4, _nibbles(blocks[..., 2:]), scale, scale * -8)
        case GGMLQuantizationType.Q4_1:
            return Quantised(4, _nibbles(blocks[..., 4:]), _float16(blocks[..., :2]), _float16(blocks[..., 2:4]))
        case GGMLQuantizationType.Q8_0:
            scale = _float16(blocks[..., :2])
            return Quantised(8, blocks[..., 2:].reshape(len(blocks), -1), scale, torch.zeros_like(scale))
        case _:
            return None


def quantise(weight: Tensor, bits: int) -> Quantised:
    """Round `weight` [outputs, inputs] to codes of 4 or 8 bits, each group over the range of its own numbers."""
    groups = weight.float().view(len(weight), -1, GROUP)
    if bits == 8:
        scale = (groups.abs().amax(-1) / 127).half()
        codes = (groups / _positive(scale)).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        return Quantised(8, codes.view(len(weight), -1), scale, torch.zeros_like(scale))
    least = groups.amin(-1).half()
    scale = ((groups.amax(-1) - least.float()) / 15).half()
    codes = ((groups - least.float()[..., None]) / _positive(scale)).round().clamp(0, 15).to(torch.uint8)
    return Quantised(4, codes.view(len(weight), -1), scale, least)


def pack_bfloat16(weight: Tensor) -> Tensor:
    """[outputs, inputs] to [panels, inputs / 2, PANEL, 2] bfloat16, the last panel padded with zeros."""
    padded = _padded(weight.to(torch.bfloat16))
    return padded.view(-1, PANEL, padded.shape[1] // 2, 2).permute(0, 2, 1, 3).contiguous()


def pack_nibbles(weight: Quantised) -> Tensor:
    """Bytes [panels, groups, 512 a plane + 128]; see `Matrix` in native.h."""
    codes, scale, offset = (_padded(part) for part in (weight.codes, weight.scale, weight.offset))
    panels, groups = len(codes) // PANEL, codes.shape[1] // GROUP
    # [panel, half, output, group, word, nibble of the word, input of the pair]
    apart = codes.view(panels, 2, _HALF, groups, 4, 4, 2)
    planes = [apart & 15] if weight.bits == 4 else [apart & 15, apart >> 4]
    parts = []
    for plane in planes:
        wide = plane.to(torch.int32)
        words = sum(wide[..., index, :] << (4 * index) for index in range(4))
        ordered = words.to(torch.uint16).permute(0, 3, 1, 4, 2, 5).contiguous()  # type: ignore[union-attr]
        parts.append(ordered.view(torch.uint8).view(panels, groups, 512))
    for part in (scale, offset):
        by_group = part.view(panels, PANEL, groups).permute(0, 2, 1).contiguous()
        parts.append(by_group.view(torch.uint8).view(panels, groups, 2 * PANEL))
    return torch.cat(parts, dim=-1)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both [rows, ...] in turns of 16, so that a panel holds a gate and its up."""
    both = torch.stack((gate.view(-1, _HALF, *gate.shape[1:]), up.view(-1, _HALF, *up.shape[1:])), dim=1)
    return both.reshape(-1, *gate.shape[1:])


_BLOCK_BYTES = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q4_1: 20, GGMLQuantizationType.Q8_0: 34}


def _float16(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).squeeze(-1)


def _nibbles(blocks: Tensor) -> Tensor:
    """[rows, blocks, 16] bytes, low halves before high halves, to [rows, blocks * 32] codes."""
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).reshape(len(blocks), -1)


def _padded(rows: Tensor) -> Tensor:
    missing = -len(rows) % PANEL
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows


def _positive(scale: Tensor) -> Tensor:
    """For dividing groups by; where all numbers of a group are the same every code is 0."""
    wide = scale.float()[..., None]
    return torch.where(wide > 0, wide, torch.ones_like(wide))
