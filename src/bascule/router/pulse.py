"""A worker's heartbeats as they come: those in a heap have lain somewhere, and tell of a time that nobody knows."""

from __future__ import annotations

import math

HEARTBEAT_S = 0.5
"""Between two that a worker sends."""
_HEAP_S = HEARTBEAT_S / 2
"""Those that come closer together than that come in a heap: the router stood still, or the way here did."""


class Pulse:
    """Of one worker."""

    def __init__(self) -> None:
        self.beats = 0
        """Heartbeats that have come. A heap counts as one: all of it may be from before what the router said last."""
        self._latest = -math.inf

    def beat(self, now: float) -> bool:
        """A heartbeat has come (the clock's seconds); returns whether it counts."""
        counts = now - self._latest >= _HEAP_S
        self._latest = now
        self.beats += counts
        return counts
