"""How far a worker's clock is off: from the time of day in its heartbeats, which come late but never early."""

from __future__ import annotations

from collections import deque

MOST_S = 2.0
"""Beyond that, what logs and records say of two hosts is no longer in order, and a person should know."""
_BEATS = 20
"""What is judged by: the one that was on its way for the shortest time is the nearest to the truth."""
_LEAST_BEATS = 4
"""The first may have waited for the router to come up."""


class ClockSkew:
    """Of one worker; nothing in the protocol goes by the time of day, so a skew is told and refuses nobody."""

    def __init__(self) -> None:
        self._apart: deque[float] = deque(maxlen=_BEATS)
        self.told = False
        """A person has been told of it."""

    def heard(self, theirs: float, ours: float) -> None:
        """A heartbeat sent at `theirs` by its sender's time of day has come at `ours` (seconds since 1970)."""
        self._apart.append(ours - theirs)

    @property
    def seconds(self) -> float | None:
        """How far the worker's clock is behind ours (ahead where negative); None while unknown."""
        return round(min(self._apart), 3) if len(self._apart) >= _LEAST_BEATS else None

    @property
    def too_large(self) -> bool:
        return self.seconds is not None and abs(self.seconds) > MOST_S


def skewed(whose: str, behind_s: float) -> str:
    """What is said of a clock that is off by too much."""
    way = "behind" if behind_s > 0 else "ahead of"
    return (
        f"the clock of {whose} is {abs(behind_s):.1f} s {way} the router's: times in logs and records of the two do "
        "not fit together; have both set by NTP (timedatectl set-ntp true)"
    )
