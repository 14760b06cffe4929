"""A prefill worker that is stopped in the middle of a push and wakes up later changes nobody's tokens."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading

import httpx
import pytest

from support.cluster import Cluster, serve
from support.oracle import Reference, long_text

PROMPT_TOKENS, OUTPUT = 700, 24


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transfer", ["shm", "tcp"])
def test_a_late_write_changes_no_other_requests_tokens(transfer: str, references: list[Reference]) -> None:
    from bascule.models import load

    text = load("smollm2").tokenizer.encode(long_text())
    victim = [token + 1 for token in text[500 : 500 + PROMPT_TOKENS]]
    others = [one for one in references if 60 <= len(one.prompt) <= 340]
    flags = ["--prefill", "2", "--decode", "1", "--devices", "cpu:0,cpu:0,cpu:1", "--transfer", transfer]
    flags += ["--dtype", "float32", "--chunk-tokens", "32", "--kv-memory", "64MiB", "--no-prefix-cache"]
    with serve("smollm2", *flags, "--dead-after", "60", "--suspect-after", "1") as cluster:
        body = {"model": cluster.model, "prompt": victim, "max_tokens": 8, "stream": True}
        connection = _send(cluster, body)
        state = cluster.wait(lambda state: _pushing(state) is not None, "a push has begun")
        stopped = _pushing(state)
        assert stopped is not None
        pid = cluster.pid(stopped)
        os.kill(pid, signal.SIGSTOP)
        try:
            connection.close()
            if transfer == "shm":
                cluster.wait(
                    lambda state: _decode(state)["kv_blocks_quarantined"] > 0, "the granted blocks in quarantine"
                )
            else:
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


def _pushing(state: dict[str, object]) -> str | None:
    """The prefill worker that has sent some but not all of its blocks."""
    for worker in state["workers"]:  # type: ignore[attr-defined]
        if worker["role"] == "prefill" and sum(worker["handoff_bytes"].values()) > 0 and worker["running"]:
            return str(worker["id"])
    return None


def _decode(state: dict[str, object]) -> dict[str, int]:
    return next(worker for worker in state["workers"] if worker["role"] == "decode")  # type: ignore[attr-defined, no-any-return]


def _state_of(state: dict[str, object], name: str) -> str:
    return next(str(worker["state"]) for worker in state["workers"] if worker["id"] == name)  # type: ignore[attr-defined]
