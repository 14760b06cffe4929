"""Which servers of this user run on this machine: each leaves a small file for other commands to find it by."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
from msgspec import Meta, Struct

from bascule.errors import UNREADABLE
from bascule.keys import write_private
from bascule.machine import cache_home

log = logging.getLogger(__name__)


class Server(Struct, frozen=True, kw_only=True):
    """A router with its HTTP ports."""

    url: str
    admin_url: str
    model: str
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    started: float
    """Unix time (s) of its process, as another process may have its id later."""
    machine: str
    """A home directory may be shared by several."""
    admin_key: str | None = None
    """What its admin API asks for: the file is its owner's alone."""


def announce(url: str, admin_url: str, model: str, admin_key: str | None = None) -> Path | None:
    """Leave a file that says where this process listens; returns it, or None where it cannot be written."""
    started = psutil.Process().create_time()
    server = Server(
        url=url,
        admin_url=admin_url,
        model=model,
        pid=os.getpid(),
        started=started,
        machine=platform.node(),
        admin_key=admin_key,
    )
    path = _folder() / f"{server.machine or 'here'}-{server.pid}.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, msgspec.json.encode(server))
    except OSError as error:
        log.info("bascule explain and admin will need --admin: cannot write %s: %s", path, error.strerror)
        return None
    return path


def withdraw(path: Path | None) -> None:
    """Take back what `announce` left."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def running() -> list[Server]:
    """The servers that run here now, the latest first; files of servers that were killed are cleared away."""
    found = []
    for path in _folder().glob("*.json"):
        try:
            server = msgspec.json.decode(path.read_bytes(), type=Server)
        except (OSError, *UNREADABLE):
            continue
        if server.machine != platform.node():
            continue
        if _lives(server):
            found.append(server)
        else:
            withdraw(path)
    return sorted(found, key=lambda server: -server.started)


def _lives(server: Server) -> bool:
    try:
        return bool(abs(psutil.Process(server.pid).create_time() - server.started) < 1.0)
    except psutil.Error:
        return False


def _folder() -> Path:
    """$XDG_RUNTIME_DIR/bascule where there is one, else beside the models."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "bascule") if runtime else cache_home() / "servers"
