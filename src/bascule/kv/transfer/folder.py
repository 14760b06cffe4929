"""A private folder for a socket, which goes with its process: whoever makes one removes those of the dead."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "bascule-kv-"
_YOUNG_S = 60.0
"""One that is younger may belong to a process that has not locked it yet."""


class SocketFolder:
    """A new folder in `parent` (default: the system's for temporary files), locked for as long as its process lives."""

    def __init__(self, parent: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # others may remove the same ones
            _sweep(self.path.parent)

    def remove(self) -> None:
        """With all that is in it; does nothing a second time."""
        if self._descriptor >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _sweep(parent: Path) -> None:
    """Remove what no process of this user's has locked any more."""
    for found in parent.glob(f"{_PREFIX}*"):
        status = found.lstat()
        if status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG_S:
            continue
        descriptor = os.open(found, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(found, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
