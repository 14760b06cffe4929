"""A real router and a real worker, and between them somebody who passes all on and speaks in the name of either."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import zmq

from bascule.types import Epoch
from bascule.wire import Cancel, Goodbye, Heartbeat, Register, Submit, WireError, encode, from_router, from_worker
from support.cluster import Cluster, ready_of

WAIT_S = 120.0
"""Of a wait for what takes a second: long runs go on beside other work."""
MOST_GROWTH = 200 << 20
"""Bytes that a process may grow by, whatever it was sent."""
PROMPT = list(range(100, 164))
WORKER = "mixed-0"
CONTEXT = 256
"""Tokens: what leaves the length of its output open should not take long."""


class Between:
    """Workers join it as their router. Messages are passed on as they are, in a thread of its own."""

    def __init__(self, router: str) -> None:
        self.offer: Register | None = None
        """Of the worker that joined last."""
        self.beats = 0
        self._router = router
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.LINGER, 0)
        self._front.bind("tcp://127.0.0.1:*")
        self.address = self._front.getsockopt_string(zmq.LAST_ENDPOINT)
        self._behind: dict[bytes, zmq.Socket[bytes]] = {}
        self._orders = self._context.socket(zmq.PULL)
        self._orders.bind("inproc://orders")
        self._say = self._context.socket(zmq.PUSH)
        self._say.connect("inproc://orders")
        self._thread = threading.Thread(target=self._run, name="between", daemon=True)
        self._thread.start()

    def to_router(self, epoch: str, data: bytes) -> None:
        """Say something as the worker of that epoch, which need not exist."""
        self._say.send_multipart([b"router", epoch.encode(), data])

    def to_worker(self, epoch: str, data: bytes) -> None:
        """Say something to a worker as its router."""
        self._say.send_multipart([b"worker", epoch.encode(), data])

    def close(self) -> None:
        self._say.send_multipart([b"end", b"", b""])
        self._thread.join(WAIT_S)
        self._say.close()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._orders, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                frames = socket.recv_multipart()
                if socket is self._front:
                    self._note(frames[-1])
                    self._up(poller, frames[0], frames[-1])
                elif socket is not self._orders:
                    self._front.send_multipart([socket.getsockopt(zmq.ROUTING_ID), *frames])
                elif frames[0] == b"router":
                    self._up(poller, frames[1], frames[2])
                elif frames[0] == b"worker":
                    self._front.send_multipart(frames[1:])
                else:
                    return

    def _up(self, poller: zmq.Poller, epoch: bytes, data: bytes) -> None:
        if epoch not in self._behind:
            socket = self._behind[epoch] = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.ROUTING_ID, epoch)
            socket.connect(self._router)
            poller.register(socket, zmq.POLLIN)
        self._behind[epoch].send(data)

    def _note(self, data: bytes) -> None:
        message = from_worker(data)
        if isinstance(message, Register):
            self.offer = message
        elif isinstance(message, Heartbeat):
            self.beats += 1


class Live:
    """The two processes, what they are sent, and how to see that they have taken no harm."""

    def __init__(self, cluster: Cluster, worker: subprocess.Popen[bytes], worker_log: Path, between: Between) -> None:
        assert between.offer is not None
        self.cluster = cluster
        self.between = between
        self.offer = between.offer
        self.sent = 0
        self._worker = worker
        self._logs = (cluster.log, worker_log)
        self._last: deque[tuple[str, bytes]] = deque(maxlen=8)
        self._submitted: set[tuple[Any, int]] = set()
        self.expected = self.answer()
        self._sizes = self._rss()

    def answer(self) -> list[int]:
        tokens: list[int] = self.cluster.complete(PROMPT, max_tokens=8)["choices"][0]["token_ids"]
        return tokens

    def note(self, where: str, data: bytes) -> None:
        """One more input, of which a failure will tell."""
        self.sent += 1
        self._last.append((where, data))
        if self.sent % 200 == 0:
            self.check_alive()

    def tell_router(self, sender: str, data: bytes) -> None:
        self.note(f"router, as {sender}", data)
        self.between.to_router(sender, data)

    def tell_worker(self, data: bytes) -> None:
        self.note("worker, as its router", data)
        with contextlib.suppress(WireError):
            if isinstance(message := from_router(data), Submit):
                self._submitted.add((message.request, message.attempt))
        self.between.to_worker(self.offer.epoch, data)

    def check_alive(self) -> None:
        """Both answer, and neither has met anything that its code did not expect."""
        beats = self.between.beats
        assert self.cluster.http.get(f"{self.cluster.url}/health").status_code == 200
        self._until(lambda: self.between.beats > beats, "the worker's next heartbeat")
        for log in self._logs:
            text = log.read_text(errors="replace")
            assert "Traceback" not in text, f"{self._told()}\n{text[text.index('Traceback') - 500 :][:6000]}"

    def check_unharmed(self) -> None:
        """Whoever was made up leaves; then both are idle with clean books, answer exactly, and are no larger."""
        for request, attempt in self._submitted:
            self.between.to_worker(self.offer.epoch, encode(Cancel(request, attempt)))
        self._submitted.clear()
        self._until(self._strangers_left, "made-up workers are gone")
        self.check_alive()
        self.cluster.wait_idle(WAIT_S)
        assert self.answer() == self.expected, self._told()
        for name, size in self._rss().items():
            assert size - self._sizes[name] < MOST_GROWTH, f"{name} grew from {self._sizes[name]} to {size} bytes"

    def _strangers_left(self) -> bool:
        strangers = [worker for worker in self.cluster.state()["workers"] if worker["id"] != WORKER]
        for worker in strangers:
            self.between.to_router(worker["epoch"], encode(Goodbye(worker["id"], Epoch(worker["epoch"]))))
        return not strangers

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self._worker.poll() is None, f"the worker ended; {self._told()}\n{self._logs[1].read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}; {self._told()}"
            time.sleep(0.02)

    def _rss(self) -> dict[str, int]:
        pids = {"router": self.cluster.process.pid, "worker": self._worker.pid}
        return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}

    def _told(self) -> str:
        return "the latest inputs: " + "\n".join(f"{where}: {data[:400]!r}" for where, data in self._last)


@contextlib.contextmanager
def live(folder: Path) -> Iterator[Live]:
    """Both processes until the block ends."""
    log, worker_log, ready_file = folder / "router.log", folder / "worker.log", folder / "ready"
    bascule, environment = [sys.executable, "-m", "bascule"], os.environ | {"COLUMNS": "200"}
    flags = ["--port", "0", "--bind", "tcp://127.0.0.1:*", "--policy", "single", "--ready-file", str(ready_file)]
    flags += ["--suspect-after", str(WAIT_S / 2), "--dead-after", str(WAIT_S)]
    with contextlib.ExitStack() as stack:
        router = _start(stack, [*bascule, "router", "smollm2", *flags], log, environment)
        between = Between(_address(router, log))
        stack.callback(between.close)
        join = ["--join", between.address, "--id", WORKER, "--engine", "mock", "--max-model-len", str(CONTEXT)]
        worker = _start(stack, [*bascule, "worker", "smollm2", *join], worker_log, environment)
        yield Live(Cluster(router, ready_of(router, ready_file, log), log), worker, worker_log, between)


def _start(
    stack: contextlib.ExitStack, command: list[str], log: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def _address(router: subprocess.Popen[bytes], log: Path) -> str:
    """Where the router says that workers join."""
    deadline = time.monotonic() + WAIT_S
    while not (found := re.search(r"--join (\S+)", log.read_text())):
        assert router.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found[1]
