"""Every tier of the store on a place of its own, and a real Redis server to be stopped, filled and killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import sleep

from bascule.kv.store.base import Store
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.remote import RemoteStore
from bascule.kv.store.targets import parse_remote
from bascule.types import BlockHash, Tier
from support.redis_server import PATIENT, RedisProcess

ROOM = 64 << 20
SHARED_MEMORY = Path("/dev/shm")


def name_of(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def value_of(number: int, size: int = 1000) -> bytes:
    return bytes([number % 256]) * size


def file_of(directory: Path, number: int) -> Path:
    key = name_of(number).hex()
    return directory / "v1" / key[:2] / key


def files_in(directory: Path) -> list[Path]:
    return [file for file in directory.glob("v1/[0-9a-f][0-9a-f]/*") if file.is_file()]


def open_remote(stack: ExitStack, *urls: str, timeout_s: float = PATIENT) -> RemoteStore:
    return stack.enter_context(closing(RemoteStore(parse_remote(",".join(urls)), timeout_s=timeout_s)))


def run_child(script: str, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    """The output of another Python process that runs `script`; it must end well."""
    command = [*prefix, sys.executable, "-c", script, *arguments]
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Place:
    """Where one kind of store keeps its blocks; `open` makes a store there, closed with the test."""

    kind: str
    make: Callable[[int], Store]
    stack: ExitStack
    bounded: bool = True

    def open(self, capacity: int = ROOM) -> Store:
        store = self.make(capacity)
        self.stack.callback(store.close)
        return store


def make_place(kind: str, stack: ExitStack, server: Callable[[], RedisProcess]) -> Place:
    if kind == "memory":
        return Place(kind, MemoryStore, stack)
    if kind == "remote":
        one = server()
        one.client().flushall()
        return Place(kind, lambda _: RemoteStore(parse_remote(one.url), timeout_s=PATIENT), stack, bounded=False)
    above = SHARED_MEMORY if kind == "host" else None
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bascule-test-", dir=above)))

    def make(capacity: int) -> Store:
        return DirectoryStore(directory, capacity, Tier(kind), timeout_s=PATIENT)

    return Place(kind, make, stack)


class MadServer:
    """Accepts connections and answers whatever comes with the same bytes, or drips them."""

    def __init__(self, answer: bytes, drip_s: float = 0.0) -> None:
        self._answer = answer
        self._drip_s = drip_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while connection.recv(1 << 16):
                if not self._drip_s:
                    connection.sendall(self._answer)
                for byte in self._answer if self._drip_s else b"":
                    connection.sendall(bytes([byte]))
                    sleep(self._drip_s)
