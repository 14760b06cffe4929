"""Time as a value that is passed in, so that live serving, tests and simulation share the same code."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds; only differences mean anything."""

    def now(self) -> float: ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to; the in-memory twin of `WallClock`."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`; raises ValueError for a negative step."""
        if seconds < 0:
            raise ValueError("time does not go backwards")
        self._now += seconds
