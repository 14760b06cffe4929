"""Requests that wait unbound at the router, in the order of their keys."""

from __future__ import annotations

import heapq
from itertools import count

from bascule.router.flight import Flight
from bascule.types import RequestId

Key = tuple[int, float]

FIRST: Key = (-(1 << 62), 0.0)
"""Of requests that have been placed before: they go before all others."""


_STALE = 64
"""Entries of requests that wait no more, and twice as many as wait: then they are cleared out, for their prompts."""


class Line:
    """A priority queue from which requests may be taken out anywhere."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, Flight]] = []
        self._live: dict[RequestId, int] = {}
        self._work: dict[RequestId, float] = {}
        self._keys: dict[RequestId, Key] = {}
        self._demoted: set[RequestId] = set()
        self._numbers = count()
        self.work_s = 0.0
        """Of all that wait, together."""

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, flight: object) -> bool:
        return isinstance(flight, Flight) and flight.request.id in self._live

    def push(self, flight: Flight, key: Key, work_s: float) -> None:
        """Let a request wait that does not yet; `work_s` is what its prompt will take."""
        number = next(self._numbers)
        self._live[flight.request.id] = number
        self._keys[flight.request.id] = key
        self._work[flight.request.id] = work_s
        self.work_s += work_s
        heapq.heappush(self._heap, (key, number, flight))

    def head(self) -> Flight | None:
        """The next one, which goes on waiting; None if there is none."""
        while self._heap:
            _, number, flight = self._heap[0]
            if self._live.get(flight.request.id) == number:
                return flight
            heapq.heappop(self._heap)
        return None

    def demote(self, flight: Flight, by: float) -> bool:
        """Move a waiting request back, once; returns whether it was."""
        key = self._keys.get(flight.request.id)
        if key is None or flight.request.id in self._demoted:
            return False
        self._demoted.add(flight.request.id)
        number = self._live[flight.request.id] = next(self._numbers)
        heapq.heappush(self._heap, ((key[0], key[1] + by), number, flight))
        return True

    def remove(self, flight: Flight) -> None:
        """Take a request out, wherever it stands; does nothing for one that does not wait."""
        if self._live.pop(flight.request.id, None) is not None:
            work_s = self._work.pop(flight.request.id)
            self.work_s = max(0.0, self.work_s - work_s) if self._live else 0.0
            del self._keys[flight.request.id]
            self._demoted.discard(flight.request.id)
            if len(self._heap) > 2 * len(self._live) + _STALE:
                self._heap = [entry for entry in self._heap if self._live.get(entry[2].request.id) == entry[1]]
                heapq.heapify(self._heap)
