"""When to leave a failed place alone, and when to look whether it is back."""

from __future__ import annotations

from bascule.clock import Clock

FIRST_PAUSE_S = 1.0
MOST_PAUSE_S = 30.0


class Breaker:
    """Open after a failure, until a probe succeeds. Probes are due after a pause that doubles with each failed one.

    Not thread-safe: its owner has a lock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pause = FIRST_PAUSE_S
        self._probe_at = 0.0
        self._probing = False
        self.open = False

    def failed(self) -> None:
        """A call failed. Late failures of calls that began before the first one change nothing."""
        if not self.open:
            self.open = True
            self._probe_at = self._clock.now() + self._pause

    def take_probe(self) -> bool:
        """Whether the caller is to probe now and then tell `probed`; at most one does at a time."""
        due = self.open and not self._probing and self._clock.now() >= self._probe_at
        self._probing |= due
        return due

    def probed(self, succeeded: bool) -> None:
        """What the probe found."""
        self._probing = False
        self.open = not succeeded
        self._pause = FIRST_PAUSE_S if succeeded else min(2 * self._pause, MOST_PAUSE_S)
        self._probe_at = self._clock.now() + self._pause
