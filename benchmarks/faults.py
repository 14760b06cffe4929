"""The faults of `kv_faults.py`, each done for real: to a Redis server of our own, and to a file system of our own."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from bascule.kv.store.directory import DirectoryStore
from bascule.types import BlockHash

FILE_SYSTEM_BYTES = 768 << 20
TIER = "512MiB"
NEIGHBOUR_BYTES = 64 << 20
"""What the other process on the directory keeps to: little, so that it is always evicting."""
LARGEST_STEP = 1 << 20


def nothing() -> None:
    pass


@dataclass
class Fault:
    """Something that befalls the tier: it begins, may be done again before each request, and ends."""

    name: str
    begin: Callable[[], None]
    again: Callable[[], None] = nothing
    end: Callable[[], None] = nothing


class Remote:
    """A Redis server on one port, or whatever takes its place there."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """An empty server, once it answers."""
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            sys.exit("neither redis-server nor valkey-server is installed (Debian's package is redis-server)")
        self._run([binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        deadline = time.monotonic() + 20
        while True:
            with suppress(redis.ConnectionError):
                self._client().ping()
                return
            if time.monotonic() > deadline:
                sys.exit(f"the Redis server on port {self.port} did not start")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, also to one that is stopped; does nothing if there is none."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def faults(self) -> list[Fault]:
        return [
            Fault("Redis killed", self.kill, end=self.start),
            Fault("Redis hung (SIGSTOP)", lambda: self._signal(signal.SIGSTOP), end=self._wake),
            Fault(
                "Redis full (maxmemory)",
                lambda: self.configure("maxmemory", "1"),
                end=lambda: self.configure("maxmemory", "0"),
            ),
            Fault("garbage on Redis's port", self._lie, end=self._restart),
        ]

    def _wake(self) -> None:
        self._signal(signal.SIGCONT)

    def configure(self, name: str, value: str) -> None:
        self._client().config_set(name, value)

    def _lie(self) -> None:
        self.kill()
        self._run([sys.executable, __file__, "--answer-garbage", str(self.port)])

    def _restart(self) -> None:
        self.kill()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _run(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)


class Disk:
    """A file system of our own with the tier's directory in it."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount
        self.directory = mount / "kv"
        self._filler = mount / "filler"
        self._neighbour: subprocess.Popen[bytes] | None = None
        self._draw = random.Random(1)

    def faults(self) -> list[Fault]:
        return [
            Fault("disk full", self._fill, self._fill, self._filler.unlink),
            Fault("files truncated", self._truncate, self._truncate),
            Fault("bits flipped", self._flip, self._flip),
            Fault("directory read-only", lambda: self._remount("ro"), end=lambda: self._remount("rw")),
            Fault("two processes on it", self._share, end=self.part),
        ]

    def part(self) -> None:
        """The other process ends."""
        if self._neighbour is not None:
            self._neighbour.kill()
            self._neighbour.wait()
            self._neighbour = None

    def _fill(self) -> None:
        """To the last byte that the file system has."""
        step = LARGEST_STEP
        with self._filler.open("ab", buffering=0) as file:
            while step:
                try:
                    file.write(bytes(step))
                except OSError:
                    step //= 2

    def _truncate(self) -> None:
        for file in self._blocks():
            with suppress(FileNotFoundError):
                os.truncate(file, file.stat().st_size // 2)

    def _flip(self) -> None:
        """One bit of each file, at another place each time; of one that was cut to nothing there is none."""
        for file in self._blocks():
            with suppress(FileNotFoundError), file.open("r+b") as damaged:
                if not (size := file.stat().st_size):
                    continue
                at = self._draw.randrange(size)
                damaged.seek(at)
                [byte] = damaged.read(1)
                damaged.seek(at)
                damaged.write(bytes([byte ^ 1 << self._draw.randrange(8)]))

    def _blocks(self) -> Iterator[Path]:
        return self.directory.glob("v1/??/*")

    def _remount(self, how: str) -> None:
        deadline = time.monotonic() + 10
        while subprocess.run(["mount", "-o", f"remount,{how}", str(self._mount)], capture_output=True).returncode:
            if time.monotonic() > deadline:
                sys.exit(f"{self._mount} cannot be remounted {how}: somebody writes there all the time")
            time.sleep(0.02)

    def _share(self) -> None:
        self._neighbour = subprocess.Popen([sys.executable, __file__, "--share", str(self.directory)])


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """A small file system in memory, unmounted at the end, whatever happens."""
    mount = folder / "mount"
    mount.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM_BYTES}", "bascule-faults", str(mount)]
    if subprocess.run(how).returncode:
        sys.exit("a file system to be filled cannot be mounted; be root, or leave out the disk with --tiers remote")
    found = Disk(mount)
    try:
        yield found
    finally:
        found.part()
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@contextmanager
def remote() -> Iterator[Remote]:
    found = Remote()
    try:
        yield found
    finally:
        found.kill()


def answer_garbage(port: int) -> None:
    """To whatever is said: random bytes, replies of types that nobody has asked for, lines that do not end."""
    kinds = [
        lambda: random.randbytes(5000),
        lambda: b"*3\r\n:7\r\n$4\r\nlies\r\n*0\r\n" * 50,
        lambda: b"$999999999\r\nshort",
        lambda: b"+" + b"x" * 10_000,
    ]

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while connection.recv(1 << 16):
                connection.sendall(random.choice(kinds)())

    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def share(directory: Path) -> None:
    """Write, read, delete and evict among the other's blocks, a hundred times each second, until killed."""
    store = DirectoryStore(directory, NEIGHBOUR_BYTES)
    draw = random.Random(2)
    while True:
        store.put({BlockHash(draw.randbytes(16)): draw.randbytes(300_000) for _ in range(4)})
        names = [name for page in store.names() for name in page]
        if names:
            store.get(draw.choices(names, k=4))
            store.drop(draw.choices(names, k=2))
        time.sleep(0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answer-garbage", type=int, metavar="PORT")
    parser.add_argument("--share", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    if arguments.answer_garbage is not None:
        answer_garbage(arguments.answer_garbage)
    elif arguments.share is not None:
        share(arguments.share)
