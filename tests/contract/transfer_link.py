"""Senders and receivers of every transport, wired up for the contract tests, and threads and processes that push."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Thread
from time import monotonic, sleep

import msgspec
import numpy as np
import pytest

from bascule.kv.arena import Arena
from bascule.kv.codecs import codec_named
from bascule.kv.transfer.base import Grant, Move, Receiver, Sender
from bascule.kv.transfer.frames import Buffers, ticket_key
from bascule.kv.transfer.loopback import LoopbackNetwork, LoopbackReceiver, LoopbackSender
from bascule.kv.transfer.shm import ShmReceiver, ShmSender
from bascule.kv.transfer.stream import Stream
from bascule.kv.transfer.tcp import TcpReceiver
from bascule.kv.transfer.tcp_sender import TcpSender
from bascule.types import KVLayout, TicketId

WAIT = 20.0
LAYOUT = KVLayout("float32", layers=3, kv_heads=2, head_dim=64, block_size=16, planes=6, token_bytes=512)
BLOCKS = 64
TICKET, OTHER = TicketId("ticket"), TicketId("other")
SECRET, WRONG = b"s" * 16, b"w" * 16
CLUSTER_KEY = b"c" * 32

WRITER = """
import sys, msgspec
from bascule.kv.arena import Arena
from bascule.kv.codecs import codec_named
from bascule.kv.transfer.base import Endpoint, Move
from bascule.kv.transfer.shm import ShmSender
from bascule.kv.transfer.tcp_sender import TcpSender
from bascule.types import KVLayout

endpoint = msgspec.json.decode(sys.argv[1], type=Endpoint)
layout = msgspec.json.decode(sys.argv[2], type=KVLayout)
arena = Arena.create(layout, int(sys.argv[3]))
arena.bytes[:] = 7
session = {"shm": ShmSender, "tcp": TcpSender}[endpoint.transport](arena).open(endpoint, "ticket", b"s" * 16)
while True:
    session.push([Move(block, block) for block in range(arena.num_blocks)])
"""


@dataclass
class Link:
    """A receiver with its arena, and a way to make senders for it."""

    receiver: Receiver
    arena: Arena
    new_sender: Callable[[Arena], Sender]
    stack: ExitStack
    safe: list[TicketId] = field(default_factory=list)

    def sender(self, fill: int | None = None) -> tuple[Sender, Arena]:
        """A sender whose arena holds random bytes, or `fill`."""
        arena = self.stack.enter_context(Arena.create(LAYOUT, BLOCKS))
        random_bytes = np.random.default_rng(1).integers(0, 256, arena.bytes.shape, np.uint8)
        arena.bytes[:] = random_bytes if fill is None else fill
        return self.stack.enter_context(closing(self.new_sender(arena))), arena

    def grant(self, *blocks: int, ticket: TicketId = TICKET) -> None:
        self.receiver.open(Grant(ticket, SECRET, blocks or tuple(range(BLOCKS))))


def make_link(transport: str, stack: ExitStack, codecs: Sequence[str] = ()) -> Link:
    """Over `loopback`, `shm`, `tcp`, or `sealed`, which is tcp with a cluster key. The receiver allows `codecs`."""
    allowed = {name: codec_named(name, LAYOUT) for name in codecs}
    arena = stack.enter_context(Arena.create(LAYOUT, BLOCKS))
    safe: list[TicketId] = []
    receiver: Receiver
    new_sender: Callable[[Arena], Sender]
    if transport == "loopback":
        network = LoopbackNetwork()
        receiver = LoopbackReceiver(arena, safe.append, network, allowed)
        new_sender = lambda source: LoopbackSender(source, network)  # noqa: E731
    elif transport == "shm":
        receiver, new_sender = ShmReceiver(arena, safe.append), ShmSender
    else:
        key = CLUSTER_KEY if transport == "sealed" else None
        receiver = TcpReceiver(arena, safe.append, "127.0.0.1", codecs=allowed, key=key)
        new_sender = partial(TcpSender, key=key)
    stack.callback(receiver.close)
    return Link(receiver, arena, new_sender, stack, safe)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = monotonic() + WAIT
    while not condition():
        assert monotonic() < deadline, f"waited {WAIT:g} s for {what}"
        sleep(0.005)


def moves(pairs: dict[int, int]) -> list[Move]:
    return [Move(source, target) for source, target in pairs.items()]


ALL = moves({block: block for block in range(BLOCKS)})


class PushingThread(Thread):
    """Pushes again and again until it fails or is stopped; `error` says how it failed."""

    def __init__(self, push: Callable[[], object], stop: Event | None = None) -> None:
        super().__init__(daemon=True)
        self._push = push
        self._stop_pushing = stop or Event()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._stop_pushing.is_set():
                self._push()
        except Exception as error:
            self.error = error

    def join(self, timeout: float | None = WAIT) -> None:
        super().join(timeout)
        assert not self.is_alive(), f"the push did not end within {timeout} s"


def revoke_behind_the_last_byte(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have TICKET revoked once all of a frame's payload has been received, and before anything is done with it."""
    assert isinstance(link.receiver, TcpReceiver)
    grant = link.receiver._grants[ticket_key(TICKET)]
    lock, receive_some, complete = grant.lock, Stream.receive_some, Event()

    class RevokesNext:
        """The grant's lock; after its holder has received all, the revocation is the next to have it."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            if complete.is_set():
                complete.clear()
                link.receiver.revoke(TICKET)

    def receive(stream: Stream, memory: Buffers) -> bool:
        received = receive_some(stream, memory)
        if not memory.left and lock.locked():
            complete.set()
        return received

    monkeypatch.setattr(grant, "lock", RevokesNext())
    monkeypatch.setattr(Stream, "receive_some", receive)


def start_writer(link: Link) -> subprocess.Popen[bytes]:
    """Another process that is in the middle of pushing 7s for TICKET."""
    arguments = [msgspec.json.encode(value).decode() for value in (link.receiver.endpoint, LAYOUT, BLOCKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], env=environment)
    link.stack.callback(writer.wait, WAIT)
    link.stack.callback(writer.kill)
    wait_until(lambda: link.arena.bytes[0, 0, 0] == 7, "the other process")
    return writer


def push_all_as(ticket: TicketId, link: Link) -> None:
    """A whole handoff that succeeds."""
    sender, source = link.sender()
    link.grant(ticket=ticket)
    with closing(sender.open(link.receiver.endpoint, ticket, SECRET)) as session:
        session.push(ALL)
        session.flush()
    assert np.array_equal(link.arena.bytes, source.bytes)
    link.receiver.finish(ticket)
