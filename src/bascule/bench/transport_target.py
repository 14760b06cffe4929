"""The receiving process of `bench handoff`: an arena, its receivers and plain sockets, told what to do by lines."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

import msgspec
from msgspec import Struct

from bascule.kv.arena import Arena
from bascule.kv.transfer.base import Endpoint, Grant, Receiver
from bascule.kv.transfer.select import open_receivers
from bascule.types import KVLayout, TicketId

SEALED = "tcp-sealed"
"""TCP as it is with a cluster key."""
CLUSTER_KEY = bytes(32)


class Plan(Struct, frozen=True, kw_only=True):
    """First line to the target: what it holds, and the core it stays on."""

    layout: KVLayout
    blocks: int
    core: int


class Ready(Struct, frozen=True, kw_only=True):
    """Its answer: where it receives, and the port of the plain tcp connection."""

    endpoints: dict[str, Endpoint]
    """By transport, or `SEALED`."""
    port: int


class Open(Struct, frozen=True, tag=True):
    """Grant `count` blocks from `first` on."""

    ticket: TicketId
    secret: bytes
    first: int
    count: int


class Check(Struct, frozen=True, tag=True):
    """`count` blocks from `first` on have arrived: take their checksums. Not answered."""

    first: int
    count: int


class Conclude(Struct, frozen=True, tag=True):
    """Compare with what was checked, and forget the ticket."""

    ticket: TicketId
    checksums: tuple[bytes, ...]


class Receive(Struct, frozen=True, tag=True):
    """Take `count` bytes from a plain connection."""

    name: str
    count: int


class Done(Struct, frozen=True, kw_only=True):
    """The answer to every command but `Check`."""

    matches: bool = True
    cpu_s: float
    """Of this process since its start."""


Command = Open | Check | Conclude | Receive


def send(stream: BinaryIO, message: Struct) -> None:
    """One line."""
    stream.write(msgspec.json.encode(message) + b"\n")
    stream.flush()


class Target:
    """Does what each command says."""

    def __init__(self, plan: Plan, unix: socket.socket) -> None:
        self._arena = Arena.create(plan.layout, plan.blocks)
        self._buffer = memoryview(bytearray(plan.layout.block_bytes * plan.blocks))
        sealed = open_receivers(self._arena, "tcp", "127.0.0.1", lambda _: None, key=CLUSTER_KEY)["tcp"]
        self._receivers: dict[str, Receiver] = open_receivers(self._arena, "auto", "127.0.0.1", lambda _: None) | {
            SEALED: sealed
        }
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._plain = {"unix": unix}
        self._checked: list[bytes] = []

    def ready(self) -> Ready:
        endpoints = {name: receiver.endpoint for name, receiver in self._receivers.items()}
        return Ready(endpoints=endpoints, port=self._listening.getsockname()[1])

    def accept(self) -> None:
        """The one plain tcp connection."""
        self._plain["tcp"], _ = self._listening.accept()

    def obey(self, command: Command) -> Done | None:
        matches = True
        match command:
            case Open(ticket, secret, first, count):
                self._checked = []
                for receiver in self._receivers.values():
                    receiver.open(Grant(ticket, secret, tuple(range(first, first + count))))
            case Check(first, count):
                blocks = range(first, first + count)
                self._checked += self._arena.checksums(blocks, self._arena.layout.block_size)
                return None
            case Conclude(ticket, checksums):
                matches = tuple(self._checked) == checksums
                for receiver in self._receivers.values():
                    receiver.finish(ticket)
            case Receive(name, count):
                _receive(self._plain[name], self._buffer[:count])
        return Done(matches=matches, cpu_s=time.process_time())

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()
        for connection in (*self._plain.values(), self._listening):
            connection.close()
        self._arena.close()


def _receive(connection: socket.socket, memory: memoryview) -> None:
    while memory:
        received = connection.recv_into(memory, 0, socket.MSG_WAITALL)
        if not received:
            raise ConnectionError("the source closed its plain connection")
        memory = memory[received:]


def main(stdin: BinaryIO, stdout: BinaryIO, unix: socket.socket) -> None:
    """Serve the lines of `stdin` until it ends."""
    plan = msgspec.json.decode(stdin.readline(), type=Plan)
    os.sched_setaffinity(0, {plan.core})
    decode: Callable[[bytes], Command] = msgspec.json.Decoder(Command).decode
    target = Target(plan, unix)
    try:
        send(stdout, target.ready())
        target.accept()
        while line := stdin.readline():
            if (answer := target.obey(decode(line))) is not None:
                send(stdout, answer)
    finally:
        target.close()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer, socket.socket(fileno=int(sys.argv[1])))
