"""Planes that are closed: processes with and without keys, on one host and on two; what a listener hears."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from bascule.bench.namespaces import Cable, Host, two_hosts, why_not
from support.cluster import run_cli, run_clis, serve

MOCK = ("--engine", "mock")
PROMPT = [23456] * 64
"""Stands in messages as this number, big-endian behind its type, again and again."""
ON_THE_WIRE = struct.pack("!BH", 0xCD, PROMPT[0]) * 8
START_S = 60.0

Started = AbstractContextManager[subprocess.Popen[bytes]]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.key"
    assert run_cli("cluster-key", str(path)).returncode == 0
    return path


def test_planes_that_others_could_reach_do_not_open_without_a_key(tmp_path: Path, key: Path) -> None:
    readable = tmp_path / "readable.key"
    readable.write_bytes(key.read_bytes())
    readable.chmod(0o644)
    worker = ["worker", "smollm2", "--id", "w", *MOCK]
    refused = [
        (["router", "smollm2", "--bind", "tcp://0.0.0.0:*"], "--bind tcp://0.0.0.0:*"),
        ([*worker, "--join", "tcp://127.0.0.1:1", "--host", "0.0.0.0"], "--host 0.0.0.0"),
        ([*worker, "--join", "tcp://192.0.2.1:8100"], "--join tcp://192.0.2.1:8100"),
        (["serve", "smollm2", "--cluster-key-file", str(readable), *MOCK], f"chmod 600 {readable}"),
        (["serve", "smollm2", "--ssl-keyfile", str(key), *MOCK], "--ssl-keyfile needs --ssl-certfile"),
        (["serve", "smollm2", "--api-key", "short", *MOCK], "8 to 512 characters"),
    ]
    runs = run_clis(*(command for command, _ in refused))
    for (command, said), result in zip(refused, runs, strict=True):
        assert result.returncode == 2, (command, result.stderr)
        assert said in " ".join(result.stderr.split()), command
    assert all("--cluster-key-file FILE" in " ".join(run.stderr.split()) for run in runs[:3])


def test_secrets_are_in_no_log_and_on_no_command_line(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, admin, secret = "an-api-key-of-ours", "an-admin-key-of-ours", key.read_text().split()[1]
    config = tmp_path / "bascule.toml"
    config.write_text(f'api-key = "{api}"\nadmin-key = "{admin}"\n')
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    flags = ["--config", str(config), "--cluster-key-file", str(key), "--log-level", "debug", *MOCK]
    with serve("smollm2", *flags) as cluster:
        assert cluster.http.post(f"{cluster.url}/v1/completions", json={"prompt": "x"}).status_code == 401
        cluster.http.headers["Authorization"] = f"Bearer {api}"
        answer = cluster.complete(PROMPT, max_tokens=4)
        assert answer["route"].startswith("remote;")
        assert run_cli("explain", str(answer["id"]).removeprefix("cmpl-")).returncode == 0
        cluster.http.headers["Authorization"] = f"Bearer {admin}"
        pids = [cluster.process.pid, *(worker["pid"] for worker in cluster.state()["workers"])]
        commands = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids).decode()
        (left,) = (tmp_path / "bascule").glob("*.json")
        assert left.stat().st_mode & 0o777 == 0o600 and admin in left.read_text()
        told = cluster.log.read_text() + commands + json.dumps(cluster.ready)
    assert commands.count(str(key)) == 3 and "DEBUG" in told
    for each in (api, admin, secret):
        assert each not in told


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if (reason := why_not()) is not None:
        pytest.skip(f"two hosts cannot be made within this machine: {reason}")
    with two_hosts() as made:
        yield made


class Sniffer(threading.Thread):
    """Everything that goes over the cable, from when it is made until `stop`."""

    def __init__(self, host: Host) -> None:
        super().__init__(daemon=True)
        with host.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind(("cable", 0))
        self._socket.settimeout(0.2)
        self._stopping = threading.Event()
        self._heard: list[bytes] = []
        self.start()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._heard.append(self._socket.recv(1 << 17))
            except TimeoutError:
                continue

    def stop(self) -> bytes:
        self._stopping.set()
        self.join(10)
        self._socket.close()
        return b"".join(self._heard)


@contextmanager
def process(host: Host, log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours on a host, stopped at the end."""
    with log.open("wb") as output, host.inside():
        child = subprocess.Popen(
            [sys.executable, "-m", "bascule", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "200"},
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def router(cable: Cable, folder: Path, *flags: str) -> Iterator[tuple[str, Path, Path]]:
    """Where workers join, the ready file and the log of a router on the near host."""
    join, ready, log = f"tcp://{cable.near.address}:8100", folder / "ready", folder / "router.log"
    command = ("router", "smollm2", "--bind", join, "--port=0", "--ready-file", str(ready), *flags)
    with process(cable.near, log, *command):
        yield join, ready, log


def worker(cable: Cable, folder: Path, join: str, far: bool, role: str, *flags: str) -> Started:
    host = cable.far if far else cable.near
    where = ("--join", join, "--host", host.address, "--transfer=tcp", "--id", role, "--role", role)
    return process(host, folder / f"{role}.log", "worker", "smollm2", *where, *MOCK, *flags)


def until(condition: Callable[[], bool], what: str, logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, what + "".join(f"\n{log}: {log.read_text()[-1500:]}" for log in logs)
        time.sleep(0.05)


def heard(cable: Cable, folder: Path, *flags: str) -> bytes:
    """What crosses the cable while a prompt is prefilled on the far host and decoded on the near one."""
    with ExitStack() as stack:
        join, ready, log = stack.enter_context(router(cable, folder, "--policy=disaggregated", *flags))
        for far, role in ((True, "prefill"), (False, "decode")):
            stack.enter_context(worker(cable, folder, join, far, role, *flags))
        until(ready.exists, "the router is not ready", [log, folder / "prefill.log", folder / "decode.log"])
        content = json.loads(ready.read_text())
        with cable.near.inside(), httpx.Client(timeout=START_S) as client:
            until(
                lambda: len(client.get(f"{content['admin_url']}/admin/state").json()["workers"]) == 2,
                "not both workers have joined",
                [log],
            )
            sniffer = Sniffer(cable.near)
            body = {"model": content["model"], "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
            answer = client.post(f"{content['url']}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Bascule-Route"] == "remote;prefill=prefill;decode=decode"
        return sniffer.stop()


def test_a_listener_on_the_cable_reads_prompts_without_a_key_and_none_with_it(
    cable: Cable, tmp_path: Path, key: Path
) -> None:
    folders = [tmp_path / name for name in ("open", "closed")]
    for folder in folders:
        folder.mkdir()
    in_clear = heard(cable, folders[0], "--insecure")
    assert ON_THE_WIRE in in_clear and b"prefill" in in_clear
    assert "neither authenticated nor encrypted" in " ".join((folders[0] / "prefill.log").read_text().split())
    encrypted = heard(cable, folders[1], "--cluster-key-file", str(key))
    assert len(encrypted) > 2000
    assert ON_THE_WIRE not in encrypted and struct.pack("!BH", 0xCD, PROMPT[0]) * 2 not in encrypted
    assert b"prefill" not in encrypted and key.read_text().split()[1].encode() not in encrypted


def test_a_worker_on_another_host_with_another_key_or_none_is_turned_away(
    cable: Cable, tmp_path: Path, key: Path
) -> None:
    other = tmp_path / "other.key"
    assert run_cli("cluster-key", str(other)).returncode == 0
    with router(cable, tmp_path, "--cluster-key-file", str(key)) as (join, ready, log):
        until(lambda: "start workers with" in log.read_text(), "the router does not listen", [log])
        for role, flags in (("mixed", ("--cluster-key-file", str(other))), ("decode", ("--insecure",))):
            with worker(cable, tmp_path, join, True, role, *flags) as child:
                assert child.wait(START_S) == 1
            said = (tmp_path / f"{role}.log").read_text()
            assert f"the router at {join} did not" in said and "--cluster-key-file" in said
        assert not ready.exists()
        assert f"did not let {cable.far.address}:" in " ".join(log.read_text().split())
