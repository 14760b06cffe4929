"""Which of several servers take blocks, and which may lack what was put elsewhere while they took none."""

from __future__ import annotations

import logging
from threading import Lock
from time import monotonic

from bascule.errors import short

log = logging.getLogger(__name__)

_SPARED_S = 10.0
"""What a server is not offered anything for after it has refused something."""
_SILENCE_S = 60.0
"""Between two lines in the log about one server."""


class Standing:
    """Of the servers of one store, by their names. Thread-safe."""

    def __init__(self, life_s: float) -> None:
        """`life_s` is how long blocks live: so long after a server was passed over, its blocks may be elsewhere."""
        self._life_s = life_s
        self._lock = Lock()
        self._spared_until: dict[str, float] = {}
        self._doubted_until: dict[str, float] = {}
        self._silent_until: dict[str, float] = {}

    def refused(self, server: str, why: Exception) -> None:
        """It answers, and does not take what is put on it."""
        now = monotonic()
        with self._lock:
            self._spared_until[server] = now + _SPARED_S
            self._doubted_until[server] = now + self._life_s
            quiet = now < self._silent_until.get(server, now)
            if not quiet:
                self._silent_until[server] = now + _SILENCE_S
        if not quiet:
            log.warning(
                "KV store: server %s takes no blocks (%s); if there are others, they keep its share",
                server,
                short(str(why)),
            )

    def took(self, server: str) -> None:
        """It takes what is put on it."""
        with self._lock:
            self._spared_until.pop(server, None)

    def away(self, server: str) -> None:
        """It is not asked now."""
        with self._lock:
            self._doubted_until[server] = monotonic() + self._life_s

    def refusing(self) -> set[str]:
        """The servers that nothing is to be put on, if there are others."""
        now = monotonic()
        with self._lock:
            return {server for server, until in self._spared_until.items() if now < until}

    def doubted(self) -> set[str]:
        """The servers whose blocks may have been put on others."""
        now = monotonic()
        with self._lock:
            return {server for server, until in self._doubted_until.items() if now < until}
