"""Planes that are closed: processes with and without keys, on one host and on two; what a listener hears."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from bascule.bench.namespaces import Cable, Host
from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.protocol import Slice
from bascule.keys import ClusterKey
from bascule.kv.arena import Arena
from bascule.types import CostModel
from support.cluster import run_cli, run_clis, serve
from support.hosts import MOCK, START_S, router, until, worker

PROMPT = [23456] * 64
"""Stands in messages as this number, big-endian behind its type, again and again."""
OUTPUT = 8
SAME_TICKET_SECRET = """
import os, secrets
secrets.token_hex = lambda count: os.urandom(count).hex()
secrets.token_bytes = lambda count: {}[:count]
"""
ON_THE_WIRE = struct.pack("!BH", 0xCD, PROMPT[0]) * 8


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.key"
    assert run_cli("cluster-key", str(path)).returncode == 0
    return path


def test_planes_that_others_could_reach_do_not_open_without_a_key(tmp_path: Path, key: Path) -> None:
    readable, keyed = tmp_path / "readable.key", ("--cluster-key-file", str(key))
    readable.write_bytes(key.read_bytes())
    readable.chmod(0o644)
    worker = ["worker", "smollm2", "--id", "w", *MOCK]
    refused = [
        (["router", "smollm2", "--bind", "tcp://0.0.0.0:*"], "--bind tcp://0.0.0.0:*"),
        ([*worker, "--join", "tcp://127.0.0.1:1", "--host", "0.0.0.0"], "--host 0.0.0.0"),
        ([*worker, "--join", "tcp://192.0.2.1:8100"], "--join tcp://192.0.2.1:8100"),
        (["serve", "smollm2", "--cluster-key-file", str(readable), *MOCK], f"chmod 600 {readable}"),
        (["serve", "smollm2", "--kv-remote", "redis://192.0.2.1", *keyed, *MOCK], "--kv-remote 192.0.2.1:6379/0"),
        ([*worker, "--join", "tcp://127.0.0.1:1", "--kv-remote", "redis://192.0.2.1", *keyed], "give a rediss:// URL"),
        (["router", "smollm2", "--attach", "http://192.0.2.1:8000", *keyed], "--attach http://192.0.2.1:8000 is sent"),
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
    api, admin, ticket = "an-api-key-of-ours", "an-admin-key-of-ours", "a-ticket's-bytes"
    (tmp_path / "sitecustomize.py").write_text(SAME_TICKET_SECRET.format(ticket.encode()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    config = tmp_path / "bascule.toml"
    config.write_text(f'api-key = "{api}"\nadmin-key = "{admin}"\n')
    config.chmod(0o600)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    flags = ["--config", str(config), "--cluster-key-file", str(key), "--log-level=debug", "--transfer=tcp", *MOCK]
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
    whole = key.read_text().split()[1]
    derived = ClusterKey.of(bytes.fromhex(whole))
    of_cluster = [bytes.fromhex(whole), derived.server_secret, derived.client_secret, derived.transfers]
    for each in (api.encode(), admin.encode(), ticket.encode(), *of_cluster):
        assert not any(form in told for form in (repr(each)[2:-1], each.hex())), each


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
        while True:
            try:
                self._heard.append(self._socket.recv(1 << 17))
            except TimeoutError:
                if self._stopping.is_set():  # and all is read that came before
                    return

    def stop(self) -> bytes:
        self._stopping.set()
        self.join(60)
        self._socket.close()
        return b"".join(self._heard)


def kv_of_prompt() -> bytes:
    """What the mock computes for the first block, as it lies in an arena: the keys of one layer."""
    card = mock_card()
    blocks = list(range(-(-len(PROMPT) // card.layout.block_size)))
    with Arena.create(card.layout, len(blocks)) as arena:
        runner = MockRunner(card, CostModel(), lambda _: None)
        runner.bind(arena)
        runner.execute([Slice(PROMPT, 0, blocks, None, PROMPT, len(PROMPT))])
        return arena.bytes[0, 0].tobytes()


def heard(cable: Cable, folder: Path, *flags: str) -> tuple[bytes, list[int]]:
    """All that crosses the cable while a prompt is prefilled on the far host and decoded on the near one; output."""
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
            body = {"model": content["model"], "prompt": PROMPT, "max_tokens": OUTPUT, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            answer = client.post(f"{content['url']}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Bascule-Route"] == "remote;prefill=prefill;decode=decode"
        return sniffer.stop(), answer.json()["choices"][0]["token_ids"]


def test_a_listener_on_the_cable_reads_prompts_and_kv_without_a_key_and_none_with_it(
    cable: Cable, tmp_path: Path, key: Path
) -> None:
    folders = [tmp_path / name for name in ("open", "closed")]
    for folder in folders:
        folder.mkdir()
    in_clear, tokens = heard(cable, folders[0], "--insecure")
    kv = kv_of_prompt()
    assert len(kv) == 128 and ON_THE_WIRE in in_clear and b"prefill" in in_clear and kv in in_clear
    assert "neither authenticated nor encrypted" in " ".join((folders[0] / "prefill.log").read_text().split())
    encrypted, same_tokens = heard(cable, folders[1], "--cluster-key-file", str(key))
    assert len(encrypted) > 4000 and len(tokens) == OUTPUT and same_tokens == tokens
    assert not any(kv[place : place + 8] in encrypted for place in range(0, len(kv), 8)), "nor the KV of any token"
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
