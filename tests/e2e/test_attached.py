"""A running server behind another router: the same answers, beside workers of our own, and when it dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster import Cluster, run_cli, run_clis, serve

MOCK = ("--engine", "mock", "--kv-memory", "16MiB")
LONG = 300


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A mock whose steps take 10 ms, so that requests last."""
    cost = Path(tmp_path_factory.mktemp("cost"), "cost.json")
    cost.write_text('{"step_s": 0.01}')
    return (*MOCK, "--cost-model", str(cost))


@pytest.fixture(scope="module")
def direct() -> Iterator[Cluster]:
    with serve("smollm2", *MOCK, "--policy", "single", "--model-name", "org/its-own-name") as cluster:
        yield cluster


def test_a_router_in_front_of_a_running_server_answers_as_that_does(direct: Cluster, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "bascule", "router", "smollm2", "--attach", f"{direct.url}/v1", "--port", "0"]
    command += ["--bind", "tcp://127.0.0.1:*", "--ready-file", str(ready)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        through = Cluster(process, json.loads(ready.read_text()), ready)
        assert [worker["id"] for worker in through.ready["workers"]] == ["attached-0"]
        prompts: list[str | list[int]] = ["The capital of France is", [7, 8, 9], "naïve café 東京"]
        for fields in (
            {"max_tokens": 40},
            {"max_tokens": 9, "temperature": 1, "seed": 3},
            {"max_tokens": 4, "logprobs": 2},
        ):
            for prompt in prompts:
                answer, expected = through.complete(prompt, **fields), direct.complete(prompt, **fields)
                assert answer["choices"] == expected["choices"] and answer["route"] == "local;decode=attached-0"
        models = through.http.get(f"{through.url}/v1/models").json()["data"]
        assert [(entry["id"], entry["max_model_len"]) for entry in models] == [("smollm2", 8192)]
        through.wait_idle()
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_workers_and_an_attached_server_share_the_work_and_agree(direct: Cluster) -> None:
    flags = [*MOCK, "--policy", "replicated", "--mixed", "1", "--balance", "round-robin", "--attach", direct.url]
    with serve("smollm2", *flags) as both:
        answers = [both.complete([4, 5, 6], max_tokens=20) for _ in range(6)]
        assert {answer["route"] for answer in answers} == {"local;decode=mixed-0", "local;decode=attached-0"}
        assert len({tuple(answer["choices"][0]["token_ids"]) for answer in answers}) == 1
        both.wait_idle()


def test_a_split_cluster_never_hands_kv_to_an_attached_server(direct: Cluster) -> None:
    with serve("smollm2", *MOCK, "--prefill", "1", "--decode", "1", "--attach", direct.url) as both:
        routes = {both.complete([index, 5, 6], max_tokens=3)["route"] for index in range(8)}
        assert routes == {"remote;prefill=prefill-0;decode=decode-0"}
        pids = {both.pid(worker) for worker in ("prefill-0", "decode-0")}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        both.wait(lambda state: not pids & {worker["pid"] for worker in state["workers"]}, "the workers are gone")
        assert len(both.complete([1, 5, 6], max_tokens=3)["choices"][0]["token_ids"]) == 3


def test_a_killed_server_costs_no_greedy_request_and_a_sampled_one_says_why_it_ended(slow: tuple[str, ...]) -> None:
    died = pytest.raises(AssertionError, match=f"exit code -{signal.SIGKILL.value}")
    with died, serve("smollm2", *slow, "--policy", "single") as server:
        flags = [*slow, "--policy", "replicated", "--mixed", "1", "--balance", "round-robin", "--attach", server.url]
        flags += ["--suspect-after=3", "--dead-after=10"]
        with serve("smollm2", *flags) as both:
            expected = both.complete([1, 2, 3], max_tokens=LONG)["choices"][0]["token_ids"]
            greedy: list[list[int]] = []
            sampled: list[str] = []
            threads = [threading.Thread(target=_complete, args=(both, greedy)) for _ in range(4)]
            threads += [threading.Thread(target=_stream, args=(both, sampled)) for _ in range(4)]
            for thread in threads:
                thread.start()
            both.wait(lambda state: all(worker["running"] > 1 for worker in state["workers"]), "both work")
            server.process.kill()
            for thread in threads:
                thread.join(60)
            assert greedy == [expected] * 4
            ended = [text for text in sampled if not text.endswith("data: [DONE]")]
            assert 0 < len(ended) < 4 and all("send the request again" in text for text in ended)
            both.wait(lambda state: len(state["workers"]) == 1, "the server counts as dead", 30)
            assert both.complete([1, 2, 3], max_tokens=LONG)["choices"][0]["token_ids"] == expected
            both.wait_idle()


def _complete(cluster: Cluster, answers: list[list[int]]) -> None:
    answers.append(cluster.complete([1, 2, 3], max_tokens=LONG)["choices"][0]["token_ids"])


def _stream(cluster: Cluster, texts: list[str]) -> None:
    body: dict[str, Any] = {
        "model": cluster.model,
        "prompt": [9, 9],
        "max_tokens": LONG,
        "stream": True,
        "temperature": 1,
    }
    texts.append(cluster.http.post(f"{cluster.url}/v1/completions", json=body).text.strip())


REFUSED = [
    (["--attach", "gpu1:8000"], "attach is 'gpu1:8000'"),
    (["--attach", "http://u:p@gpu1:8000"], "a bare URL"),
    (["--attach", "http://a:1,http://a:1/v1"], "without repeats"),
    (["--attach", "http://127.0.0.1:1", "--attach-sequences", "0"], "attach-sequences is 0"),
    (["--attach", "http://127.0.0.1:1", "--mixed", "0", "--start-timeout", "1"], "waiting for http://127.0.0.1:1"),
]


def test_servers_that_cannot_be_attached_are_named_at_start() -> None:
    runs = run_clis(*(["serve", "smollm2", "--port", "0", *MOCK, *flags] for flags, _ in REFUSED))
    for (flags, said), result in zip(REFUSED, runs, strict=True):
        assert result.returncode == 2, (flags, result.stderr)
        assert said in " ".join((result.stdout + result.stderr).split()), flags


def test_a_server_that_is_something_else_ends_the_start_with_its_reason(direct: Cluster) -> None:
    admin = str(direct.ready["admin_url"])
    result = run_cli("router", "smollm2", "--port", "0", "--bind", "tcp://127.0.0.1:*", "--attach", admin)
    assert result.returncode == 2 and "no OpenAI-compatible server" in result.stderr
