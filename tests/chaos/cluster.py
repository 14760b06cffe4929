"""A router, workers that can be told to fail, and a Redis server: real processes, started again when they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from bascule.bench.footprints import Footprint, footprint_of
from bascule.keys import write_cluster_key
from chaos.orders import EXPIRES_S, Order, give
from chaos.schedule import DEAD_S, LEASE_S, ROLES, SUSPECT_S, Fault, Layout
from support.cluster import environment
from support.redis_server import RedisProcess

KV_BLOCKS = 260
BLOCK_BYTES = 4096
_START_S = 90.0
_TICK_S = 0.1
_GO_S = 15.0
"""How long a process that was told to end, or learns that it counts as dead, may take to be gone."""

Process = subprocess.Popen[bytes]


@dataclass
class Slot:
    """A worker's place in the cluster, whoever has it."""

    id: str
    process: Process | None = None
    start_at: float = 0.0
    """When to start one if there is none."""
    starts: int = 0
    asleep: bool = False
    """Stopped by us."""
    told_to_end: bool = False
    delay_s: float = 0.3


@dataclass
class Ghost:
    """A process whose place another has taken while it was stopped."""

    worker: str
    process: Process
    woken_at: float = math.inf


@dataclass
class Cluster:
    """Composed by `start`; everything of it lies in `folder`, logs too."""

    folder: Path
    layout: Layout
    slots: dict[str, Slot] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    redis: RedisProcess | None = None
    ghosts: list[Ghost] = field(default_factory=list)
    ended: list[tuple[str, int, str]] = field(default_factory=list)
    """Worker, exit code, and whether it was told to."""
    without_worker: list[float] = field(default_factory=list)
    """Moments at which no worker could take a request."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _losing_redis: asyncio.Lock = field(default_factory=asyncio.Lock)

    # ------------------------------------------------------------ starting and stopping

    async def start(self) -> None:
        (self.folder / "cost.json").write_text(
            json.dumps({"step_s": self.layout.step_s, "token_s": self.layout.token_s})
        )
        (self.folder / "tmp").mkdir()
        if self.layout.redis:
            self.redis = RedisProcess("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru")
        self.join = f"tcp://127.0.0.1:{_free_port()}"
        ready = self.folder / "ready"
        flags = [f"--bind={self.join}", "--port=0", f"--ready-file={ready}", f"--policy={self.layout.policy}"]
        flags += [f"--handoff={self.layout.handoff}", f"--suspect-after={SUSPECT_S}", f"--dead-after={DEAD_S}"]
        if self.layout.key:
            write_cluster_key(self._key_file)
            flags += self._key_flags
        self.router = self._spawn("router", [sys.executable, "-m", "bascule", "router", "smollm2", *flags])
        for worker in ROLES:
            self.slots[worker] = Slot(worker)
            self._start(self.slots[worker])
        deadline = time.monotonic() + _START_S
        while not ready.exists():
            await self._not_later(deadline, "the router is not ready")
        self.ready = json.loads(ready.read_text())
        self.tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._look())]
        while not all(self.is_ready(worker) for worker in ROLES):
            await self._not_later(deadline, "not all workers have joined")

    async def _not_later(self, deadline: float, what: str) -> None:
        if self.router.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what}; see the logs in {self.folder}")
        await asyncio.sleep(_TICK_S)

    async def stop(self) -> list[str]:
        """End everything; what did not go as it should."""
        complaints = []
        for task in self.tasks:
            task.cancel()
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        complaints += [f"a watcher failed: {one!r}" for one in results if isinstance(one, Exception)]
        named = [("router", self.router), *((slot.id, slot.process) for slot in self.slots.values() if slot.process)]
        for _, process in named:
            _signal(process, signal.SIGCONT)
            _signal(process, signal.SIGTERM)
        for name, process in named:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 45.0)
            if process.poll() != 0:
                complaints.append(f"{name} (pid {process.pid}) ended with {process.poll()} when it was told to stop")
        self.kill()
        return complaints

    def kill(self) -> None:
        """Whatever is left."""
        processes = [slot.process for slot in self.slots.values()] + [ghost.process for ghost in self.ghosts]
        for process in [getattr(self, "router", None), *processes]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        if self.redis is not None:
            self.redis.stop()

    @property
    def _key_file(self) -> Path:
        return self.folder / "cluster.key"

    @property
    def _key_flags(self) -> list[str]:
        return ["--cluster-key-file", str(self._key_file)] if self.layout.key else []

    def _start(self, slot: Slot) -> None:
        slot.starts += 1
        slot.asleep = slot.told_to_end = False
        flags = ["--join", self.join, "--id", slot.id, "--role", ROLES[slot.id], "--device", "cpu", "--engine", "mock"]
        flags += ["--cost-model", str(self.folder / "cost.json"), "--kv-memory", str(KV_BLOCKS * BLOCK_BYTES)]
        flags += ["--transfer", self.layout.transfer, "--handoff-timeout", str(LEASE_S), "--reserve-timeout", "2"]
        flags += ["--max-sequences", str(self.layout.sequences)]
        flags += ["--parent", str(os.getpid()), *self._key_flags]
        if self.redis is not None:
            flags += ["--kv-remote", self.redis.url]
        if self.layout.disk:
            flags += ["--kv-disk", f"{self.folder / 'disk'}:8MiB"]
        command = [sys.executable, "-m", "chaos.faulty_worker", str(self.folder), slot.id, "worker", "smollm2", *flags]
        slot.process = self._spawn(f"{slot.id}-{slot.starts}", command)

    def _spawn(self, name: str, command: Sequence[str]) -> Process:
        """A process with its own log; it is not among those that a Ctrl-C reaches."""
        told = {"TMPDIR": str(self.folder / "tmp"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                list(command), stdout=log, stderr=subprocess.STDOUT, env=environment() | told, start_new_session=True
            )

    # ------------------------------------------------------------ watching

    def is_ready(self, worker: str) -> bool:
        """Whether the process that we started has joined, runs, and the router hears it."""
        slot = self.slots[worker]
        if slot.process is None or slot.process.poll() is not None or slot.asleep:
            return False
        known = [one for one in self.state.get("workers", ()) if one["id"] == worker]
        return bool(known) and known[0]["pid"] == slot.process.pid and known[0]["state"] == "ready"

    @property
    def ready_workers(self) -> list[str]:
        return [worker for worker in self.slots if self.is_ready(worker)]

    async def _watch(self) -> None:
        """Reap what has ended, and start another in its place."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for slot in self.slots.values():
                if slot.process is None:
                    if now >= slot.start_at:
                        self._start(slot)
                elif (code := slot.process.poll()) is not None:
                    self.ended.append((slot.id, code, "asked" if slot.told_to_end else "unasked"))
                    slot.process, slot.start_at, slot.asleep = None, now + slot.delay_s, False
            self.ghosts = [ghost for ghost in self.ghosts if ghost.process.poll() is None]

    async def _look(self) -> None:
        while True:
            self.state = await asyncio.to_thread(self.ask_state)
            if not self.ready_workers:
                self.without_worker.append(time.monotonic())
            await asyncio.sleep(2 * _TICK_S)

    def ask_state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.ready['admin_url']}/admin/state", timeout=20.0) as answer:
            state: dict[str, Any] = json.load(answer)
        return state

    def hanging_ghosts(self) -> list[str]:
        """Processes that were replaced, woken, and have not ended."""
        return [
            f"{ghost.worker} (pid {ghost.process.pid}) was replaced, woken, and goes on"
            for ghost in self.ghosts
            if ghost.process.poll() is None and time.monotonic() > ghost.woken_at + _GO_S
        ]

    def footprints(self) -> dict[str, Footprint]:
        """Of the router and of workers; named with the process id, which changes with a worker's start."""
        processes = [
            ("router", self.router),
            *((slot.id, slot.process) for slot in self.slots.values() if slot.process),
        ]
        found = {}
        for name, process in processes:
            with contextlib.suppress(psutil.Error):
                found[f"{name} {process.pid}"] = footprint_of(psutil.Process(process.pid))
        return found

    # ------------------------------------------------------------ faults of processes and tiers

    def kill_worker(self, worker: str, delay_s: float, number: signal.Signals = signal.SIGKILL) -> bool:
        """False if it is not there."""
        slot = self.slots[worker]
        if slot.process is None or slot.process.poll() is not None:
            return False
        slot.told_to_end, slot.delay_s = True, delay_s
        _signal(slot.process, signal.SIGCONT)
        _signal(slot.process, number)
        return True

    async def pause(self, worker: str, seconds: float) -> None:
        """Stop a worker for a while."""
        slot = self.slots[worker]
        process = slot.process
        assert process is not None
        slot.asleep = True
        _signal(process, signal.SIGSTOP)
        await self.wake_later(slot, process, seconds)

    async def wake_later(self, slot: Slot, process: Process, seconds: float) -> None:
        slot.asleep = True
        await asyncio.sleep(seconds)
        _signal(process, signal.SIGCONT)
        if slot.process is process:
            slot.asleep = False

    async def replace(self, worker: str, seconds: float) -> None:
        """Stop a worker, start another in its place, and wake the first one once the other has joined."""
        slot = self.slots[worker]
        process = slot.process
        assert process is not None
        ghost = Ghost(worker, process)
        self.ghosts.append(ghost)
        _signal(process, signal.SIGSTOP)
        self._start(slot)
        deadline = time.monotonic() + _START_S
        while not self.is_ready(worker) and time.monotonic() < deadline:
            await asyncio.sleep(_TICK_S)
        await asyncio.sleep(seconds)
        ghost.woken_at = time.monotonic()
        _signal(process, signal.SIGCONT)

    async def lose_redis(self, seconds: float, *, kill: bool) -> None:
        assert self.redis is not None
        async with self._losing_redis:
            if kill:
                await asyncio.to_thread(self.redis.stop)
            else:
                self.redis.pause()
            await asyncio.sleep(seconds)
            if kill:
                await asyncio.to_thread(self.redis.start)
            else:
                self.redis.resume()

    def damage_disk(self, draw: Random) -> int:
        """Flip a bit of, or cut short, a third of the stored blocks; how many."""
        damaged = 0
        for file in sorted(self.folder.glob("disk/v1/??/*")):
            if draw.random() < 0.33:
                with contextlib.suppress(OSError, ValueError), file.open("r+b") as block:
                    size = os.fstat(block.fileno()).st_size
                    at = draw.randrange(size)
                    if draw.random() < 0.3:
                        block.truncate(at)
                    else:
                        block.seek(at)
                        [byte] = block.read(1)
                        block.seek(at)
                        block.write(bytes([byte ^ 1 << draw.randrange(8)]))
                    damaged += 1
        return damaged

    def order(self, fault: Fault, post: socket.socket) -> bool:
        """Tell a worker what to do at its next occasion; False if nobody is there to be told."""
        until = time.monotonic() + EXPIRES_S
        order = Order(fault.number, fault.order, fault.seed, until, fault.seconds, fault.what, fault.for_good)
        return give(order, self.folder, fault.victim, post)


def _signal(process: Process, number: signal.Signals) -> None:
    """To a process of our own that has not been reaped; nothing to one that has."""
    if process.poll() is None:
        process.send_signal(number)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
