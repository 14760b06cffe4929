"""A real `bascule serve` (or its parts) in processes of its own, for tests to talk to, kill and inspect."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_S = 120.0
STOP_S = 40.0


def environment() -> dict[str, str]:
    """Of processes that find the tests' own modules, and do not wrap what they print."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"COLUMNS": "200", "PYTHONPATH": os.pathsep.join(paths)}


@dataclass
class Cluster:
    """A running server. `process` is the launcher; workers are its children."""

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    log: Path
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120.0))

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    @property
    def model(self) -> str:
        return str(self.ready["model"])

    def pid(self, worker: str) -> int:
        """The current process id of a worker (it changes when the worker is started again)."""
        return next(int(one["pid"]) for one in self.state()["workers"] if one["id"] == worker)

    def worker_socket(self) -> str:
        """The router's address for workers, from a worker's command line."""
        pid = self.state()["workers"][0]["pid"]
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        return words[words.index("--join") + 1]

    def state(self) -> dict[str, Any]:
        answer = self.http.get(f"{self.ready['admin_url']}/admin/state")
        answer.raise_for_status()
        state: dict[str, Any] = answer.json()
        return state

    def complete(self, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        """One completion, not streamed; raises for any status but 200."""
        body = {"model": self.model, "prompt": prompt, "return_token_ids": True, "temperature": 0} | fields
        answer = self.http.post(f"{self.url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        result["route"] = answer.headers["X-Bascule-Route"]
        return result

    def wait(self, condition: Callable[[dict[str, Any]], bool], what: str, seconds: float = 20.0) -> dict[str, Any]:
        """Poll the admin state until it meets a condition; fails with the last state."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.state()
            if condition(state):
                return state
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}; last state: {json.dumps(state)}"
            time.sleep(0.1)

    def wait_idle(self, seconds: float = 20.0) -> dict[str, Any]:
        """Wait until nothing runs, waits or is leased anywhere, and the books are clean."""
        return self.wait(
            lambda state: (
                state["active"] == state["queued"] == state["integrity_violations"] == 0
                and all(
                    worker[key] == 0
                    for worker in state["workers"]
                    for key in ("running", "waiting", "kv_blocks_leased", "kv_blocks_quarantined")
                )
            ),
            "idle, without leases and with clean books",
            seconds,
        )

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


def patient(flags: Sequence[str]) -> list[str]:
    """`flags`, with patience for workers that a busy machine lets stand still, unless they say how much there is."""
    silence = () if any("-after" in flag for flag in flags) else ("--suspect-after=30", "--dead-after=60")
    return [*silence, *flags]


@contextlib.contextmanager
def serve(model: str | Path, *flags: str, program: Sequence[str] = ("bascule",)) -> Iterator[Cluster]:
    """Run `bascule serve` until the block ends; the log is shown when something fails.

    `program` is a module that takes the command line instead, and what it wants before that.
    """
    with tempfile.TemporaryDirectory(prefix="bascule-test-") as folder:
        log, ready_file = Path(folder, "log"), Path(folder, "ready")
        command = [sys.executable, "-m", *program, "serve", str(model), "--port", "0"]
        command += ["--ready-file", str(ready_file), *patient(flags)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
        try:
            cluster = Cluster(process, ready_of(process, ready_file, log), log)
            try:
                yield cluster
            except BaseException:
                print(log.read_text(errors="replace")[-8000:])
                raise
            code = cluster.stop()
            assert code == 0, f"serve ended with exit code {code}: {log.read_text(errors='replace')[-4000:]}"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def ready_of(process: subprocess.Popen[bytes], ready_file: Path, log: Path) -> dict[str, Any]:
    """What a server writes to its ready file, once it does."""
    deadline = time.monotonic() + START_S
    while not ready_file.exists():
        assert process.poll() is None, f"serve ended: {log.read_text(errors='replace')[-4000:]}"
        assert time.monotonic() < deadline, f"not ready in {START_S} s: {log.read_text(errors='replace')[-4000:]}"
        time.sleep(0.05)
    content: dict[str, Any] = json.loads(ready_file.read_text())
    return content


def run_cli(*arguments: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "bascule", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"COLUMNS": "200"},
    )


def run_clis(*commands: Sequence[str], timeout: float = 240.0) -> list[subprocess.CompletedProcess[str]]:
    """Run several commands to their ends, as many at once as there are cores; their results are in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda command: run_cli(*command, timeout=timeout), commands))
