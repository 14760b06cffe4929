"""Requests that wait unbound at the router, in the order of their keys."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import count

from bascule.router.flight import Flight
from bascule.types import RequestId

Key = tuple[int, float]

FIRST: Key = (-(1 << 62), 0.0)
"""Of requests that have been placed before: they go before all others."""

_STALE = 64
"""Entries of requests that wait no more, and twice as many as wait: then they are cleared out, for their prompts."""


_PACED, _FEWEST = 32, 8
"""Placements from which the pace is taken, and without which nothing is said of it."""


class Line:
    """A priority queue from which requests may be taken out anywhere."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, Flight]] = []
        self._live: dict[RequestId, int] = {}
        self._work: dict[RequestId, float] = {}
        self._work_s = 0.0
        """All of it together."""
        self._keys: dict[RequestId, Key] = {}
        self._demoted: set[RequestId] = set()
        self._numbers = count()
        self._placed: deque[tuple[float, float]] = deque(maxlen=_PACED)
        """Of the latest that were placed while others waited: seconds since the one before, and its work."""
        self._waits_since: float | None = None
        """When the latest was placed, if somebody has waited ever since."""

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
        self._work_s += work_s
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
        later = self._keys[flight.request.id] = (key[0], key[1] + by)
        heapq.heappush(self._heap, (later, number, flight))
        return True

    def ahead_s(self, flight: Flight) -> float:
        """Seconds of work of those that will be placed before this one, as things are."""
        own = self._keys[flight.request.id]
        ahead = sum(self._work[other] for other, key in self._keys.items() if key <= own)
        return ahead - self._work[flight.request.id]

    def others_s(self, flight: Flight) -> float:
        """Seconds of work of all others that wait."""
        return max(self._work_s - self._work.get(flight.request.id, 0.0), 0.0)

    def ahead(self, flight: Flight) -> int:
        """How many will be placed before this one, as things are."""
        own = self._keys[flight.request.id]
        return sum(key <= own for key in self._keys.values()) - 1

    def among_s(self, flight: Flight) -> float:
        """Seconds of work of all others that wait with its priority or a better one, whoever goes first."""
        own = self._keys[flight.request.id]
        return (
            sum(self._work[other] for other, key in self._keys.items() if key[0] <= own[0])
            - self._work[flight.request.id]
        )

    def pace(self, now: float) -> float | None:
        """Seconds of work that are placed in a second, as seen lately while some had to wait; None if that is not
        known."""
        if len(self._placed) < _FEWEST:
            return None
        seconds = sum(passed for passed, _ in self._placed)
        if self._waits_since is not None:
            seconds += now - self._waits_since
        work_s = sum(work for _, work in self._placed)
        return work_s / seconds if work_s and seconds else None

    def place(self, flight: Flight, now: float) -> None:
        """Take out one that goes to its workers."""
        if self._waits_since is not None:
            self._placed.append((now - self._waits_since, self._work.get(flight.request.id, 0.0)))
        self.remove(flight)
        self._waits_since = now if self._live else None

    def remove(self, flight: Flight) -> None:
        """Take a request out, wherever it stands; does nothing for one that does not wait."""
        if self._live.pop(flight.request.id, None) is not None:
            self._work_s -= self._work.pop(flight.request.id)
            del self._keys[flight.request.id]
            self._demoted.discard(flight.request.id)
            if not self._live:
                self._waits_since, self._work_s = None, 0.0
            if len(self._heap) > 2 * len(self._live) + _STALE:
                self._heap = [entry for entry in self._heap if self._live.get(entry[2].request.id) == entry[1]]
                heapq.heapify(self._heap)
