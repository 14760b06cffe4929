"""A router is killed with streams running, and another one takes its place: workers go on, and nothing is left over."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx

from bascule.bench.apart import started
from support.cluster import Cluster
from support.hosts import HERE, MOCK, START_S, free_port, router_on, until

JOIN = ("--transfer=tcp", "--handoff-timeout=5")


def cluster_of(ready: Path, log: Path) -> Cluster:
    return Cluster(None, json.loads(ready.read_text()), log)  # type: ignore[arg-type]


def test_workers_outlive_a_router_that_is_killed_with_streams_running(tmp_path: Path) -> None:
    (cost := tmp_path / "cost.json").write_text('{"step_s": 0.02}')
    join = f"tcp://127.0.0.1:{free_port()}"
    folders = [tmp_path / "first", tmp_path / "second"]
    logs = [tmp_path / f"{role}.log" for role in ("prefill", "decode")]
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
        workers = [
            stack.enter_context(
                started(
                    HERE,
                    log,
                    *("worker", "smollm2", "--join", join, "--id", log.stem, "--role", log.stem),
                    *(*MOCK, "--cost-model", str(cost), *JOIN),
                )
            )
            for log in logs
        ]
        with router_on(HERE, join, folders[0]) as (ready, log):
            until(ready.exists, "no worker has joined", [log, *logs])
            first = cluster_of(ready, log)
            first.wait(lambda state: len(state["workers"]) == 2, "both workers joined", START_S)
            epochs = {one["id"]: one["epoch"] for one in first.state()["workers"]}
            ended: list[Exception | None] = []
            threads = [threading.Thread(target=stream, args=(first, length, ended)) for length in (40, 300, 3000)]
            for thread in threads:
                thread.start()
            first.wait(lambda state: sum(one["running"] for one in state["workers"]) >= 3, "all streams run")
            os.kill(int(first.ready["pid"]), signal.SIGKILL)
            for thread in threads:
                thread.join(START_S)
            assert len(ended) == 3 and None not in ended, "a client was not told that its stream is broken"
        with router_on(HERE, join, folders[1]) as (ready, log):
            until(ready.exists, "no worker has come back", [log, *logs])
            second = cluster_of(ready, log)
            state = second.wait(lambda state: len(state["workers"]) == 2, "both workers came back", START_S)
            assert {one["id"]: one["epoch"] for one in state["workers"]} == epochs
            answer = second.complete(list(range(100, 150)), max_tokens=5)
            assert answer["route"] == "remote;prefill=prefill;decode=decode"
            assert len(answer["choices"][0]["token_ids"]) == 5
            second.wait_idle()
            assert all(worker.poll() is None for worker in workers)
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            assert [worker.wait(START_S) for worker in workers] == [0, 0]


def stream(cluster: Cluster, length: int, ended: list[Exception | None]) -> None:
    """Ask for more than can come before the end; adds how the stream ended."""
    body = {"model": cluster.model, "prompt": [7] * length, "max_tokens": 3000, "stream": True, "ignore_eos": True}
    failure: Exception | None = None
    try:
        with (
            httpx.Client(timeout=START_S) as client,
            client.stream("POST", f"{cluster.url}/v1/completions", json=body) as answer,
        ):
            answer.read()
    except httpx.HTTPError as error:
        failure = error
    ended.append(failure)
