"""What one step computes and where its KV lies, worked out once a step and shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bascule.engine.protocol import Slice
from bascule.kv.arena import runs


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One slice of the batch, as attention sees it.

    `rows` are its tokens among the packed tokens of the step. `context` are the runs of arena slots that hold its keys
    and values from position 0 through its last token, in order.
    """

    rows: slice
    context: tuple[slice, ...]
    mask: Tensor | None
    """What is added to the scores, [tokens, context], where a chunk follows KV of earlier steps; else None."""

    @property
    def tokens(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All slices of a batch, their tokens packed one after the other (T in total).

    A slot is a position of the arena: block `b` holds the slots `b * block_size` to `(b + 1) * block_size - 1`.
    """

    tokens: Tensor
    """[T] token ids."""
    positions: Tensor
    """[T] place of each token in its own sequence."""
    slots: Tensor
    """[T] where each token's keys and values go."""
    drawn: Tensor
    """Rows after which a token is drawn."""
    sequences: tuple[SequencePlan, ...]


def plan_step(batch: Sequence[Slice], block_size: int, dtype: torch.dtype, device: torch.device) -> StepPlan:
    """Lay out `batch`; masks get `dtype`. Raises ValueError for an empty slice or a block table that is too short."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    drawn: list[int] = []
    sequences: list[SequencePlan] = []
    for part in batch:
        first, end = len(tokens), part.start + len(part.tokens)
        context = _context(part, block_size)
        tokens.extend(part.tokens)
        positions.extend(range(part.start, end))
        slots.extend(_slots_from(context, part.start))
        if part.sampling is not None:
            drawn.append(len(tokens) - 1)
        mask = _causal_mask(part.start, len(part.tokens), dtype, device)
        sequences.append(SequencePlan(rows=slice(first, len(tokens)), context=context, mask=mask))
    return StepPlan(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        drawn=torch.tensor(drawn, dtype=torch.long, device=device),
        sequences=tuple(sequences),
    )


def _context(part: Slice, block_size: int) -> tuple[slice, ...]:
    """The slots of positions 0 through the slice's last token, one `slice` a run of adjacent blocks."""
    end = part.start + len(part.tokens)
    blocks = part.blocks[: -(-end // block_size)]
    if not part.tokens or len(blocks) * block_size < end:
        raise ValueError(f"a slice of {len(part.tokens)} tokens from {part.start} over {len(part.blocks)} blocks")
    found: list[slice] = []
    left = end
    for run in runs(blocks):
        count = min(left, run.count * block_size)
        found.append(slice(run.start * block_size, run.start * block_size + count))
        left -= count
    return tuple(found)


def _slots_from(context: tuple[slice, ...], start: int) -> list[int]:
    """The slots of the positions from `start` on."""
    found: list[int] = []
    passed = 0
    for piece in context:
        found.extend(range(piece.start + max(0, start - passed), piece.stop))
        passed += piece.stop - piece.start
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
