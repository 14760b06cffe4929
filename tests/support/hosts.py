"""Routers and workers as real processes on two hosts, which are network namespaces of this machine."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from bascule.bench.apart import OURS, started
from bascule.bench.namespaces import Cable, Host
from support.cluster import patient

MOCK = ("--engine", "mock")
START_S = 60.0

Started = AbstractContextManager[subprocess.Popen[bytes]]


class Here:
    """This machine itself, as a host among others."""

    address = "127.0.0.1"

    def inside(self) -> AbstractContextManager[None]:
        return nullcontext()


HERE = Here()


@contextmanager
def router_on(
    host: Host | Here, join: str, folder: Path, *flags: str, begin: Sequence[str] = OURS
) -> Iterator[tuple[Path, Path]]:
    """The ready file and the log of a router at whose address `join` workers join."""
    ready, log = folder / "ready", folder / "router.log"
    command = ("router", "smollm2", "--bind", join, "--port=0", "--ready-file", str(ready), *patient(flags))
    with started(host, log, *command, begin=begin):
        yield ready, log


@contextmanager
def router(cable: Cable, folder: Path, *flags: str) -> Iterator[tuple[str, Path, Path]]:
    """Where workers join, the ready file and the log of a router on the near host."""
    join = f"tcp://{cable.near.address}:8100"
    with router_on(cable.near, join, folder, *flags) as (ready, log):
        yield join, ready, log


def worker(
    cable: Cable, folder: Path, join: str, far: bool, role: str, *flags: str, address: str | None = None
) -> Started:
    """A worker called like its role, on one of the two hosts, at the host's own address unless given."""
    host = cable.far if far else cable.near
    where = ("--join", join, "--host", address or host.address, "--transfer=tcp", "--id", role, "--role", role)
    return started(host, folder / f"{role}.log", "worker", "smollm2", *where, *MOCK, *flags)


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.create_server((HERE.address, 0)) as listening:
        return int(listening.getsockname()[1])


def until(condition: Callable[[], bool], what: str, logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, what + "".join(f"\n{log}: {log.read_text()[-1500:]}" for log in logs)
        time.sleep(0.05)
