"""How long requests have: what outlives its time here is nobody's, as its router has ended it long ago, or is gone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from bascule.clock import Clock, WallClock
from bascule.engine.sequence import Key

log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""The router ends a request in time, and says so; only after that is it this worker's business."""


class Deadlines:
    """Of the requests that this worker knows; runs in the asyncio loop."""

    def __init__(self, cancel: Callable[[Key], None] = lambda _: None, clock: Clock = WallClock()) -> None:
        """`cancel` ends a request wherever it is."""
        self._cancel = cancel
        self._clock = clock
        self._ends: dict[Key, float] = {}

    def bound(self, key: Key, seconds: float) -> None:
        """The request has so long from now on."""
        if seconds < math.inf:
            self._ends[key] = self._clock.now() + seconds

    def left(self, key: Key) -> float:
        """Seconds that a request still has."""
        return self._ends.get(key, math.inf) - self._clock.now()

    def forget(self, key: Key) -> None:
        """The request has ended here."""
        self._ends.pop(key, None)

    def check(self) -> None:
        """Called now and then: end what is over its time."""
        over = self._clock.now() - _GRACE_S
        for key in [key for key, end in self._ends.items() if end < over]:
            log.info(
                "request %s is over its time limit, and the router has not ended it; ending what is here", key.request
            )
            self.forget(key)
            self._cancel(key)
