"""A prefill worker that is stopped in the middle of a push and wakes up later changes nobody's tokens."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from support.cluster import Cluster, serve
from support.oracle import Reference, long_text

PROMPT_TOKENS, OUTPUT = 700, 24
TRIES = 5


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transfer", ["shm", "tcp"])
def test_a_late_write_changes_no_other_requests_tokens(transfer: str, references: list[Reference]) -> None:
    from bascule.models import load

    text = load("smollm2").tokenizer.encode(long_text())
    others = [one for one in references if 60 <= len(one.prompt) <= 340]
    flags = ["--prefill", "2", "--decode", "1", "--devices", "cpu:0,cpu:0,cpu:1", "--transfer", transfer]
    flags += ["--dtype", "float32", "--chunk-tokens", "32", "--kv-memory", "64MiB", "--no-prefix-cache"]
    with serve("smollm2", *flags, "--dead-after", "60", "--suspect-after", "1") as cluster:
        for attempt in range(TRIES):
            victim = [token + 1 + attempt for token in text[500 : 500 + PROMPT_TOKENS]]
            if (stopped := _stopped(cluster, victim, transfer)) is not None:
                break
            cluster.wait_idle(30)
        assert stopped is not None, "no push was stopped in its middle"
        pid = cluster.pid(stopped)
        try:
            if transfer == "tcp":
                cluster.wait(lambda state: _decode(state)["kv_blocks_leased"] == 0, "the granted blocks free again")
            cluster.wait(lambda state: _state_of(state, stopped) == "suspect", "the stopped worker is suspect")
            threads, outputs = [], {}
            for index, one in enumerate(others):
                threads.append(threading.Thread(target=_complete, args=(cluster, one, outputs, index)))
                threads[-1].start()
            cluster.wait(lambda state: _decode(state)["kv_blocks_leased"] > 0, "others use the memory", 60)
            os.kill(pid, signal.SIGCONT)
            for thread in threads:
                thread.join(120)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert sorted(outputs) == list(range(len(others)))
        for index, one in enumerate(others):
            one.check(outputs[index], f"beside a late write over {transfer}", OUTPUT)
        cluster.wait_idle(30)
        assert cluster.pid(stopped) == pid, "the worker came back as it was"


def _stopped(cluster: Cluster, victim: list[int], transfer: str) -> str | None:
    """The prefill worker that is stopped in the middle of its push, whose client has gone away; None, and none is
    stopped, where a busy machine let the push end before."""
    before = _sent(cluster.state())
    with _send(cluster, {"model": cluster.model, "prompt": victim, "max_tokens": 8, "stream": True}):
        state = _soon(cluster, lambda state: _pushing(state, before) is not None)
        if state is None or (name := _pushing(state, before)) is None:
            return None
        pid = cluster.pid(name)
        os.kill(pid, signal.SIGSTOP)
    try:
        if transfer == "tcp" or _soon(cluster, lambda state: _decode(state)["kv_blocks_quarantined"] > 0) is not None:
            return name
    except BaseException:
        os.kill(pid, signal.SIGCONT)
        raise
    os.kill(pid, signal.SIGCONT)
    return None


def _soon(cluster: Cluster, condition: Callable[[dict[str, object]], bool]) -> dict[str, object] | None:
    """The admin state that meets a condition, if one does within a few seconds."""
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        if condition(state := cluster.state()):
            return state
        time.sleep(0.05)
    return None


def _send(cluster: Cluster, body: dict[str, object]) -> socket.socket:
    """Send a request and read nothing; closing the socket is the client going away."""
    address = httpx.URL(cluster.url)
    content = json.dumps(body).encode()
    connection = socket.create_connection((address.host, address.port or 80))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def _complete(cluster: Cluster, one: Reference, outputs: dict[int, list[int]], index: int) -> None:
    answer = cluster.complete(one.prompt, max_tokens=OUTPUT, ignore_eos=True)
    outputs[index] = answer["choices"][0]["token_ids"]


def _sent(state: dict[str, object]) -> dict[str, int]:
    """Bytes that each worker has pushed."""
    return {worker["id"]: sum(worker["handoff_bytes"].values()) for worker in state["workers"]}  # type: ignore[attr-defined]


def _pushing(state: dict[str, object], before: dict[str, int]) -> str | None:
    """The prefill worker that has sent some but not all of its blocks."""
    sent = _sent(state)
    for worker in state["workers"]:  # type: ignore[attr-defined]
        name = str(worker["id"])
        if worker["role"] == "prefill" and sent[name] > before.get(name, 0) and worker["running"]:
            return name
    return None


def _decode(state: dict[str, object]) -> dict[str, int]:
    return next(worker for worker in state["workers"] if worker["role"] == "decode")  # type: ignore[attr-defined, no-any-return]


def _state_of(state: dict[str, object], name: str) -> str:
    return next(str(worker["state"]) for worker in state["workers"] if worker["id"] == name)  # type: ignore[attr-defined]
