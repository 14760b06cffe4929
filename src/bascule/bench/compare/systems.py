"""The systems that are compared, as processes: started, held back while another is measured, and gone in the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from bascule.bench.endpoint import Endpoint
from bascule.errors import BasculeError
from bascule.machine import end_with_parent, memory_bytes

_POLL_S = 0.05
_STOP_S = 20.0
_TOLD = 2000
_KEYS = ("BASCULE_API_KEY", "BASCULE_ADMIN_KEY", "BASCULE_CLUSTER_KEY_FILE")
"""Would make servers ask for what the client does not send."""
_SPARE = 0.8
"""Share of the free memory that may be planned for."""


class SystemFailed(BasculeError):
    """A system did not start, or ended while it was measured."""


class System:
    """One side of the comparison. A system that runs elsewhere is only asked; ours has processes of its own."""

    def __init__(self, name: str, cores: int | None, endpoint: Endpoint | None = None) -> None:
        """`cores` is None where the hardware is not known."""
        self.name = name
        self.cores = cores
        self._endpoint = endpoint

    @property
    def endpoint(self) -> Endpoint:
        if self._endpoint is None:
            raise SystemFailed(f"{self.name} has not been started")
        return self._endpoint

    @property
    def runs(self) -> bool:
        return self._endpoint is not None

    async def start(self) -> None:
        """Until it answers; raises SystemFailed."""

    def rest(self) -> None:
        """Take no processor time until `wake`."""

    def wake(self) -> None:
        """Go on."""

    def check(self) -> None:
        """Raises SystemFailed where it has ended."""

    def end(self, *, wait: bool = True) -> None:
        """Stop it; a second call with `wait` sees to it that nothing is left."""

    @property
    def memory_bytes(self) -> int:
        """That it takes now and that no other process shares."""
        return 0


class OurSystem(System):
    """A `bascule serve` of our own, dead when this process is, however that ends."""

    def __init__(self, name: str, cores: Sequence[int], model: str, flags: Sequence[str], folder: Path) -> None:
        super().__init__(name, len(cores))
        self._allowed = set(cores)
        self._ready = folder / f"ready-{name}"
        self._log = folder / f"log-{name}"
        serve = [sys.executable, "-m", "bascule", "serve", model, *flags]
        self._command = [*serve, "--port", "0", "--ready-file", str(self._ready), "--log-level", "warning"]
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        # A session of its own, so that Ctrl-C reaches us only.
        with self._log.open("wb") as log, _on(self._allowed):
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name not in _KEYS},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        while not self._ready.exists():
            self.check()
            await asyncio.sleep(_POLL_S)
        ready = json.loads(self._ready.read_text())
        self._endpoint = Endpoint(url=str(ready["url"]), model=str(ready["model"]))

    def check(self) -> None:
        if self._process is not None and (code := self._process.poll()) is not None:
            said = self._log.read_text(errors="replace").strip()[-_TOLD:]
            raise SystemFailed(f"{self.name} ended with exit code {code}; it said: {said or 'nothing'}")

    def rest(self) -> None:
        # The router first, so that it misses nobody.
        self._signal(signal.SIGSTOP, self._tree())

    def wake(self) -> None:
        self._signal(signal.SIGCONT, self._tree()[::-1])

    def end(self, *, wait: bool = True) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            self.wake()
            process.terminate()
        if wait:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL, self._tree())
                process.wait()
            self._process = self._endpoint = None
            self._ready.unlink(missing_ok=True)

    @property
    def memory_bytes(self) -> int:
        found = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                found += process.memory_full_info().pss
        return found

    def _tree(self) -> list[psutil.Process]:
        """The router and its workers."""
        if self._process is None or self._process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            router = psutil.Process(self._process.pid)
            return [router, *router.children(recursive=True)]
        return []

    def _signal(self, number: signal.Signals, processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class Stage:
    """Which of the systems may run: one at a time; the others are held back, or not started where memory is short."""

    def __init__(self, systems: Sequence[System], kv_bytes: int, side_by_side: bool | None) -> None:
        """`side_by_side` None: as memory allows, which the first system tells. `kv_bytes` is each one's KV memory."""
        self.systems = systems
        self.side_by_side = side_by_side
        self._kv_bytes = kv_bytes
        self._on: System | None = None
        self.start_s: dict[str, float] = {}

    async def turn(self, system: System) -> None:
        """It runs from now on, and no other does; raises SystemFailed."""
        if system is not self._on:
            self.clear()
        if system.runs:
            system.wake()
        else:
            begin = time.monotonic()
            self._on = system
            await system.start()
            self.start_s.setdefault(system.name, time.monotonic() - begin)
        self._on = system
        system.check()

    def clear(self) -> None:
        """Nothing runs."""
        if self._on is None:
            return
        if self.side_by_side is None and self._on.memory_bytes:
            self.side_by_side = self._fits(self._on.memory_bytes)
        if self.side_by_side is False:
            self._on.end()
        else:
            self._on.rest()
        self._on = None

    def end(self) -> None:
        """All are gone; what is slow to go does so beside the others."""
        for wait in (False, True):
            for system in self.systems:
                system.end(wait=wait)

    def _fits(self, one: int) -> bool:
        ours = sum(isinstance(system, OurSystem) for system in self.systems)
        free = min(psutil.virtual_memory().available, memory_bytes()) * _SPARE
        return bool((ours - 1) * one + ours * self._kv_bytes <= free)


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Processes started within have these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
