"""A step's numbers for the kernels: one array of int32, filled in pinned memory and copied at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bascule.engine.torch.plan import SequencePlan, StepPlan

_ALIGNED = 16
"""Numbers to whose multiples parts of the array are aligned, so that a kernel is compiled once for all steps."""


class Shape(NamedTuple):
    """How many there are of what; the numbers of two steps of one shape lie alike."""

    tokens: int
    drawn: int
    singles: int
    """Sequences with one token, which come first in the table."""
    chunks: int
    """Sequences with more."""
    width: int
    """Blocks of a row of the table."""
    tiles: int

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the arrays, in the order of `StepNumbers`."""
        return (
            *((self.tokens,),) * 3,
            (self.drawn,),
            *((self.singles,),) * 2,
            (self.singles + self.chunks, self.width),
            (self.tiles, 4),
        )

    @property
    def size(self) -> int:
        return sum(_aligned(math.prod(part)) for part in self.parts)


class StepNumbers(NamedTuple):
    """Views into one array; what each is for says `launch.py`."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    """[tokens]; -1 for a row of padding."""
    drawn: Tensor
    rows: Tensor
    """[singles] row of each sequence's token."""
    lengths: Tensor
    """[singles] positions that it sees; 0 for padding."""
    table: Tensor
    tiles: Tensor


def width_of(blocks: int) -> int:
    """Of a table that has room for so many blocks a row."""
    return max(_ALIGNED, _aligned(blocks))


def shape_of(plan: StepPlan, rows: int) -> Shape:
    """The shape of `plan` without padding, its chunks in tiles of `rows` tokens."""
    chunks = [sequence for sequence in plan.sequences if sequence.tokens > 1]
    return Shape(
        tokens=len(plan.tokens),
        drawn=len(plan.drawn),
        singles=len(plan.sequences) - len(chunks),
        chunks=len(chunks),
        width=width_of(max(len(sequence.blocks) for sequence in plan.sequences)),
        tiles=sum(-(-sequence.tokens // rows) for sequence in chunks),
    )


def numbers_in(memory: Tensor, shape: Shape) -> StepNumbers:
    """`memory` (int32, at least `shape.size`) as the arrays of `shape`."""
    found, at = [], 0
    for part in shape.parts:
        count = math.prod(part)
        found.append(memory[at : at + count].view(part))
        at += _aligned(count)
    return StepNumbers(*found)


def fill(memory: Tensor, plan: StepPlan, shape: Shape, rows: int) -> None:
    """Write `plan` into `memory` of `shape`, which may have more tokens and single sequences than it: padding.

    A row of padding computes what nobody reads: token 0 that is stored nowhere and sees nothing. `rows` is that of
    `shape_of`.
    """
    memory[: shape.size].zero_()
    tokens, positions, slots, drawn, single_rows, lengths, table, tiles = (
        part.numpy() for part in numbers_in(memory, shape)
    )
    singles = [sequence for sequence in plan.sequences if sequence.tokens == 1]
    chunks = [sequence for sequence in plan.sequences if sequence.tokens > 1]
    last, count = len(plan.tokens), len(singles)
    tokens[:last] = plan.tokens
    positions[:last] = plan.positions
    slots[:last] = plan.slots
    slots[last:] = -1
    drawn[:] = plan.drawn[: shape.drawn]
    single_rows[:count] = [sequence.rows.start for sequence in singles]
    single_rows[count:] = range(last, last + shape.singles - count)
    lengths[:count] = [sequence.end for sequence in singles]
    for row, sequence in zip(table, (*singles, *chunks), strict=False):
        row[: len(sequence.blocks)] = sequence.blocks
    if chunks:
        tiles[:] = _tiles(chunks, count, rows)


class Inputs:
    """The way of a step's numbers to `device`: through pinned memory, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.int32)
        self._sent: torch.cuda.Event | None = None
        """The memory has been read, up to the last copy."""

    def send(self, plan: StepPlan, shape: Shape, rows: int, slots: int, target: Tensor | None = None) -> Tensor:
        """The numbers of `plan` on the device, in `target` if it is given; the rest as in `fill`.

        Raises IndexError for a block or a slot that is not among the `slots` of the KV memory.
        """
        memory = self._room(shape.size)
        fill(memory, plan, shape, rows)
        _check_bounds(numbers_in(memory, shape), plan, slots)
        if target is None:
            target = torch.empty(shape.size, dtype=torch.int32, device=self._device)
        target.copy_(memory[: shape.size], non_blocking=True)
        if self._device.type == "cuda":
            self._sent = self._sent or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()
        return target

    def _room(self, size: int) -> Tensor:
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._memory) < size:
            room = 1 << (size - 1).bit_length()
            self._memory = torch.empty(room, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        return self._memory


def _check_bounds(numbers: StepNumbers, plan: StepPlan, slots: int) -> None:
    """The kernels look at no bounds."""
    # Read as unsigned a negative number is a large one.
    last = int(numbers.table.numpy().view(np.uint32).max())
    if (last + 1) * plan.sequences[0].block_size > slots or int(plan.slots.max()) >= slots:
        raise IndexError(f"a block is not among the {slots} slots of the KV memory")


def _tiles(chunks: Sequence[SequencePlan], first: int, rows: int) -> list[tuple[int, int, int, int]]:
    """Tiles of `launch.attend_chunks` for sequences from row `first` of the table on; the longest work comes first."""
    tiles = [
        (chunk.rows.start + done, min(rows, chunk.tokens - done), chunk.start + done, first + index)
        for index, chunk in enumerate(chunks)
        for done in range(0, chunk.tokens, rows)
    ]
    return sorted(tiles, key=lambda tile: -tile[2])


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
