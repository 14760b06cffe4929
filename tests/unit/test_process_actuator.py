"""Workers as child processes, here shells that end as they are told: started again, left alone for a while, stopped."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from bascule.cli import router as alone
from bascule.cli import serve as serving
from bascule.cli.serve import Deployment
from bascule.config import AttachConfig, HttpConfig, ModelConfig, PoolConfig, RoutingConfig, SloConfig
from bascule.control.actuators import process
from bascule.control.actuators.process import ProcessActuator, WorkerPlan
from bascule.control.devices import Device
from bascule.errors import ConfigError
from bascule.types import Role, WorkerId

PATIENCE_S = 30.0
STAYS = "exec sleep 1000"


class Rig:
    """An actuator over shell scripts, one a worker, and how often each has ended."""

    def __init__(self, scripts: dict[str, str]) -> None:
        self.deaths: Counter[str] = Counter()
        self.and_then: Callable[[], None] = lambda: None
        """What happens as soon as a worker has ended."""
        plans = [WorkerPlan(WorkerId(name), Role.MIXED, Device("cpu"), (script,)) for name, script in scripts.items()]
        self.put_off: list[tuple[str, str]] = []
        self.actuator = ProcessActuator("model", "join", plans, self._on_death, lambda *what: self.put_off.append(what))

    def _on_death(self, worker: WorkerId, how: str) -> None:
        self.deaths[worker] += 1
        self.and_then()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(rig.actuator.run())
    try:
        yield task
    finally:
        rig.actuator.kill()
        task.cancel()
        with suppress(asyncio.CancelledError, BaseExceptionGroup):
            await task


@pytest.fixture(autouse=True)
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shells instead of workers, and hardly any time between two starts; which were started."""
    started: list[str] = []

    def command(self: WorkerPlan, model: str, join: str) -> list[str]:
        started.append(self.worker)
        return ["/bin/sh", "-c", self.flags[0]]

    monkeypatch.setattr(WorkerPlan, "command", command)
    monkeypatch.setattr(process, "_PAUSE_S", 0.0)
    monkeypatch.setattr(process, "_RETRY_S", 0.0)
    return started


@pytest.mark.parametrize(
    ("script", "why"),
    [("exit 2", "could not start"), ("exit 1", "died 6 times in a row"), ("kill -9 $$", "died 6 times")],
)
def test_a_worker_that_cannot_be_kept_up_ends_serving_only_before_it_has_begun(
    script: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def before() -> None:
        rig = Rig({"bad": script, "good": STAYS})
        async with running(rig) as task:
            with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=f"worker bad {why}")):
                await asyncio.wait_for(task, PATIENCE_S)

    async def after() -> None:
        rig = Rig({"bad": script, "good": STAYS})
        rig.actuator.carry_on()
        async with running(rig) as task:
            await rig.until(lambda: "good" in rig.actuator.pids)
            good = rig.actuator.pids[WorkerId("good")]
            await rig.until(lambda: rig.deaths["bad"] > 8)
            assert not task.done() and rig.actuator.pids[WorkerId("good")] == good
            assert rig.deaths["good"] == 0

    asyncio.run(before())
    asyncio.run(after())
    assert any(
        f"worker bad {why}" in record.message and "tried again every" in record.message for record in caplog.records
    )


def test_a_machine_that_can_start_no_process_now_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    start, tries = asyncio.create_subprocess_exec, Counter[str]()

    async def full(*command: str, **how: object) -> asyncio.subprocess.Process:
        tries[""] += 1
        if tries[""] < 4:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await start(*command, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", full)

    async def go() -> None:
        rig = Rig({"one": STAYS})
        rig.actuator.carry_on()
        async with running(rig):
            await rig.until(lambda: "one" in rig.actuator.pids)

    asyncio.run(go())
    assert tries[""] == 4


def test_who_stops_starts_no_worker_again(starts: list[str]) -> None:
    async def go() -> None:
        rig = Rig({"one": "exit 1"})
        rig.and_then = rig.actuator.kill
        async with running(rig) as task:
            await asyncio.wait_for(task, PATIENCE_S)
        assert starts == ["one"]

    asyncio.run(go())


def test_a_worker_that_was_being_started_when_all_were_stopped_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        asked, stopped, start = asyncio.Event(), asyncio.Event(), asyncio.create_subprocess_exec
        children = []

        async def slow(*command: str, **how: object) -> asyncio.subprocess.Process:
            asked.set()
            await stopped.wait()
            children.append(await start(*command, **how))  # type: ignore[arg-type]
            return children[-1]

        monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
        rig = Rig({"one": STAYS})
        async with running(rig) as task:
            await asyncio.wait_for(asked.wait(), PATIENCE_S)
            await rig.actuator.stop()
            stopped.set()
            await asyncio.wait_for(task, PATIENCE_S)
        assert [child.returncode for child in children] == [-9]

    asyncio.run(go())


class FailingFront:
    """A router's process that fails once all is up; `done` is what happens, in order."""

    done: ClassVar[list[str]]
    link = SimpleNamespace(address="")
    membership = SimpleNamespace(lost=lambda worker, how: None, cannot_start=lambda worker, why: None)
    attachments = SimpleNamespace(workers=())
    service = SimpleNamespace(
        ready=True, view=SimpleNamespace(members=("one",), links=SimpleNamespace(expect=lambda links: None))
    )

    def __init__(self, *_: object) -> None:
        self.stop_asked, self._up = asyncio.Event(), asyncio.Event()

    def catch_signals(self) -> None: ...

    def run_in_background(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._fail())]

    async def _fail(self) -> None:
        await self._up.wait()
        raise ConfigError("something has failed")

    async def serve_http(self) -> tuple[str, str]:
        return "", ""

    def asking(self, url: str) -> str:
        return ""

    def write_ready_file(self, *_: object) -> None:
        self._up.set()

    async def stop_http(self) -> None:
        self.done.append("clients are told")

    async def end(self, running: list[asyncio.Task[None]]) -> None:
        self.done.append("closed")
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class ToldActuator(ProcessActuator):
    async def stop(self) -> None:
        FailingFront.done.append("workers are stopped")
        await super().stop()


def test_whatever_ends_serving_clients_are_told_before_workers_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    FailingFront.done = []
    monkeypatch.setattr(serving, "Frontend", FailingFront)
    monkeypatch.setattr(serving, "ProcessActuator", ToldActuator)
    plans = [WorkerPlan(WorkerId("one"), Role.MIXED, Device("cpu"), (STAYS,))]
    configs: tuple[Any, ...] = (PoolConfig(), RoutingConfig(), HttpConfig(), ModelConfig(), SloConfig(), AttachConfig())
    deployment = Deployment("model", None, plans, *configs, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="something has failed"):
        asyncio.run(deployment.run())
    assert FailingFront.done == ["clients are told", "workers are stopped", "closed"]


def test_whatever_ends_a_router_its_clients_are_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    FailingFront.done = []
    monkeypatch.setattr(alone, "Frontend", FailingFront)
    monkeypatch.setattr(alone, "load", lambda model: None)
    configs: tuple[Any, ...] = (RoutingConfig(), HttpConfig(), ModelConfig(), SloConfig(), AttachConfig())
    with pytest.raises(ConfigError, match="something has failed"):
        asyncio.run(alone._run("model", "bind", *configs, None))
    assert FailingFront.done == ["clients are told", "closed"]
