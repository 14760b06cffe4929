"""Two hosts within this machine: network namespaces without names, joined by one cable of a chosen rate.

Needs root, `ip` and `tc` (Debian: iproute2) and a kernel with veth and tbf. Nothing is left behind, however a program
ends: the kernel removes a namespace with the last process and descriptor that are in it. Run as a program
(`python -m bascule.bench.namespaces`) it says what is in the way where this machine cannot make them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from bascule.errors import BasculeError

_NEW_NET = 0x40000000
"""CLONE_NEWNET"""
_DEVICE = "cable"
_COMMAND_S = 10.0
_BURST_S, _LEAST_BURST = 0.001, 16 << 10
"""Seconds at the rate, and bytes. From 0.5 Gbit/s on the largest piece that the kernel hands over (64 KiB) fits."""
_QUEUE_S, _LEAST_QUEUE = 0.01, 256 << 10
"""Likewise; less would lose large pieces that come several at a time."""
_PIECE = 1 << 20


class NoNamespaces(BasculeError):
    """This machine, or this user, cannot make network namespaces and join them."""


@dataclass(frozen=True)
class Host:
    """One end of the cable: a network namespace with loopback and one address."""

    address: str
    _namespace: int
    """A descriptor that keeps it."""

    @property
    def inode(self) -> int:
        """What `/proc/PID/ns/net` shows of processes that are on this host."""
        return os.fstat(self._namespace).st_ino

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is on that host until the block ends; sockets and processes made there stay there."""
        home = _own_namespace()
        _enter(self._namespace)
        try:
            yield
        finally:
            _enter(home)
            os.close(home)


@dataclass(frozen=True)
class Cable:
    """What joins two hosts. It has no rate of its own until `limit`, and no delay but the kernel's."""

    near: Host
    far: Host

    def limit(self, bits_per_s: float) -> None:
        """Let so much through in each direction from now on; traffic under way is not lost.

        A token bucket of a millisecond (a few packets at the least), and a queue of 10 ms before it.
        """
        burst = max(_LEAST_BURST, int(bits_per_s / 8 * _BURST_S))
        queue = max(_LEAST_QUEUE, int(bits_per_s / 8 * _QUEUE_S))
        for host in (self.near, self.far):
            with host.inside():
                bucket = f"tbf rate {bits_per_s:.0f}bit burst {burst} limit {queue}"
                _run(f"tc qdisc replace dev {_DEVICE} root {bucket}")

    def sent(self) -> int:
        """Bytes that have gone from the near host to the far one since the start, headers counted."""
        with self.near.inside():
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        counts = next(line for line in lines if line.strip().startswith(f"{_DEVICE}:"))
        return int(counts.split(":")[1].split()[8])

    def measured(self, seconds: float = 1.0) -> float:
        """Bits per second that one TCP connection brings from the near host to the far one, headers not counted."""
        with self.far.inside():
            listening = socket.create_server((self.far.address, 0))
        with self.near.inside(), closing(listening):
            sending = socket.create_connection(listening.getsockname())
            receiving, _ = listening.accept()
        with closing(sending), closing(receiving):
            receiving.settimeout(_COMMAND_S)
            sender = Thread(target=_pour, args=(sending,), daemon=True)
            sender.start()
            rate = _drink(receiving, seconds)
            receiving.shutdown(socket.SHUT_RDWR)
            sender.join()
        return rate


@contextmanager
def two_hosts() -> Iterator[Cable]:
    """Two hosts that reach each other and nothing else, until the block ends and all processes there have.

    Raises NoNamespaces with what to do about it.
    """
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NoNamespaces(f"{program} is not installed; Debian's package is iproute2")
    near = far = -1
    try:
        near, far = _new_namespace(), _new_namespace()
        cable = Cable(Host("192.0.2.1", near), Host("192.0.2.2", far))
        with cable.near.inside():
            other = f"/proc/{os.getpid()}/fd/{far}"
            _run(f"ip link add {_DEVICE} type veth peer name {_DEVICE} netns {other}")
        for host in (cable.near, cable.far):
            with host.inside():
                _run("ip link set lo up")
                _run(f"ip address add {host.address}/30 dev {_DEVICE}")
                _run(f"ip link set {_DEVICE} up")
        cable.limit(1e9)
        yield cable
    finally:
        for namespace in (near, far):
            if namespace >= 0:
                os.close(namespace)


def why_not() -> str | None:
    """What keeps this machine from making two hosts; None where it can."""
    try:
        with two_hosts():
            return None
    except NoNamespaces as error:
        return str(error)


def _own_namespace() -> int:
    try:
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NoNamespaces(f"{error}; it takes Linux with network namespaces, and /proc") from error


def _new_namespace() -> int:
    """A descriptor of a new network namespace; this thread stays where it is."""
    home = _own_namespace()
    try:
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NET):
            reason = os.strerror(ctypes.get_errno())
            raise NoNamespaces(f"no network namespace can be made ({reason}); run as root, outside a sandbox")
        try:
            return _own_namespace()
        finally:
            _enter(home)
    finally:
        os.close(home)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _NEW_NET):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter a network namespace: {os.strerror(number)}")


def _run(command: str) -> None:
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoNamespaces(
            f"`{command}` has not ended after {_COMMAND_S:g} s; try again when less runs here"
        ) from error
    if done.returncode:
        raise NoNamespaces(f"`{command}` failed: {done.stderr.strip()}; it takes root and a kernel with veth and tbf")


def _pour(sending: socket.socket) -> None:
    """Send until the other end has gone."""
    piece = bytes(_PIECE)
    with suppress(OSError):
        while True:
            sending.sendall(piece)


def _drink(receiving: socket.socket, seconds: float) -> float:
    """Bits per second over so long, after a fifth of that time for the connection to come up to speed."""
    memory = bytearray(_PIECE)
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds / 5:
        receiving.recv_into(memory)
    received, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        received += receiving.recv_into(memory)
    return 8 * received / (now - begun)


if __name__ == "__main__":
    if reason := why_not():
        print(f"two hosts cannot be made within this machine, so tests of slow links are skipped: {reason}")
