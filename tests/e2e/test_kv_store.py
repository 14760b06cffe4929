"""Prefixes outlive eviction, workers and servers: whatever tier they come from, the tokens are the reference's."""

from __future__ import annotations

import fcntl
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
TRIES = 3
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


def ask_all(cluster: Cluster, asked: list[Reference], at_once: int = 4) -> Load:
    """Every prompt; each must be answered, and with the reference's tokens."""

    def ask(one: Reference) -> dict[str, int]:
        answer = cluster.complete(one.prompt, max_tokens=OUTPUT, ignore_eos=True)
        one.check(answer["choices"][0]["token_ids"], "with a KV store", OUTPUT)
        loaded: dict[str, int] = answer["usage"]["prompt_tokens_details"].get("loaded_tokens", {})
        return loaded

    with ThreadPoolExecutor(at_once) as pool:
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


def damage(folder: Path, at: int) -> None:
    """Another byte in each try: one that is changed twice is what it was."""
    for file in folder.glob("v1/??/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2 + at] ^= 1
        file.write_bytes(data)


def host_tier_is_given_back() -> bool:
    """Nothing is left in it, unless another server of this machine uses it: then the last one to end clears it."""
    folder = Path("/dev/shm") / f"bascule-{os.getuid()}"
    if not any(folder.glob("v1/??/*")):
        return True
    with open(folder / "users", "rb") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return not any(folder.glob("v1/??/*"))


@pytest.mark.timeout(600)
def test_exact_from_every_tier_after_eviction_kill_and_damage(asked: list[Reference], quick_disk: Path) -> None:
    """A tier that is slow for a moment takes and gives nothing for a while: what it lacks then is saved in one try and
    found in the next. A tier that never gives its blocks fails all tries."""
    # A tier that is slow for a moment costs one long prompt its load, which is then computed, as it should be.
    most = sum(len(one.prompt) for one in asked) - max(len(one.prompt) for one in asked) - 500
    invalid = ("bascule_kv_store_invalid_total", "disk", "checksum")
    with redis_process() as redis, serve("smollm2", *FLAGS, *store_flags(quick_disk, redis)) as cluster:

        def ask_new_workers(damaged_at: int | None = None) -> Load:
            kill_workers(cluster)
            clear("--host")
            if damaged_at is not None:
                damage(quick_disk, damaged_at)
            # One by one none waits for memory, and finds on the disk what has been saved there meanwhile.
            loaded = ask_all(cluster, asked, at_once=4 if damaged_at is None else 1)
            wait_saved(cluster)
            return loaded

        clear("--host")
        ask_all(cluster, asked)
        wait_saved(cluster)
        given = [ask_all(cluster, asked)["host"]]
        while given[-1] <= 1000 and len(given) < TRIES:
            wait_saved(cluster)
            given.append(ask_all(cluster, asked)["host"])
        assert given[-1] > 1000, f"evicted blocks come from the host: {given}"
        wait_saved(cluster)

        given = [ask_new_workers()["disk"]]
        while given[-1] <= most and len(given) < TRIES:
            given.append(ask_new_workers()["disk"])
        assert given[-1] > most, given

        found: list[tuple[int, float]] = []
        while not found or (len(found) < TRIES and not (found[-1][0] > most and found[-1][1] > 100)):
            loaded = ask_new_workers(damaged_at=len(found))
            assert loaded["disk"] == 0
            found.append((loaded["remote"], metrics(cluster).get(invalid, 0)))
        assert found[-1][0] > most and found[-1][1] > 100, found
        cluster.wait_idle()
    assert host_tier_is_given_back()


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a mock engine that has room for 2,048 tokens and computes 5,000 a second."""
    cost = tmp_path_factory.mktemp("cost") / "cost.json"
    cost.write_text('{"token_s": 2e-4}')
    return ["--engine", "mock", "--kv-memory", "64KiB", "--cost-model", str(cost)]


@pytest.fixture(scope="module")
def rounds() -> list[dict[tuple[int, ...], list[int]]]:
    """Prompts and what the mock engine, whose tokens depend on every byte of KV, says to them without a store: in each
    round the same lengths, and nothing in common."""
    draw = Random(1)
    lengths = range(100, 1000, 90)
    drawn = [
        [tuple(draw.randrange(100, 40_000) for _ in range(length)) for length in lengths] for _ in range(TRIES + 1)
    ]
    with serve("smollm2", "--engine", "mock", "--policy", "single") as cluster:
        return [
            {prompt: tokens_of(cluster.complete(list(prompt), max_tokens=OUTPUT)) for prompt in prompts}
            for prompts in drawn
        ]


@pytest.fixture(scope="module")
def mocked(rounds: list[dict[tuple[int, ...], list[int]]]) -> dict[tuple[int, ...], list[int]]:
    """Those of the first round."""
    return rounds[0]


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


@pytest.mark.timeout(300)
def test_a_server_that_hangs_dies_or_lies_costs_no_answer(
    mock: list[str], mocked: dict[tuple[int, ...], list[int]]
) -> None:
    with redis_process("--requirepass", SECRET) as redis:
        url = redis.url.replace("//", f"//:{SECRET}@")
        with serve("smollm2", *mock, "--policy", "single", "--kv-remote", url) as cluster:
            for worker in cluster.state()["workers"]:
                assert SECRET not in " ".join(Process(worker["pid"]).cmdline())
            client = Redis(port=redis.port, password=SECRET)

            # The device has room for less than half of the prompts: each time the others are loaded, or computed and
            # saved, anew. That counts only while the server is not taken for slow, hence as often as it takes.
            def saved() -> bool:
                check_mocked(cluster, mocked)
                wait_saved(cluster)
                return len(client.keys("bascule:*")) > 200

            def caught() -> bool:
                check_mocked(cluster, mocked)
                wait_saved(cluster)
                return any("store_invalid" in key[0] for key in metrics(cluster))

            wait_until(saved, "the KV to be saved")
            names = client.keys("bascule:*")
            for name, other in zip(names, [*names[1:], names[0]], strict=True):
                client.copy(name, other, replace=True)
            wait_until(caught, "the lies to be counted")
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


@pytest.mark.timeout(300)
def test_kv_is_handed_over_by_way_of_the_store(
    mock: list[str], rounds: list[dict[tuple[int, ...], list[int]]], tmp_path: Path, quick_disk: Path
) -> None:
    """All that is asked goes by way of the store, and of one round of prompts most is found there: of a round in which
    the disk is slow for a moment, less. Who has saved it is not needed any more."""
    # Computing takes long enough for prompts to wait for what is loaded, on a busy machine too.
    (tmp_path / "cost.json").write_text('{"token_s": 2e-3}')
    slow = [*mock[:-1], str(tmp_path / "cost.json")]
    flags = [*slow, "--policy", "disaggregated", "--handoff", "store", "--kv-disk", f"{quick_disk}:1GiB"]
    with serve("smollm2", *flags) as cluster:
        loaded, again, asked = [0], 0.0, 0
        for fresh in rounds[:TRIES]:
            check_mocked(cluster, fresh)
            cluster.wait_idle()
            asked += len(fresh)
            before, again = again, metrics(cluster)["bascule_store_handoff_computed_tokens_total", "", ""]
            loaded.append(sum(map(len, fresh)) - int(again - before))
            if loaded[-1] > 3000:
                break
        assert loaded[-1] > 3000, loaded
        found = metrics(cluster)
        assert not any(key[0] == "bascule_kv_hit_tokens_total" and count for key, count in found.items()), "all was new"
        assert found["bascule_store_handoffs_total", "", ""] == asked
        assert not any(key[0] == "bascule_handoff_bytes_total" for key in found)
        assert any(hand_over_by_one_that_dies(cluster, *one) > 0 for one in list(rounds[TRIES].items())[-TRIES:])


def hand_over_by_one_that_dies(cluster: Cluster, prompt: tuple[int, ...], tokens: list[int]) -> int:
    """Serve a prompt whose prefill worker is killed when it has saved the KV, before the decode worker can load it.

    Its tokens must be the right ones; returns how many tokens' KV came from the disk.
    """
    workers = cluster.state()["workers"]
    prefill, decode = (next(w["pid"] for w in workers if w["role"] == role) for role in ("prefill", "decode"))
    handoffs = ("bascule_store_handoffs_total", "", "")
    before = metrics(cluster)
    with ThreadPoolExecutor(1) as pool:
        os.kill(decode, signal.SIGSTOP)
        try:
            asked = pool.submit(cluster.complete, list(prompt), max_tokens=OUTPUT)
            wait_until(lambda: metrics(cluster)[handoffs] > before[handoffs], "the KV to be saved")
            os.kill(prefill, signal.SIGKILL)
        finally:
            os.kill(decode, signal.SIGCONT)
        answer = asked.result()
        assert tokens_of(answer) == tokens
    cluster.wait(lambda now: {decode} < {w["pid"] for w in now["workers"]} - {prefill}, "a new prefill worker", 90)
    loaded: dict[str, int] = answer["usage"]["prompt_tokens_details"]["handoff"]["loaded_tokens"]
    return loaded.get("disk", 0)


def store_flags(directory: Path, redis: RedisProcess) -> list[str]:
    return ["--kv-host", "512MiB", "--kv-disk", f"{directory}:1GiB", "--kv-remote", redis.url]
