"""File locks that are waited for within a bound: whoever holds one may be stopped."""

from __future__ import annotations

import fcntl
import time

_POLL_S = 0.01


def lock(file: int, kind: int, patience_s: float) -> bool:
    """Take an advisory lock (`fcntl.LOCK_SH` or `LOCK_EX`) on an open file; False if it is not to be had in time.

    Raises OSError where the file system has no locks.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True
