"""A real Redis server in a process of its own, to be stopped, filled and killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

PATIENT = 20.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = monotonic() + PATIENT
    while not condition():
        assert monotonic() < deadline, f"waited {PATIENT:g} s for {what}"
        sleep(0.01)


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


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
