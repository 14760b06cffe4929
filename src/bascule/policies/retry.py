"""How often a request is tried, how often all of them together, and how long a worker that fails them is left alone."""

from __future__ import annotations

from enum import StrEnum

MOST_FAILURES = 3
"""Attempts of one request that workers may give up before their failure becomes the request's."""
MOST_TRIES = 5
"""Attempts of one request that may come to nothing in any way. It may be what ends the workers that it is lost with, so
this is less than how often in a row `serve` starts a worker anew."""

_SILENT_S, _SILENT_TIMES = 10.0, 2.0
_STOCK, _EARNED = 100.0, 0.2
_STRIKES = 3
_LONGEST_REST_S = 30.0


class Cause(StrEnum):
    """Why a request is placed again."""

    FAILED = "failed"
    """A worker gave it up."""
    LOST = "lost"
    """A worker that it needs is gone."""
    UNHEARD = "unheard"
    """Tokens of it, or the request itself, were lost on the way."""
    MOVED = "moved"
    """It never ran there, could not run there as it is, or was to leave a worker that drains. Not counted: no worker
    has failed it."""


class Budget:
    """Tries that are left to replace failed ones: a stock for bad moments, and a share of what succeeds.

    So failing workers get a fifth more requests in the long run, and not three times as many.
    """

    def __init__(self) -> None:
        self.left = _STOCK

    def earn(self) -> None:
        """A request has succeeded."""
        self.left = min(_STOCK, self.left + _EARNED)

    def spend(self) -> bool:
        """Whether one more may be tried; it counts then."""
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


def exhausted(failures: int, losses: int) -> bool:
    """Whether a request has had its tries: so many were given up by workers, and so many ended in another way."""
    return failures >= MOST_FAILURES or failures + losses >= MOST_TRIES


def seems_hung(silent_s: float, expected_s: float) -> bool:
    """Whether a worker has failed a request that was given up waiting: for so long it has brought nothing of this one
    or any other, and `expected_s` it was predicted to need. A client that has no patience does not prove that."""
    return silent_s >= max(_SILENT_S, _SILENT_TIMES * expected_s)


def rest_s(strikes: int) -> float:
    """Seconds for which a worker gets nothing that has failed so many requests and brought none to its end between.

    From then on it gets one request in as many seconds, to be tried by.
    """
    if strikes < _STRIKES:
        return 0.0
    return min(_LONGEST_REST_S, 2.0 ** min(strikes - _STRIKES, 10))
