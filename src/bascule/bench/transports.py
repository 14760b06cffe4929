"""Bytes per second of each transport between two processes, beside a memcpy and plain sockets in the same run."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median

import msgspec
import numpy as np

from bascule.bench.cores import pinned
from bascule.bench.transport_target import (
    CLUSTER_KEY,
    SEALED,
    Check,
    Command,
    Conclude,
    Done,
    Open,
    Plan,
    Ready,
    Receive,
    send,
)
from bascule.errors import BasculeError
from bascule.kv.arena import Arena
from bascule.kv.transfer.base import Endpoint, Move, Sender, Session
from bascule.kv.transfer.select import open_senders
from bascule.types import KVLayout, TicketId

CHUNK_TOKENS = 512
"""What a prefill step computes, and a worker therefore pushes, at once."""
_SECRET = bytes(16)


class TransferFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One way to move bytes; medians over the runs."""

    name: str
    verified: bool
    bytes_per_s: float
    baseline: str
    baseline_bytes_per_s: float
    ratio: float
    """Of the two rates, run by run."""
    best_ratio: float
    """Of the best run of each: what is left of other work on the machine least."""
    cpu_s_per_gb: float
    """Of both processes, per 10**9 bytes."""
    baseline_cpu_s_per_gb: float


class BenchFailed(BasculeError):
    """Something that was to be measured did not work."""


@dataclass(frozen=True)
class Sample:
    wall_s: float
    cpu_s: float


def measure(layout: KVLayout, size: int, runs: int, cores: list[int]) -> list[TransferFigures]:
    """Move about `size` bytes `runs` times each way, in turn; source on the first core, target on the last.

    Raises BenchFailed where what arrived is not what was sent.
    """
    count = blocks_for(layout, size)
    with pinned(cores[0]), ExitStack() as stack:
        source = Source(layout, count, cores[-1], stack)
        ways: dict[tuple[str, bool], Callable[[], Sample]] = {
            ("memcpy", False): source.memcpy,
            ("tcp socket", False): lambda: source.plain("tcp"),
            ("unix socket", False): lambda: source.plain("unix"),
            ("shm", False): lambda: source.transfer("shm", verified=False),
            ("shm", True): lambda: source.transfer("shm", verified=True),
            ("tcp", False): lambda: source.transfer("tcp", verified=False),
            ("tcp", True): lambda: source.transfer("tcp", verified=True),
            (SEALED, False): lambda: source.transfer(SEALED, verified=False),
            (SEALED, True): lambda: source.transfer(SEALED, verified=True),
        }
        samples: dict[tuple[str, bool], list[Sample]] = {way: [] for way in ways}
        for run in range(-1, runs):
            for way, once in ways.items():
                sample = once()
                if run >= 0:  # the one before is for warming up
                    samples[way].append(sample)
        baselines = {"shm": "memcpy", "tcp": "tcp socket", SEALED: "tcp socket", "unix socket": "tcp socket"}
        return [
            _figures(way, samples[way], baselines[way[0]], samples[baselines[way[0]], False], source.size)
            for way in ways
            if way[0] in baselines
        ]


def blocks_for(layout: KVLayout, size: int) -> int:
    """Blocks of about `size` bytes."""
    return max(2, size // layout.block_bytes)


def _figures(
    way: tuple[str, bool], samples: list[Sample], baseline: str, others: list[Sample], size: int
) -> TransferFigures:
    return TransferFigures(
        name=way[0],
        verified=way[1],
        bytes_per_s=size / median(sample.wall_s for sample in samples),
        baseline=baseline,
        baseline_bytes_per_s=size / median(other.wall_s for other in others),
        ratio=median(other.wall_s / sample.wall_s for sample, other in zip(samples, others, strict=True)),
        best_ratio=min(other.wall_s for other in others) / min(sample.wall_s for sample in samples),
        cpu_s_per_gb=median(sample.cpu_s for sample in samples) / size * 1e9,
        baseline_cpu_s_per_gb=median(other.cpu_s for other in others) / size * 1e9,
    )


class Source:
    """This process's side. What is moved is a quarter of each arena, at different places, as a handoff's blocks are."""

    def __init__(self, layout: KVLayout, count: int, target_core: int, stack: ExitStack) -> None:
        blocks = 4 * count
        self.size = count * layout.block_bytes
        self._count, self._first, self._target_first = count, count, 2 * count + 1
        self._arena = stack.enter_context(Arena.create(layout, blocks))
        self._spare = stack.enter_context(Arena.create(layout, blocks))
        fill = np.random.default_rng(0).integers(0, 256, self._arena.bytes[0, 0].shape, np.uint8)
        self._arena.bytes[:] = fill
        self._arena.bytes[:, :, :4].view(np.uint32)[:] = np.arange(blocks, dtype=np.uint32)[:, None]
        self._spare.bytes[:] = 0
        self._peer = Peer(Plan(layout=layout, blocks=blocks, core=target_core), stack)
        self._senders: dict[str, Sender] = open_senders(self._arena, "auto")
        self._senders[SEALED] = open_senders(self._arena, "tcp", CLUSTER_KEY)["tcp"]
        for sender in self._senders.values():
            stack.callback(sender.close)

    def memcpy(self) -> Sample:
        """One copy of the same number of bytes, from one shared mapping to another, both warm."""
        source, target = (arena.bytes.ctypes.data for arena in (self._arena, self._spare))
        return self._timed(lambda: ctypes.memmove(target, source, self.size))

    def plain(self, name: str) -> Sample:
        """The same number of bytes, in one piece, over a socket without any protocol."""
        data = self._arena.bytes.reshape(-1)[: self.size].data

        def move() -> None:
            self._peer.plain[name].sendall(data)
            self._peer.answer()

        return self._timed(move, Receive(name, self.size))

    def transfer(self, name: str, *, verified: bool) -> Sample:
        """A handoff's blocks, chunk by chunk; verified: with checksums taken here and checked there as it goes."""
        ticket = TicketId(uuid.uuid4().hex)
        self._peer.ask(Open(ticket, _SECRET, self._target_first, self._count))
        with closing(self._senders[name].open(self._peer.endpoints[name], ticket, _SECRET)) as session:
            checksums: list[bytes] = []
            if verified:
                sample = self._timed(lambda: checksums.extend(self._push_verified(session, ticket)))
            else:
                sample = self._timed(lambda: self._push(session))
        if not verified:
            self._peer.ask(Conclude(ticket, ()))
        return sample

    def _push(self, session: Session) -> None:
        for start, count in self._chunks():
            session.push(self._moves(start, count))
        session.flush()

    def _push_verified(self, session: Session, ticket: TicketId) -> list[bytes]:
        checksums: list[bytes] = []
        for start, count in self._chunks():
            blocks = range(self._first + start, self._first + start + count)
            checksums += self._arena.checksums(blocks, self._arena.layout.block_size)
            session.push(self._moves(start, count))
            session.flush()
            self._peer.send(Check(self._target_first + start, count))
        if not self._peer.ask(Conclude(ticket, tuple(checksums))).matches:
            raise BenchFailed(f"what arrived over {session.transport} is not what was sent")
        return checksums

    def _chunks(self) -> Iterator[tuple[int, int]]:
        few = max(1, CHUNK_TOKENS // self._arena.layout.block_size)
        for start in range(0, self._count, few):
            yield start, min(few, self._count - start)

    def _moves(self, start: int, count: int) -> list[Move]:
        return [Move(self._first + i, self._target_first + i) for i in range(start, start + count)]

    def _timed(self, move: Callable[[], object], before: Command | None = None) -> Sample:
        """`before` is sent to the target first."""
        target_cpu = self._peer.cpu_s()
        if before is not None:
            self._peer.send(before)
        cpu, wall = time.process_time(), time.perf_counter()
        move()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Sample(wall, cpu + self._peer.cpu_s() - target_cpu)


class Peer:
    """The target's process."""

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bascule.bench.transport_target", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        stack.callback(self._end)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        send(self._to, plan)  # type: ignore[arg-type]
        ready = msgspec.json.decode(self._line(), type=Ready)
        self.endpoints: dict[str, Endpoint] = ready.endpoints
        tcp = stack.enter_context(socket.create_connection(("127.0.0.1", ready.port)))
        self.plain = {"unix": ours, "tcp": tcp}

    def send(self, command: Command) -> None:
        send(self._to, command)  # type: ignore[arg-type]

    def answer(self) -> Done:
        return msgspec.json.decode(self._line(), type=Done)

    def ask(self, command: Command) -> Done:
        self.send(command)
        return self.answer()

    def cpu_s(self) -> float:
        """CPU seconds of the target since its start."""
        return self.ask(Receive("unix", 0)).cpu_s

    def _line(self) -> bytes:
        line = self._from.readline()
        if not line:
            raise BenchFailed("the target process ended; its message is above")
        return line

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
