"""Starting, stopping, dying: what a person at the terminal sees, and what a request under way gets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster import Cluster, patient, run_cli, run_clis, serve
from support.oracle import Reference

MOCK = ["--engine", "mock"]


def slow_mock(folder: Path) -> list[str]:
    """A mock engine whose steps take 20 ms, so that requests last."""
    path = folder / "cost.json"
    path.write_text('{"step_s": 0.02}')
    return [*MOCK, "--cost-model", str(path)]


REFUSED = [
    (["--kv-memory", "10KiB"], "kv-memory"),
    (["--ready-file", "/nowhere/ready"], "--ready-file /nowhere/ready cannot be written"),
    (["--chunk-tokenz", "3"], "Did you mean --chunk-tokens"),
]
"""Of each kind one; tests/unit/test_doctor_refuses.py has more."""


def test_settings_that_cannot_work_are_refused_at_start() -> None:
    runs = run_clis(*(["serve", "smollm2", "--port", "0", *flags] for flags, _ in REFUSED))
    for (flags, said), result in zip(REFUSED, runs, strict=True):
        assert result.returncode == 2, (flags, result.stderr)
        assert said in " ".join((result.stdout + result.stderr).split()), flags


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_cli("serve", "smollm2", "--port", str(port), *MOCK)
    assert result.returncode == 2 and f"port {port}" in result.stderr and "--port" in result.stderr


def test_model_files_that_cannot_be_served_are_named(tmp_path: Path, smollm2: Path) -> None:
    missing = run_cli("serve", str(tmp_path / "nothing.gguf"), "--port", "0")
    assert missing.returncode == 2 and "nothing.gguf" in missing.stderr
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(smollm2.read_bytes()[: 40 << 20])
    cut = run_cli("serve", str(truncated), "--port", "0")
    assert cut.returncode == 2 and "truncated.gguf" in cut.stderr
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    (strange / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    refused = run_cli("serve", str(strange), "--port", "0")
    assert refused.returncode == 2
    assert "MambaForCausalLM" in refused.stderr and "LlamaForCausalLM" in refused.stderr


def test_an_unknown_key_in_the_config_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text("prefil = 1\n")
    result = run_cli("serve", "--config", str(path))
    assert result.returncode == 2 and "did you mean prefill" in result.stderr


def test_a_worker_with_another_model_is_refused_naming_both(smollm2: Path) -> None:
    with serve("smollm2", *MOCK, "--policy", "replicated", "--mixed", "1") as cluster:
        join = cluster.worker_socket()
        other = ["worker", "smollm2", "--join", join, "--id", "other", "--device", "cpu:1", *MOCK]
        result = run_cli(*other, "--max-model-len", "4096")
        assert result.returncode == 1
        assert "worker other (smollm2)" in result.stderr
        assert "context length 4096 instead of 8192; start all workers with the same --max-model-len" in result.stderr
        assert [worker["id"] for worker in cluster.state()["workers"]] == ["mixed-0"]


def test_a_router_and_workers_started_apart_serve_a_split_request(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        bind = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    ready = tmp_path / "ready"
    base = [sys.executable, "-m", "bascule"]
    router = ["router", "smollm2", "--bind", bind, "--port", "0", "--ready-file", str(ready), *patient(())]
    processes = [subprocess.Popen([*base, *router])]
    try:
        for role in ("prefill", "decode"):
            command = [*base, "worker", "smollm2", "--join", bind, "--id", role, "--role", role, *MOCK]
            processes.append(subprocess.Popen(command))
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.05)
        cluster = Cluster(processes[0], json.loads(ready.read_text()), ready)  # type: ignore[arg-type]
        cluster.wait(lambda state: len(state["workers"]) == 2, "both workers joined", 60)
        answer = cluster.complete(list(range(100, 150)), max_tokens=5)
        assert answer["route"] == "remote;prefill=prefill;decode=decode"
        assert len(answer["choices"][0]["token_ids"]) == 5
        cluster.wait_idle()
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait(30) for process in processes]
    assert codes == [0, 0, 0]


@pytest.fixture(scope="module")
def exact() -> Iterator[Cluster]:
    with serve("smollm2", "--dtype", "float32") as cluster:
        yield cluster


@pytest.mark.parametrize(("victim", "prompt"), [("prefill-0", 8), ("decode-0", 9)])
def test_a_killed_worker_costs_no_request_and_is_started_again(
    victim: str, prompt: int, exact: Cluster, references: list[Reference]
) -> None:
    """The two victims share a server, and have a prompt each that it has not seen before."""
    one = references[prompt]
    answers: list[list[int]] = []
    seen = len(exact.log.read_text())

    def complete() -> None:
        answer = exact.complete(one.prompt, max_tokens=len(one.output), ignore_eos=True)
        answers.append(answer["choices"][0]["token_ids"])

    threads = [threading.Thread(target=complete) for _ in range(3)]
    for thread in threads:
        thread.start()
    exact.wait(lambda state: any(worker["running"] for worker in state["workers"]), "work has begun")
    pid = exact.pid(victim)
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(100)
    assert len(answers) == 3
    for answer in answers:
        one.check(answer, f"{victim} killed")
    exact.wait(lambda state: any(w["id"] == victim and w["pid"] != pid for w in state["workers"]), "a new one", 60)
    exact.wait_idle()
    said = exact.log.read_text()[seen:]
    assert f"worker {victim}" in said and "SIGKILL" in said
    one.check(
        exact.complete(one.prompt, max_tokens=len(one.output), ignore_eos=True)["choices"][0]["token_ids"], "after"
    )


def test_a_request_whose_decode_worker_is_killed_goes_on_from_the_kv_that_its_prefill_worker_kept(
    tmp_path: Path,
) -> None:
    """With nothing else to do the two prefill workers would take turns, so the second attempt would go to the other."""
    prompt = list(range(1000, 1320))
    answers: list[dict[str, Any]] = []
    with serve("smollm2", "--prefill", "2", "--decode", "2", *slow_mock(tmp_path)) as cluster:
        asking = threading.Thread(
            target=lambda: answers.append(cluster.complete(prompt, max_tokens=100, ignore_eos=True))
        )
        asking.start()
        state = cluster.wait(
            lambda state: any(worker["running"] for worker in state["workers"] if worker["role"] == "decode"),
            "it decodes",
        )
        [home] = [worker for worker in state["workers"] if worker["role"] == "decode" and worker["running"]]
        os.kill(home["pid"], signal.SIGKILL)
        asking.join(60)
        [answer] = answers
        known_as = str(answer["id"]).removeprefix("cmpl-")
        told = cluster.http.get(f"{cluster.ready['admin_url']}/admin/decisions/{known_as}").json()
        first, again = (attempt["candidates"][0] for attempt in told["attempts"])
        assert first["decode"] == home["id"] != again["decode"]
        assert again["prefill"] == first["prefill"] and first["cached_tokens"] == 0
        assert again["cached_tokens"] >= len(prompt) - 16
        undisturbed = cluster.complete(prompt, max_tokens=100, ignore_eos=True)
        assert answer["choices"][0]["token_ids"] == undisturbed["choices"][0]["token_ids"]
        cluster.wait_idle()


def test_sigterm_lets_requests_end_and_leaves_no_process(tmp_path: Path) -> None:
    with serve("smollm2", *slow_mock(tmp_path)) as cluster:
        pids = [worker["pid"] for worker in cluster.state()["workers"]]
        answers: list[int] = []

        def complete() -> None:
            answers.append(len(cluster.complete([1, 2, 3], max_tokens=300)["choices"][0]["token_ids"]))

        thread = threading.Thread(target=complete)
        thread.start()
        cluster.wait(lambda state: state["active"] == 1, "the request is under way")
        assert cluster.stop() == 0
        thread.join(10)
        assert answers == [300]
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert not cluster.log.with_name("ready").exists()


def test_a_second_sigterm_stops_at_once_and_tells_the_client(tmp_path: Path) -> None:
    with serve("smollm2", *slow_mock(tmp_path)) as cluster:
        statuses: list[int] = []
        body = {"model": cluster.model, "prompt": [1, 2, 3], "max_tokens": 4000}

        def complete() -> None:
            statuses.append(cluster.http.post(f"{cluster.url}/v1/completions", json=body).status_code)

        thread = threading.Thread(target=complete)
        thread.start()
        cluster.wait(lambda state: state["active"] == 1, "the request is under way")
        cluster.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while "finishing 1 requests; once more to stop at once" not in cluster.log.read_text():
            assert time.monotonic() < deadline, "the first SIGTERM was not heard"
            time.sleep(0.05)
        time.sleep(0.3)
        assert cluster.process.poll() is None, "the first SIGTERM drains"
        assert cluster.stop() == 0
        thread.join(10)
        assert statuses == [503]


def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code -9"), serve("smollm2", *MOCK) as cluster:
        pids = [worker["pid"] for worker in cluster.state()["workers"]]
        cluster.process.kill()
        deadline = time.monotonic() + 60
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() < deadline, "a worker outlived its launcher"
            time.sleep(0.05)


def test_two_workers_share_one_core_and_xpyd_pools_of_any_size_serve(tmp_path: Path) -> None:
    flags = ["--prefill", "2", "--decode", "3", "--devices", "cpu:0,cpu:0,cpu:0,cpu:0,cpu:0", *MOCK]
    flags += ["--suspect-after", "60", "--dead-after", "120"]
    with serve("smollm2", *flags) as cluster:
        routes = {cluster.complete([index, 5, 6], max_tokens=3)["route"] for index in range(12)}
        assert len(routes) > 3 and all(route.startswith("remote;") for route in routes)
        cluster.wait_idle()


def test_doctor_finds_nothing_wrong_here_and_says_what_it_looked_at() -> None:
    result = run_cli("doctor", "smollm2", "--kv-memory", "64MiB")
    assert result.returncode == 0, result.stdout
    assert "LlamaForCausalLM" in result.stdout and "usable cores" in result.stdout
    short = run_cli("doctor", "smollm2", "--kv-memory", "900GiB")
    assert short.returncode == 1 and "--kv-memory" in short.stdout


def _alive(pid: int) -> bool:
    """A process that runs (a zombie whose parent is gone does not count)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
