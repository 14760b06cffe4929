"""What one step computes and where its KV lies, worked out once a step and shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.engine.protocol import Slice
from bascule.kv.arena import runs


@dataclass(frozen=True)
class SequencePlan:
    """One slice of the batch, as attention sees it.

    `rows` are its tokens among the packed tokens of the step, the first at position `start`. `blocks`, of `block_size`
    slots each, hold its keys and values from position 0 through its last token, in order.
    """

    rows: slice
    start: int
    blocks: Sequence[int]
    block_size: int

    @property
    def tokens(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def end(self) -> int:
        """The position behind its last token, which is how many it sees."""
        return self.start + self.tokens

    @cached_property
    def context(self) -> tuple[slice, ...]:
        """The slots of its blocks through its last token, one `slice` a run of adjacent blocks."""
        found: list[slice] = []
        left = self.end
        for run in runs(self.blocks):
            count = min(left, run.count * self.block_size)
            found.append(slice(run.start * self.block_size, run.start * self.block_size + count))
            left -= count
        return tuple(found)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All slices of a batch, their tokens packed one after the other (T in total).

    A slot is a position of the arena: block `b` holds the slots `b * block_size` to `(b + 1) * block_size - 1`.
    """

    tokens: NDArray[np.int32]
    """[T] token ids."""
    positions: NDArray[np.int32]
    """[T] place of each token in its own sequence."""
    slots: NDArray[np.int64]
    """[T] where each token's keys and values go."""
    drawn: NDArray[np.int32]
    """Rows after which a token is drawn."""
    sequences: tuple[SequencePlan, ...]


class Forward(Protocol):
    """What a step needs of a decoder."""

    weight_bytes: int

    def forward(self, plan: StepPlan, kv: Tensor) -> Tensor:
        """Compute one step; returns float32 logits [rows drawn, vocab] and writes the step's KV into `kv`.

        The logits are the caller's until the next step.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A plan's arrays on the device, as torch wants them."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    drawn: Tensor
    masks: tuple[Tensor | None, ...]
    """For each sequence what is added to its scores, [tokens, context], or None (see `_causal_mask`)."""


def plan_step(batch: Sequence[Slice], block_size: int) -> StepPlan:
    """Lay out `batch`. Raises ValueError for an empty slice or a block table that is too short."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    drawn: list[int] = []
    sequences: list[SequencePlan] = []
    for part in batch:
        first, end = len(tokens), part.start + len(part.tokens)
        blocks = part.blocks[: -(-end // block_size)]
        if not part.tokens or len(blocks) * block_size < end:
            raise ValueError(f"a slice of {len(part.tokens)} tokens from {part.start} over {len(part.blocks)} blocks")
        tokens.extend(part.tokens)
        positions.extend(range(part.start, end))
        slots.extend(_slots(blocks, block_size, part.start, end))
        if part.sampling is not None:
            drawn.append(len(tokens) - 1)
        sequences.append(SequencePlan(slice(first, len(tokens)), part.start, blocks, block_size))
    return StepPlan(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int64),
        drawn=np.array(drawn, np.int32),
        sequences=tuple(sequences),
    )


def on_device(plan: StepPlan, dtype: torch.dtype, device: torch.device) -> StepTensors:
    """The plan's arrays as tensors on `device`; masks get `dtype`."""
    return StepTensors(
        tokens=torch.from_numpy(plan.tokens).to(device),
        positions=torch.from_numpy(plan.positions).to(device),
        slots=torch.from_numpy(plan.slots).to(device),
        drawn=torch.from_numpy(plan.drawn).to(device, torch.long),
        masks=tuple(_causal_mask(sequence.start, sequence.tokens, dtype, device) for sequence in plan.sequences),
    )


def _slots(blocks: Sequence[int], block_size: int, start: int, end: int) -> list[int]:
    """The slots of the positions from `start` up to `end`."""
    found: list[int] = []
    for index in range(start // block_size, len(blocks)):
        base = (blocks[index] - index) * block_size
        found.extend(range(base + max(start, index * block_size), base + min(end, (index + 1) * block_size)))
    return found


def _causal_mask(start: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Zero where a chunk's token may look, minus infinity at later positions; None where no mask is needed.

    A single token sees all of its context. A chunk from position 0 is square and masked by the kernel itself. Else
    row r is position start + r, and the kernel's own causal mask (upper left) would be wrong:

        start = 2, tokens = 3      position  0 1 2 3 4
                                   row 0     . . . x x
                                   row 1     . . . . x
                                   row 2     . . . . .
    """
    if start == 0 or tokens == 1:
        return None
    mask = torch.full((tokens, start + tokens), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(start + 1)
