"""A router and workers started one by one on the two hosts of a cable, as an operator would on two machines."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from bascule.bench.namespaces import Cable, Host
from bascule.bench.transports import BenchFailed

OURS = (sys.executable, "-m", "bascule")
_START_S = 180.0
_STOP_S = 40.0
_ANSWER_S = 180.0


class Place(Protocol):
    """A host to start processes on."""

    def inside(self) -> AbstractContextManager[None]:
        """Within it, this thread and its children are there."""


@dataclass(frozen=True)
class Piece:
    """A worker to start: where, as what, and with which flags beside the transport's."""

    id: str
    role: str
    host: Host
    device: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Apart:
    """A cluster whose router is on the near host; requests have to come from there."""

    near: Host
    model: str
    url: str
    admin_url: str
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """What `/admin/state` says."""
        found: dict[str, Any] = self.get(f"{self.admin_url}/admin/state")
        return found

    def chosen(self, request: str) -> str:
        """Where the request with that X-Request-Id went, as in X-Bascule-Route."""
        return str(self.get(f"{self.admin_url}/admin/decisions/{request}")["chosen"])

    def get(self, url: str) -> Any:
        return json.loads(self.ask("GET", url)[0])

    def complete(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], str]:
        """Token ids of a greedy completion, not streamed, and its X-Bascule-Route."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer, headers = self.ask("POST", f"{self.url}/v1/completions", json.dumps(body).encode())
        return json.loads(answer)["choices"][0]["token_ids"], headers["X-Bascule-Route"]

    def ask(self, method: str, url: str, body: bytes | None = None) -> tuple[bytes, http.client.HTTPMessage]:
        """Body and headers of an answer; raises BenchFailed for any status but 200."""
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_ANSWER_S)
        try:
            with self.near.inside():
                connection.connect()
            connection.request(method, address.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise BenchFailed(f"{method} {url} has no answer: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise BenchFailed(f"{method} {url} was answered {answer.status}: {content[:500].decode(errors='replace')}")
        return content, answer.headers

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until nothing runs or is leased; raises BenchFailed if that takes longer, or books are wrong."""
        keys = ("running", "waiting", "kv_blocks_leased", "kv_blocks_quarantined")
        deadline = time.monotonic() + seconds
        while True:
            state = self.state()
            busy = [state["active"], state["queued"], *(worker[key] for worker in state["workers"] for key in keys)]
            if not any(busy) and not state["integrity_violations"]:
                return
            if time.monotonic() > deadline:
                raise BenchFailed(f"not idle after {seconds:g} s: {json.dumps(state)}")
            time.sleep(0.05)

    def stop(self) -> list[int]:
        """Stop the router, then the workers; their exit codes in that order."""
        return [_stopped(process) for process in self._processes]


@contextmanager
def running_apart(
    cable: Cable, model: str, port: int, pieces: Sequence[Piece], folder: Path, *front: str
) -> Iterator[Apart]:
    """A router at `port` of the near host with flags `front`, and the workers, from when all have joined.

    All of a cluster's `port`, which names its logs in `folder` too, is its own. Raises BenchFailed with the end of the
    log of what does not start.
    """
    ready_file = folder / f"{port}.ready"
    join = f"tcp://{cable.near.address}:{port}"
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []

        def start(host: Host, name: str, *command: str) -> None:
            process = stack.enter_context(started(host, folder / f"{port}-{name}.log", *command))
            processes.append(process)

        flags = (
            f"--bind={join}",
            "--insecure",
            "--port=0",
            f"--ready-file={ready_file}",
            "--log-level=warning",
            *front,
        )
        start(cable.near, "router", "router", model, *flags)
        for piece in pieces:
            where = (f"--join={join}", "--insecure", f"--host={piece.host.address}", f"--device={piece.device}")
            what = (f"--id={piece.id}", f"--role={piece.role}", "--transfer=tcp", f"--parent={os.getpid()}")
            start(piece.host, piece.id, "worker", model, *where, *what, *piece.flags)
        names = ["router", *(piece.id for piece in pieces)]
        deadline = time.monotonic() + _START_S

        def look() -> None:
            for name, process in zip(names, processes, strict=True):
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (folder / f"{port}-{name}.log").read_text(errors="replace")[-2000:]
                    raise BenchFailed(f"{name} did not start: {log}")
            time.sleep(0.05)

        while not ready_file.exists():
            look()
        ready = json.loads(ready_file.read_text())
        cluster = Apart(cable.near, str(ready["model"]), str(ready["url"]), str(ready["admin_url"]), processes)
        while len(cluster.state()["workers"]) < len(pieces):
            look()
        yield cluster


@contextmanager
def started(host: Place, log: Path, *command: str, begin: Sequence[str] = OURS) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours on a host, stopped at the end; `begin` are the first words of its line."""
    with log.open("wb") as output, host.inside():
        process = subprocess.Popen(
            [*begin, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "200"},
        )
    try:
        yield process
    finally:
        _stopped(process)


def _stopped(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
