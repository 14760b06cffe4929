"""Virtual time: what is to happen, in its order. Equal times go in the order in which they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Agenda:
    """The clock of a simulation (a `Clock`), and its events."""

    def __init__(self) -> None:
        self.events = 0
        """That have happened."""
        self._now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def now(self) -> float:
        """Seconds since the simulation began."""
        return self._now

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call at `time`, or now if that is past."""
        heapq.heappush(self._heap, (max(time, self._now), next(self._numbers), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call in so many seconds."""
        heapq.heappush(self._heap, (self._now + seconds, next(self._numbers), call))

    def run(self, done: Callable[[], bool]) -> None:
        """Until `done`, or until nothing is left to happen."""
        heap = self._heap
        while heap and not done():
            self._now, _, call = heapq.heappop(heap)
            self.events += 1
            call()
