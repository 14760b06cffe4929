"""Every tier of the store on a place of its own, and a real Redis server to be stopped, filled and killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from bascule.kv.store.base import Store
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.remote import RemoteStore
from bascule.kv.store.targets import parse_remote
from bascule.types import BlockHash, Tier

PATIENT = 20.0
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


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = monotonic() + PATIENT
    while not condition():
        assert monotonic() < deadline, f"waited {PATIENT:g} s for {what}"
        sleep(0.01)


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
        return DirectoryStore(directory, capacity, Tier(kind), timeout_s=PATIENT, touch_after_s=0)

    return Place(kind, make, stack)


def redis_binary() -> str:
    """The server's program; without it the test is skipped here and fails in CI."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        missing = "neither redis-server nor valkey-server is installed (Debian's package is redis-server)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


class RedisProcess:
    """A server on a free loopback port, without persistence."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self.port = _free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            [redis_binary(), *arguments, *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
        )
        try:
            wait_until(self._answers, "the Redis server")
        except BaseException:
            self.stop()
            raise

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the Redis server has ended"
        try:
            return bool(self.client().ping())
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False


@contextmanager
def redis_process(*options: str) -> Iterator[RedisProcess]:
    process = RedisProcess(*options)
    try:
        yield process
    finally:
        process.stop()


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


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
