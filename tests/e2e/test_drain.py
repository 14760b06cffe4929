"""Workers drained, restarted and used otherwise while requests run: none fails, and each has exactly its tokens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.cluster import Cluster, run_cli, serve

PATIENT = ["--suspect-after", "60", "--dead-after", "120"]
TOKENS = 80


def slow_mock(folder: Path) -> list[str]:
    """A mock engine whose steps take 20 ms; its tokens are digests of the KV that it finds."""
    path = folder / "cost.json"
    path.write_text('{"step_s": 0.02}')
    return ["--engine", "mock", "--cost-model", str(path), "--kv-memory", "64MiB"]


def bodies(model: str) -> list[dict[str, Any]]:
    """Greedy and sampled requests, which share beginnings, each with one right output."""
    common = {"model": model, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, "stream": True}
    prompts = [[*range(100, 148 + 16 * index), index] for index in range(3)]
    drawn = [{"temperature": 0}, {"temperature": 1, "seed": 7}]
    return [{**common, "prompt": prompt, **how} for prompt in prompts for how in drawn]


def stream(url: str, body: dict[str, Any]) -> list[int]:
    """The tokens of one streamed completion; raises for any status but 200, and for an error event."""
    tokens: list[int] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=90) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
    return tokens


class Load:
    """Streams one after another from as many clients as there are bodies, until it is stopped."""

    def __init__(self, cluster: Cluster) -> None:
        self._url = cluster.url
        self._bodies = bodies(cluster.model)
        with ThreadPoolExecutor(len(self._bodies)) as pool:
            self._right = list(pool.map(lambda body: stream(self._url, body), self._bodies))
        self._over = threading.Event()
        self.done = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(len(self._bodies))]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(100)

    def _run(self, index: int) -> None:
        while not self._over.is_set():
            try:
                tokens = stream(self._url, self._bodies[index])
            except Exception as error:
                self.wrong.append(f"request {index}: {error!r}")
                return
            if tokens != self._right[index]:
                self.wrong.append(f"request {index} got {tokens}, not {self._right[index]}")
            self.done += 1

    def check(self) -> None:
        """Nothing failed, and every output was the right one, whole."""
        assert not self.wrong, self.wrong
        assert self.done >= len(self._bodies) and all(len(right) == TOKENS for right in self._right)


def restart(cluster: Cluster, worker: str) -> None:
    """SIGTERM to a worker that has something to do; returns when another is in its place."""
    cluster.wait(lambda state: one(state, worker)["requests"] > 0, f"{worker} has work")
    pid = cluster.pid(worker)
    os.kill(pid, signal.SIGTERM)
    cluster.wait(lambda state: any(w["id"] == worker and w["pid"] != pid for w in state["workers"]), "it is back", 90)


def one(state: dict[str, Any], worker: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in state["workers"] if each["id"] == worker)
    return found


def admin(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    return run_cli("admin", *words, "--admin", cluster.ready["admin_url"])


def test_a_rolling_restart_of_every_worker_costs_no_request_and_no_token(tmp_path: Path) -> None:
    pools = ["--policy", "disaggregated", "--prefill", "1", "--decode", "2", "--devices", "cpu:0,cpu:1,cpu:1"]
    with serve("smollm2", *pools, *slow_mock(tmp_path), *PATIENT) as cluster:
        with Load(cluster) as load:
            for worker in ("prefill-0", "decode-0", "decode-1"):
                restart(cluster, worker)
        load.check()
        cluster.wait_idle()
        said = cluster.log.read_text()
        assert said.count("has ended as it was asked to") == 3
        assert "is placed again" not in said, "a worker ended before what it had"


@pytest.mark.full
def test_the_only_worker_is_restarted_while_requests_wait_for_it(tmp_path: Path) -> None:
    with serve("smollm2", "--policy", "single", *slow_mock(tmp_path), *PATIENT) as cluster:
        with Load(cluster) as load:
            restart(cluster, "mixed-0")
        load.check()
        assert "is placed again" not in cluster.log.read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pools = ["--policy", "disaggregated", "--prefill", "1", "--decode", "2", "--devices", "cpu:0,cpu:1,cpu:1"]
    with serve("smollm2", *pools, *slow_mock(tmp_path_factory.mktemp("mock")), *PATIENT) as cluster:
        yield cluster


def test_a_drained_worker_gets_nothing_until_it_is_resumed(cluster: Cluster) -> None:
    with Load(cluster) as load:
        cluster.wait(lambda state: one(state, "decode-0")["requests"] > 0, "decode-0 has work")
        drained = admin(cluster, "drain", "decode-0", "--wait")
        assert drained.returncode == 0, drained.stderr
        assert drained.stdout.splitlines()[-1] == "decode-0 (decode) is drained"
        for _ in range(20):
            worker = one(cluster.state(), "decode-0")
            assert (worker["state"], worker["requests"]) == ("drained", 0)
            time.sleep(0.05)
        assert admin(cluster, "resume", "decode-0").stdout == "decode-0 (decode) is ready\n"
        cluster.wait(lambda state: one(state, "decode-0")["requests"] > 0, "decode-0 has work again")
    load.check()
    cluster.wait_idle()


def test_what_is_left_at_the_end_of_the_time_goes_on_elsewhere_exactly(cluster: Cluster) -> None:
    with Load(cluster) as load:
        for _ in range(4):  # more often than a request may be failed by workers
            cluster.wait(lambda state: one(state, "decode-1")["requests"] > 0, "decode-1 has work")
            drained = admin(cluster, "drain", "decode-1", "--wait", "--timeout", "0")
            assert drained.returncode == 0 and "decode-1 (decode) is drained" in drained.stdout
            assert admin(cluster, "resume", "decode-1").returncode == 0
    load.check()
    assert "its time is over" in cluster.log.read_text()
    cluster.wait_idle()


def test_a_worker_changes_its_role_under_load_and_keeps_it_when_it_is_killed(cluster: Cluster) -> None:
    with Load(cluster) as load:
        assert admin(cluster, "role", "decode-0", "prefill").stdout == "decode-0 (prefill) is ready\n"
        refused = admin(cluster, "role", "decode-1", "prefill")
        assert refused.returncode == 1 and "policy disaggregated needs a decode worker" in refused.stderr
        asked = {**bodies(cluster.model)[0], "stream": False, "max_tokens": 2}
        routes = {
            httpx.post(f"{cluster.url}/v1/completions", json=asked, timeout=60).headers["X-Bascule-Route"]
            for _ in range(12)
        }
        assert routes == {f"remote;prefill={prefill};decode=decode-1" for prefill in ("prefill-0", "decode-0")}
        pid = cluster.pid("decode-0")
        os.kill(pid, signal.SIGKILL)
        back = cluster.wait(
            lambda state: any(w["id"] == "decode-0" and w["pid"] != pid for w in state["workers"]), "it is back", 90
        )
        assert one(back, "decode-0")["role"] == "prefill"
        assert admin(cluster, "role", "decode-0", "decode").returncode == 0
    load.check()
    listed = admin(cluster, "workers")
    assert listed.returncode == 0 and "decode-0" in listed.stdout and "ready" in listed.stdout
    cluster.wait_idle()


def test_with_all_workers_drained_requests_wait_and_ready_says_so(cluster: Cluster) -> None:
    workers = ("prefill-0", "decode-0", "decode-1")
    for worker in workers:
        assert admin(cluster, "drain", worker, "--wait").returncode == 0
    ready = cluster.http.get(f"{cluster.url}/ready")
    assert ready.status_code == 503 and ready.json()["error"]["code"] == "draining"
    metrics = cluster.http.get(f"{cluster.url}/metrics").text
    assert 'bascule_workers{state="drained"} 3.0' in metrics
    answers: list[list[int]] = []
    waiting = threading.Thread(target=lambda: answers.append(stream(cluster.url, bodies(cluster.model)[0])))
    waiting.start()
    cluster.wait(lambda state: state["queued"] == 1, "the request waits")
    assert admin(cluster, "resume", "decode-0").returncode == 0
    waiting.join(60)
    assert [len(answer) for answer in answers] == [TOKENS]
    for worker in workers:
        assert admin(cluster, "resume", worker).returncode == 0
    assert cluster.http.get(f"{cluster.url}/ready").status_code == 200


def test_a_second_signal_ends_a_worker_at_once_and_its_requests_go_elsewhere(cluster: Cluster) -> None:
    body = {**bodies(cluster.model)[1], "max_tokens": 400}
    seen = len(cluster.log.read_text())
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream, cluster.url, body) for _ in range(2)]
        cluster.wait(
            lambda state: all(one(state, name)["requests"] for name in ("decode-0", "decode-1")), "one on each"
        )
        pid = cluster.pid("decode-0")
        os.kill(pid, signal.SIGTERM)
        cluster.wait(lambda state: one(state, "decode-0")["state"] == "draining", "it drains")
        os.kill(pid, signal.SIGTERM)
        moved, stayed = (future.result(60) for future in streams)
    assert moved == stayed and len(moved) == 400
    assert cluster.log.read_text()[seen:].count("is placed again") == 1
    cluster.wait(lambda state: len(state["workers"]) == 3, "it is back", 60)
    cluster.wait_idle()


def test_a_worker_whose_router_is_gone_ends_without_its_leave(tmp_path: Path) -> None:
    with serve("smollm2", "--policy", "single", *slow_mock(tmp_path)) as cluster:
        command = [sys.executable, "-m", "bascule", "worker", "smollm2", "--join", cluster.worker_socket()]
        worker = subprocess.Popen([*command, "--id", "apart", *slow_mock(tmp_path)])
        try:
            cluster.wait(lambda state: len(state["workers"]) == 2, "it has joined", 60)
            assert cluster.stop() == 0
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(30) == 0
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
