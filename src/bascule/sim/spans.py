"""Steps of the same streams, one after another, as one event: when each of them ends."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SLACK_S = 1e-9
"""A step counts as over so much before its end, which sums of seconds do not tell exactly."""


class Span(Struct, frozen=True):
    """The first step takes `first_s`, each further one `more_s` longer, as contexts grow."""

    begun: float
    first_s: float
    more_s: float
    steps: int

    def seconds(self, steps: int) -> float:
        """Of the first steps."""
        return steps * self.first_s + self.more_s * steps * (steps - 1) / 2

    def done(self, now: float) -> int:
        """Steps that have ended by then, of those that another follows."""
        parts = (np.array([value]) for value in (now - self.begun, self.first_s, self.more_s, float(self.steps)))
        return int(steps_done(*parts)[0])


def span_seconds(steps: Floats, first_s: Floats, more_s: Floats) -> Floats:
    """Seconds of the first steps of many spans."""
    seconds: Floats = steps * first_s + more_s * steps * (steps - 1) / 2
    return seconds


def steps_done(passed: Floats, first_s: Floats, more_s: Floats, steps: Floats) -> Floats:
    """Of many spans of `steps` steps, how many have ended `passed` seconds after they began; the last never has."""
    passed = passed + _SLACK_S
    grows = more_s > 1e-9 * first_s
    more = np.where(grows, more_s, 1.0)
    root = first_s / more - 0.5
    count = np.where(grows, np.sqrt(root * root + 2 * passed / more) - root, passed / np.maximum(first_s, _SLACK_S))
    done: Floats = np.clip(np.floor(count), 0, steps - 1)
    return done
