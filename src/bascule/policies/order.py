"""In what order those that wait go: the shortest work first, with ageing, by keys that never change."""

from __future__ import annotations

AGEING = 1.0
"""Seconds of work by which a waiting request moves up for each second that it waits: one that takes two seconds is
overtaken only by shorter ones that come within the two seconds after it."""


def place_in_line(priority: int, work_s: float, due_s: float) -> tuple[int, float]:
    """A key to wait by, the smallest first: by priority, then the shortest work with ageing, the sooner due the better.

    `due_s` is when the first token should be there (or when each came), on the same clock for all; the key does not
    change as time passes.
    """
    return priority, work_s + AGEING * due_s
