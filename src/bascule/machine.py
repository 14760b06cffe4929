"""What this machine, or the container that we are in, has to give."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1


def cache_home() -> Path:
    """Where what can be made again lies: $BASCULE_CACHE, $XDG_CACHE_HOME/bascule or ~/.cache/bascule."""
    if own := os.environ.get("BASCULE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bascule"


def memory_bytes() -> int:
    """All the memory that this process and its children may have: the machine's, or less in a container."""
    return min([int(psutil.virtual_memory().total), *_limits(Path("/proc/self/cgroup"), _GROUPS)])


def _limits(membership: Path, groups: Path) -> Iterator[int]:
    """The memory limits of our control group and of those around it, of either version of the interface."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, file = groups, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = root / name.lstrip("/")
        # Within a container the outer path may not be there: its own group is then the root of what it sees.
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(root))):
            try:
                yield int((folder / file).read_text())
            except (OSError, ValueError):  # not there, or `max`
                continue


def give_back_memory() -> None:
    """What the C library keeps of freed memory goes back to the system, where it has a call for that."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def most_open_files() -> int:
    """Files and connections that this process may have open once it has asked for all it may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def open_files_allowed() -> int:
    """Those that it may have as it is."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def raise_open_files(wanted: int) -> None:
    """Ask for that many open files, or as many as are allowed; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, most_open_files()), hard))


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
