"""The `host` tier: a folder in shared memory, for as long as any worker on this machine uses it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from bascule.kv.store.directory import DirectoryStore
from bascule.locks import lock
from bascule.types import Tier

_CLEARING_S = 30.0
"""How long whoever clears the store may take."""


class HostStore(DirectoryStore):
    """Memory that nobody uses must not stay taken: the last one to close the store clears it.

    After a kill, which closes nothing, the blocks stay, for whoever starts next.
    """

    def __init__(self, directory: Path, capacity: int) -> None:
        """Raises OSError as it comes."""
        super().__init__(directory, capacity, Tier.HOST)
        self._users: int | None = os.open(directory / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not lock(self._users, fcntl.LOCK_SH, _CLEARING_S):
            os.close(self._users)
            raise TimeoutError(f"another process has been clearing it for {_CLEARING_S:g} s")

    def close(self) -> None:
        users, self._users = self._users, None
        if users is not None:
            with suppress(BlockingIOError):  # others use it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.clear()
            os.close(users)
        super().close()
