"""How the harness tells a worker which fault to commit next, and the worker tells that it has; a datagram each."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread

import msgspec
from msgspec import Struct

EXPIRES_S = 8.0
"""An order that nothing has come along for is given up after this."""
HEARD = "heard"
"""What a report says of an order that has only come."""


class Order(Struct, frozen=True):
    """One fault, to be committed at the first occasion until then."""

    number: int
    fault: str
    seed: int
    until: float
    """By the machine's monotonic clock."""
    seconds: float = 0.0
    what: str = ""
    """The kind of message, where the fault is one of messages; or phase and request, where it is done to that alone."""
    for_good: bool = False
    """Lose a message each time that it is repeated."""
    answer: bool = False
    """Report that it has come, as well."""


class Report(Struct, frozen=True):
    """An order has been carried out, to a request where one is known."""

    number: int
    worker: str
    pid: int
    request: str
    detail: str


def orders_address(folder: Path, worker: str) -> str:
    return str(folder / f"{worker}.orders")


def reports_address(folder: Path) -> str:
    return str(folder / "reports")


def give(order: Order, folder: Path, worker: str, post: socket.socket) -> bool:
    """Tell a worker; False if nobody is there to be told."""
    try:
        post.sendto(msgspec.msgpack.encode(order), orders_address(folder, worker))
    except OSError:
        return False
    return True


class Orders:
    """The worker's side. Any thread may ask for an order."""

    def __init__(self, folder: Path, worker: str, at_once: dict[str, Callable[[Order], None]]) -> None:
        """Faults in `at_once` need no occasion: they are called, in a thread of their own, when their order comes."""
        self._worker = worker
        self._at_once = at_once
        self._lock = Lock()
        self._waiting: list[Order] = []
        self._reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._reports_to = reports_address(folder)
        address = orders_address(folder, worker)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)  # of the process before this one
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        Thread(target=self._listen, name="orders", daemon=True).start()

    def take(self, *faults: str, what: str = "") -> Order | None:
        """The oldest order for one of these faults (of messages: to one of kind `what`); it is nobody else's then."""
        if not self._waiting:
            return None
        now = time.monotonic()
        with self._lock:
            self._waiting = [order for order in self._waiting if order.until > now]
            for order in self._waiting:
                if order.fault in faults and order.what in ("", what):
                    self._waiting.remove(order)
                    return order
        return None

    def report(self, order: Order, request: str = "", detail: str = "") -> None:
        report = Report(order.number, self._worker, os.getpid(), request, detail)
        with contextlib.suppress(OSError):  # a harness that has ended wants to know nothing more
            self._reports.sendto(msgspec.msgpack.encode(report), self._reports_to)

    def _listen(self) -> None:
        decode = msgspec.msgpack.Decoder(Order).decode
        while True:
            order = decode(self._socket.recv(1 << 16))
            if (call := self._at_once.get(order.fault)) is not None:
                call(order)
            else:
                with self._lock:
                    self._waiting.append(order)
            if order.answer:
                self.report(order, detail=HEARD)
