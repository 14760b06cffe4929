"""Workers as processes of this machine: started, watched, started again when they die, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bascule.control.devices import Device
from bascule.errors import ConfigError
from bascule.types import Role, WorkerId

log = logging.getLogger(__name__)

_RESTARTS = 5
"""A worker that dies more often in a row, without a stretch of `_STEADY_S` between, is not started again at once."""
_STEADY_S = 60.0
_PAUSE_S = 0.2
_RETRY_S = 60.0
"""Between the starts of a worker that cannot be kept up, where the others serve."""
_GRACE_S = 5.0


@dataclass(frozen=True)
class WorkerPlan:
    """One worker to be run: its id, role, device and the command line flags beside those."""

    worker: WorkerId
    role: Role
    device: Device
    flags: tuple[str, ...]

    def command(self, model: str, join: str) -> list[str]:
        """What a person would type to start this worker by hand."""
        return [
            *(sys.executable, "-m", "bascule", "worker", model, "--join", join),
            *("--id", self.worker, "--role", self.role.value, "--device", str(self.device)),
            *self.flags,
        ]


class ProcessActuator:
    """Runs each plan as a child process; a child dies with this process, whatever ends it."""

    def __init__(
        self,
        model: str,
        join: str,
        plans: Sequence[WorkerPlan],
        on_death: Callable[[WorkerId, str], None],
        on_put_off: Callable[[WorkerId, str], None] = lambda worker, why: None,
    ) -> None:
        """`on_death` is told which worker's process ended, and how, in words; `on_put_off` who is not started again for
        a while, and why."""
        self._model = model
        self._join = join
        self._plans = list(plans)
        self._on_death = on_death
        self._on_put_off = on_put_off
        self._children: dict[WorkerId, asyncio.subprocess.Process] = {}
        self._carrying_on = False
        self._stopping = False

    @property
    def pids(self) -> dict[WorkerId, int]:
        return {worker: child.pid for worker, child in self._children.items()}

    async def run(self) -> None:
        """Start all workers and keep them running; raises ConfigError when one cannot be kept up, until `carry_on`."""
        async with asyncio.TaskGroup() as group:
            for plan in self._plans:
                group.create_task(self._keep(plan))

    def carry_on(self) -> None:
        """Requests are served from now on: a worker that cannot be kept up is its own affair, and is tried now and
        then."""
        self._carrying_on = True

    async def _keep(self, plan: WorkerPlan) -> None:
        deaths = 0
        while not self._stopping:
            started = time.monotonic()
            try:
                child = await asyncio.create_subprocess_exec(
                    *plan.command(self._model, self._join),
                    *("--parent", str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                await self._put_off(plan.worker, f"cannot be started ({error.strerror})")
                continue
            self._children[plan.worker] = child
            if self._stopping:  # it was not there yet when all others were told
                child.kill()
            code = await child.wait()
            if self._stopping:
                return
            how = f"died: {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            self._on_death(plan.worker, how)
            if code == 0:  # it was told to end, and did so in order
                deaths = 0
                log.info("worker %s (pid %d) has ended as it was asked to; starting it anew", plan.worker, child.pid)
                await asyncio.sleep(_PAUSE_S)
                continue
            deaths = 1 if time.monotonic() - started > _STEADY_S else deaths + 1
            if code == 2:
                await self._put_off(plan.worker, "could not start; its message is above")
            elif deaths > _RESTARTS:
                await self._put_off(plan.worker, f"died {deaths} times in a row; its messages are above")
            else:
                log.error("worker %s (pid %d) %s; starting it again", plan.worker, child.pid, how)
                await asyncio.sleep(min(5.0, _PAUSE_S * 2 ** (deaths - 1)))

    async def _put_off(self, worker: WorkerId, why: str) -> None:
        """Wait until it is worth another try; raises ConfigError where nothing is served yet."""
        if not self._carrying_on:
            raise ConfigError(f"worker {worker} {why}")
        self._on_put_off(worker, why)
        log.error(
            "worker %s %s; mend what is in its way: it is tried again every %g s; all else goes on meanwhile",
            worker,
            why,
            _RETRY_S,
        )
        await asyncio.sleep(_RETRY_S)

    async def stop(self) -> None:
        """End all workers at once, whatever they run: told first, killed if that does not end them.

        A worker drains at its first signal. Two of one kind may reach it as one, so it gets one of each.
        """
        self._stopping = True
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
                child.send_signal(signal.SIGINT)
        waits = [asyncio.create_task(child.wait()) for child in self._children.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=_GRACE_S)
            if late:
                self.kill()
                await asyncio.wait(waits, timeout=_GRACE_S)  # one in a system call that hangs ends after it, not before

    def kill(self) -> None:
        self._stopping = True
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.kill()
