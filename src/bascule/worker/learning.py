"""What a worker learns of its costs as it goes: of its steps, and of its links to decode workers."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Generic, TypeVar

import numpy as np

from bascule.engine.core import Engine
from bascule.policies.cost_fit import StepSample, fit, median_error
from bascule.policies.handoff import OTHER_MACHINE
from bascule.types import CostModel, LinkCost, WorkerId

_LEAST_SAMPLES = 8
"""Steps that a refit needs."""
_REMEMBERED = 32
"""Latest pushes and handoffs of a link of which the median counts."""
_FORGOTTEN_S = 60.0
_TELLING_BYTES = 1 << 16
"""A smaller push says how long a call takes, not how fast bytes go."""
_SHORTEST_S = 1e-6


class StepCosts:
    """Keeps the engine's cost model up to date with its steps."""

    def __init__(self, engine: Engine, start: CostModel) -> None:
        self.error: float | None = None
        """Median of |predicted - measured| / measured over the latest steps, as predicted before they were learnt."""
        self._engine = engine
        self._waiting: list[StepSample] = []
        engine.cost = start

    @property
    def model(self) -> CostModel | None:
        """None while nothing is known."""
        return self._engine.cost if self._engine.cost != CostModel() else None

    def refit(self) -> None:
        """Learn from the steps since the last call, once there are a few (takes a millisecond or two)."""
        self._waiting += self._engine.take_samples()
        if len(self._waiting) < _LEAST_SAMPLES:
            return
        samples, self._waiting = self._waiting, []
        before = self._engine.cost
        if before != CostModel():
            self.error = median_error(before, samples)
        # Steps of no time at all, which no clock has shown yet, could not be fitted: what is known stays.
        with suppress(ValueError, np.linalg.LinAlgError):
            self._engine.cost = fit(samples, before)


T = TypeVar("T")


class _Latest(Generic[T]):
    """The latest values, with the time of each."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, T]] = deque(maxlen=_REMEMBERED)

    def add(self, now: float, value: T) -> None:
        self._values.append((now, value))

    def since(self, then: float) -> list[T]:
        return [value for at, value in self._values if at >= then]


class Links:
    """What giving KV to each worker takes, by the medians of the latest times.

    What is older than a minute is forgotten, so that a link that was slow once is tried again. What the link itself
    moves is not: any push tells it, whatever the router makes of the link.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._pushes: defaultdict[WorkerId, _Latest[float]] = defaultdict(_Latest)
        """Bytes per second."""
        self._tails: defaultdict[WorkerId, _Latest[tuple[int, float]]] = defaultdict(_Latest)
        """(bytes, seconds) from the first token to the verdict."""
        self._wires: dict[tuple[WorkerId, str], deque[float]] = {}
        """Bytes per second, by transport."""

    def crossed(self, peer: WorkerId, transport: str, sent: int, seconds: float) -> None:
        """`sent` bytes, coded or not, took the link itself `seconds`."""
        if sent >= _TELLING_BYTES and seconds > _SHORTEST_S:
            self._wires.setdefault((peer, transport), deque(maxlen=_REMEMBERED)).append(sent / seconds)

    def wire_rate(self, peer: WorkerId, transport: str) -> float | None:
        """What the link itself moves, in bytes per second; None before it has moved enough to tell."""
        rates = self._wires.get((peer, transport))
        return median(rates) if rates else None

    def pushed(self, peer: WorkerId, sent: int, seconds: float) -> None:
        """A push of `sent` bytes of KV took `seconds`, in whatever form they went."""
        if sent >= _TELLING_BYTES and seconds > _SHORTEST_S:
            self._pushes[peer].add(self._now(), sent / seconds)

    def handed_over(self, peer: WorkerId, late: int, seconds: float) -> None:
        """A handoff was accepted `seconds` after its first token, `late` bytes of KV having been pushed meanwhile."""
        if seconds > 0:
            self._tails[peer].add(self._now(), (late, seconds))

    def costs(self) -> dict[WorkerId, LinkCost]:
        """Of the links that have lately been used."""
        then = self._now() - _FORGOTTEN_S
        tails = {peer: latest.since(then) for peer, latest in self._tails.items()}
        return {peer: _cost(self._pushes[peer].since(then), found) for peer, found in tails.items() if found}


def _cost(pushes: list[float], tails: list[tuple[int, float]]) -> LinkCost:
    rate = median(pushes) if pushes else OTHER_MACHINE.bytes_per_s  # no push was long enough for it to matter
    return LinkCost(median(max(seconds - late / rate, _SHORTEST_S) for late, seconds in tails), rate)
