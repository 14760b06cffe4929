"""Prefixes outlive eviction, workers and servers: whatever tier they come from, the tokens are the reference's."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from psutil import Process
from redis import Redis

from support.cluster import Cluster, run_cli, serve
from support.oracle import Reference
from support.redis_server import RedisProcess, redis_process, wait_until

OUTPUT = 6
SECRET = "open-sesame"
FLAGS = ["--policy", "adaptive", "--mixed", "2", "--dtype", "float32", "--kv-memory", "72MiB"]


class Load(Counter[str]):
    """Prompt tokens that came from each tier."""


def metrics(cluster: Cluster) -> dict[tuple[str, str, str], float]:
    """Metrics by name, tier, and reason or way, where they have them."""
    families = text_string_to_metric_families(cluster.http.get(f"{cluster.url}/metrics").text)
    return {
        (sample.name, labels.get("tier", ""), labels.get("reason") or labels.get("way") or ""): sample.value
        for family in families
        for sample in family.samples
        for labels in [sample.labels]
    }


def ask_all(cluster: Cluster, asked: list[Reference]) -> Load:
    """Every prompt, four at a time; each must be answered, and with the reference's tokens."""

    def ask(one: Reference) -> dict[str, int]:
        answer = cluster.complete(one.prompt, max_tokens=OUTPUT, ignore_eos=True)
        one.check(answer["choices"][0]["token_ids"], "with a KV store", OUTPUT)
        loaded: dict[str, int] = answer["usage"]["prompt_tokens_details"].get("loaded_tokens", {})
        return loaded

    with ThreadPoolExecutor(4) as pool:
        return sum((Load(loaded) for loaded in pool.map(ask, asked)), Load())


def wait_saved(cluster: Cluster) -> None:
    """Until no tier gets more."""
    before, since = {}, time.monotonic()
    while time.monotonic() - since < 2.0:
        now = {key: value for key, value in metrics(cluster).items() if key[2] == "saved"}
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.2)


def kill_workers(cluster: Cluster) -> None:
    """SIGKILL to both, and wait for those that are started in their place."""
    pids = {worker["id"]: worker["pid"] for worker in cluster.state()["workers"]}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    cluster.wait(
        lambda state: len(state["workers"]) == len(pids) and all(w["pid"] != pids[w["id"]] for w in state["workers"]),
        "new workers",
        90,
    )


@pytest.fixture
def asked(references: list[Reference]) -> Iterator[list[Reference]]:
    """About 4,500 tokens: the two workers' device memory holds less than 3,300 of them."""
    yield [one for one in references if 100 <= len(one.prompt) <= 1100]


def clear(flag: str, *place: str) -> None:
    done = run_cli("kv", "clear", flag, *place, "--yes")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def quick_disk() -> Iterator[Path]:
    """In memory: to a disk that is slow for a moment, a worker writes nothing, and not all would be found there."""
    with tempfile.TemporaryDirectory(prefix="bascule-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.timeout(400)
def test_exact_from_every_tier_after_eviction_kill_and_damage(asked: list[Reference], quick_disk: Path) -> None:
    # A tier that is slow for a moment costs one long prompt its load, which is then computed, as it should be.
    most = sum(len(one.prompt) for one in asked) - max(len(one.prompt) for one in asked) - 500
    with redis_process() as redis, serve("smollm2", *FLAGS, *store_flags(quick_disk, redis)) as cluster:
        clear("--host")
        ask_all(cluster, asked)
        wait_saved(cluster)
        assert ask_all(cluster, asked)["host"] > 1000, "evicted blocks come from the host"

        kill_workers(cluster)
        clear("--host")
        loaded = ask_all(cluster, asked)
        assert loaded["disk"] > most
        wait_saved(cluster)

        kill_workers(cluster)
        clear("--host")
        for file in quick_disk.glob("v1/??/*"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        loaded = ask_all(cluster, asked)
        assert loaded["remote"] > most
        assert loaded["disk"] == 0
        assert metrics(cluster)["bascule_kv_store_invalid_total", "disk", "checksum"] > 100
        cluster.wait_idle()
    assert not any((Path("/dev/shm") / f"bascule-{os.getuid()}" / "v1").glob("??/*")), "memory is given back"


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a mock engine that has room for 2,048 tokens and computes 5,000 a second."""
    cost = tmp_path_factory.mktemp("cost") / "cost.json"
    cost.write_text('{"token_s": 2e-4}')
    return ["--engine", "mock", "--kv-memory", "64KiB", "--cost-model", str(cost)]


@pytest.fixture(scope="module")
def mocked() -> Iterator[dict[tuple[int, ...], list[int]]]:
    """Prompts and what the mock engine, whose tokens depend on every byte of KV, says to them without a store."""
    draw = Random(1)
    prompts = [tuple(draw.randrange(100, 40_000) for _ in range(length)) for length in range(100, 1000, 90)]
    with serve("smollm2", "--engine", "mock", "--policy", "single") as cluster:
        yield {prompt: tokens_of(cluster.complete(list(prompt), max_tokens=OUTPUT)) for prompt in prompts}


def tokens_of(answer: dict[str, Any]) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def faults(cluster: Cluster) -> set[str]:
    return {key[2] for key in metrics(cluster) if key[0] == "bascule_kv_store_faults_total"}


def check_mocked(cluster: Cluster, mocked: dict[tuple[int, ...], list[int]]) -> None:
    def ask(prompt: tuple[int, ...]) -> list[int]:
        return tokens_of(cluster.complete(list(prompt), max_tokens=OUTPUT))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, mocked)) == list(mocked.values())


@pytest.mark.timeout(200)
def test_a_server_that_hangs_dies_or_lies_costs_no_answer(
    mock: list[str], mocked: dict[tuple[int, ...], list[int]]
) -> None:
    with redis_process("--requirepass", SECRET) as redis:
        url = redis.url.replace("//", f"//:{SECRET}@")
        with serve("smollm2", *mock, "--policy", "single", "--kv-remote", url) as cluster:
            for worker in cluster.state()["workers"]:
                assert SECRET not in " ".join(Process(worker["pid"]).cmdline())
            check_mocked(cluster, mocked)
            wait_saved(cluster)
            client = Redis(port=redis.port, password=SECRET)
            names = client.keys("bascule:*")
            assert len(names) > 200
            for name, other in zip(names, [*names[1:], names[0]], strict=True):
                client.copy(name, other, replace=True)
            check_mocked(cluster, mocked)
            wait_until(lambda: any("store_invalid" in key[0] for key in metrics(cluster)), "the lies to be counted")
            redis.pause()
            try:
                check_mocked(cluster, mocked)
            finally:
                redis.resume()
            redis.stop()
            check_mocked(cluster, mocked)
            cluster.wait_idle()
            wait_until(lambda: {"slow", "skipped"} <= faults(cluster), "the faults to be counted")
            assert SECRET not in cluster.log.read_text()


@pytest.mark.timeout(200)
def test_kv_is_handed_over_by_way_of_the_store(
    mock: list[str], mocked: dict[tuple[int, ...], list[int]], tmp_path: Path
) -> None:
    # Computing takes long enough for prompts to wait for what is loaded, on a busy machine too.
    (tmp_path / "cost.json").write_text('{"token_s": 2e-3}')
    slow = [*mock[:-1], str(tmp_path / "cost.json")]
    flags = [*slow, "--policy", "disaggregated", "--handoff", "store", "--kv-disk", f"{tmp_path / 'kv'}:1GiB"]
    with serve("smollm2", *flags) as cluster:
        check_mocked(cluster, mocked)
        cluster.wait_idle()
        wait_until(lambda: metrics(cluster)["bascule_kv_hit_tokens_total", "disk", ""] > 3000, "the KV to be loaded")
        found = metrics(cluster)
        assert found["bascule_store_handoffs_total", "", ""] == len(mocked)
        assert not any(key[0] == "bascule_handoff_bytes_total" for key in found)


def store_flags(directory: Path, redis: RedisProcess) -> list[str]:
    return ["--kv-host", "512MiB", "--kv-disk", f"{directory}:1GiB", "--kv-remote", redis.url]
