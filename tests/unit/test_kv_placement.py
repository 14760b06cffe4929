"""Which free blocks are taken."""

from __future__ import annotations

import numpy as np
import pytest

from bascule.kv.placement import place, reach


def mask(picture: str) -> np.ndarray:
    """`.` is free, `x` is not."""
    return np.array([mark == "." for mark in picture])


@pytest.mark.parametrize(
    ("picture", "count", "room", "behind", "chosen"),
    [
        ("..........", 3, 0, None, [0, 1, 2]),
        ("....x..x...", 2, 0, None, [5, 6]),
        ("....x..x...", 2, 1, None, [8, 9]),
        ("....x..x...", 2, 9, None, [0, 1]),
        ("..x...x.", 4, 0, None, [3, 4, 5, 7]),
        ("..x...x..", 6, 0, None, [3, 4, 5, 0, 1, 7]),
        ("x...x..", 2, 0, 0, [1, 2]),
        ("x...x..", 5, 0, 0, [1, 2, 3, 5, 6]),
        ("xx..", 1, 0, 0, [2]),
        ("...x", 2, 0, 3, [0, 1]),
        ("x.x", 2, 0, None, [1]),
        ("xxx", 1, 0, None, []),
        ("...", 0, 0, None, []),
    ],
)
def test_placement(picture: str, count: int, room: int, behind: int | None, chosen: list[int]) -> None:
    assert place(mask(picture), count, room, behind) == chosen


@pytest.mark.parametrize(
    ("start", "limit", "length"), [(0, 9, 2), (0, 1, 1), (2, 3, 0), (3, 9, 2), (5, 4, 0), (3, 0, 0)]
)
def test_reach_is_the_free_run_from_a_block_on(start: int, limit: int, length: int) -> None:
    assert reach(mask("..x.."), start, limit) == length
