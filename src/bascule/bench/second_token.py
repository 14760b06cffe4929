"""Time to the second token through a real server: prefilled elsewhere and handed over, against all in one worker."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from msgspec import Struct

from bascule.bench.transport_target import SEALED
from bascule.bench.transports import BenchFailed
from bascule.keys import write_cluster_key

OUTPUT_TOKENS = 4
_START_S = 180.0
_STOP_S = 30.0
_ANSWER_S = 120.0


class SecondTokenFigures(Struct, frozen=True, kw_only=True):
    """Seconds from sending a request to the arrival of its second token; medians over the runs."""

    prompt_tokens: int
    transport: str
    remote_s: float
    local_s: float
    ratio: float
    """Of the two, run by run."""
    remote_first_s: float
    local_first_s: float
    exposed_s: float
    """Second token minus first, remote minus local: what of the handoff nothing hides."""


@dataclass(frozen=True)
class Arrival:
    """When the first two tokens came, in seconds from sending the request."""

    first_s: float
    second_s: float


@dataclass(frozen=True)
class ServerPlan:
    """What is the same for all servers: model, core for each role, and flags."""

    model: str
    cores: list[int]
    flags: tuple[str, ...]
    vocab: int
    """Of the random prompts."""


def measure(plan: ServerPlan, lengths: Sequence[int], transports: Sequence[str], runs: int) -> list[SecondTokenFigures]:
    """Ask each server in turn for each prompt length, `runs` times; no two prompts are alike.

    One worker on the first core does all, against that as prefill and another on the last core as decode worker. Raises
    BenchFailed where a server does not start or answer, or places a request otherwise than it was set up for.
    """
    first, last = plan.cores[0], plan.cores[-1]
    with ExitStack() as stack:
        servers = {"local": _start(plan, stack, "--policy=single", f"--devices=cpu:{first}")}
        for transport in transports:
            flags = ["--policy=disaggregated", f"--devices=cpu:{first},cpu:{last}"]
            if transport == SEALED:
                key = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bascule-bench-")), "key")
                write_cluster_key(key)
                flags += ["--transfer=tcp", f"--cluster-key-file={key}"]
            else:
                flags += [f"--transfer={transport}"]
            servers[transport] = _start(plan, stack, *flags)
        draw = random.Random(0)
        figures = []
        for length in lengths:
            arrivals: dict[str, list[Arrival]] = {name: [] for name in servers}
            for run in range(-1, runs):
                for name, server in servers.items():
                    prompt = [draw.randrange(plan.vocab) for _ in range(length)]
                    arrival = server.ask(prompt, "local" if name == "local" else "remote")
                    if run >= 0:  # the one before is for warming up
                        arrivals[name].append(arrival)
            figures += [_figures(length, name, arrivals[name], arrivals["local"]) for name in transports]
        return figures


def _figures(length: int, transport: str, remote: list[Arrival], local: list[Arrival]) -> SecondTokenFigures:
    return SecondTokenFigures(
        prompt_tokens=length,
        transport=transport,
        remote_s=median(one.second_s for one in remote),
        local_s=median(one.second_s for one in local),
        ratio=median(one.second_s / other.second_s for one, other in zip(remote, local, strict=True)),
        remote_first_s=median(one.first_s for one in remote),
        local_first_s=median(one.first_s for one in local),
        exposed_s=median(one.second_s - one.first_s for one in remote)
        - median(one.second_s - one.first_s for one in local),
    )


@dataclass(frozen=True)
class Server:
    url: str
    model: str

    def ask(self, prompt: list[int], placement: str) -> Arrival:
        """Stream one completion of `prompt`."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        data = json.dumps(body).encode()
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_ANSWER_S)
        try:
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            started = time.perf_counter()
            connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise BenchFailed(f"the server answered {answer.status}: {answer.read()[:500].decode()}")
            times = [moment - started for moment in _token_times(answer)]
        except OSError as error:
            raise BenchFailed(f"the server at {self.url} does not answer: {error}") from error
        finally:
            connection.close()
        route = answer.getheader("X-Bascule-Route", "")
        if not route.startswith(placement):
            raise BenchFailed(f"a request was to be placed {placement}, but its route is {route!r}")
        if len(times) < 2:
            raise BenchFailed(f"{len(times)} tokens came instead of {OUTPUT_TOKENS}")
        return Arrival(times[0], times[1])


def _token_times(answer: http.client.HTTPResponse) -> Iterator[float]:
    """When each token came (`time.perf_counter`)."""
    while line := answer.readline():
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            for choice in json.loads(line[6:]).get("choices", ()):
                yield from [now] * len(choice.get("token_ids") or ())


def _start(plan: ServerPlan, stack: ExitStack, *flags: str) -> Server:
    return stack.enter_context(_serve(plan, flags))


@contextmanager
def _serve(plan: ServerPlan, flags: tuple[str, ...]) -> Iterator[Server]:
    """A server of its own on free ports; raises BenchFailed with the end of its log if it does not come up."""
    with tempfile.TemporaryDirectory(prefix="bascule-bench-") as folder:
        log, ready_file = Path(folder, "log"), Path(folder, "ready")
        command = [sys.executable, "-m", "bascule", "serve", plan.model, "--port=0", f"--ready-file={ready_file}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--no-prefix-cache", *plan.flags, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "200"},
            )
        try:
            deadline = time.monotonic() + _START_S
            while not ready_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchFailed(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.05)
            ready = json.loads(ready_file.read_text())
            yield Server(str(ready["url"]), str(ready["model"]))
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
