"""Which free blocks to take (pure): long segments, because adjacent blocks make attention and transfers fast."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def place(free: Mask, count: int, room: int, behind: int | None = None) -> list[int]:
    """Choose `count` of the `free` blocks (fewer if there are not as many), in the order of the block table.

    First those directly behind block `behind`. Of the rest, the smallest run that holds them and `room` more; failing
    that the largest run, and so on with what is left.
    """
    chosen: list[int] = []
    if behind is not None:
        chosen.extend(range(behind + 1, behind + 1 + reach(free, behind + 1, count)))
    if len(chosen) == count:
        return chosen
    starts, lengths = _runs(free)
    if chosen:
        lengths[starts == chosen[0]] = 0
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    for rank in range(len(starts)):
        needed = count - len(chosen)
        if lengths[rank] >= needed:
            fitting = int(np.count_nonzero(lengths[rank:] >= needed + room))
            start = int(starts[rank + max(fitting, 1) - 1])
            chosen.extend(range(start, start + needed))
            break
        chosen.extend(range(int(starts[rank]), int(starts[rank] + lengths[rank])))
    return chosen


def reach(free: Mask, start: int, limit: int) -> int:
    """How many blocks from `start` on are free without a gap, at most `limit`."""
    window = free[start : start + limit]
    return len(window) if window.all() else int(window.argmin())


def _runs(free: Mask) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Starts and lengths of the runs of free blocks, by ascending start."""
    edges = np.flatnonzero(np.diff(free, prepend=False, append=False))
    return edges[::2], edges[1::2] - edges[::2]
