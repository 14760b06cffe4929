"""Handoffs by way of a Redis server that is killed: pushed meanwhile, and by way of it again once it is back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from support.cluster import Cluster, serve
from support.redis_server import RedisProcess, redis_process

LENGTH = 400
OUTPUT = 4
WITHIN_S = 90.0
TOLD = "by way of the remote tier (again in "


def fresh(draw: Random) -> list[int]:
    return [draw.randrange(100, 40_000) for _ in range(LENGTH)]


def tokens_of(answer: dict[str, Any]) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


@pytest.fixture(scope="module")
def whole() -> Iterator[Cluster]:
    """What the mock engine, whose tokens depend on every byte of KV, says where nothing is handed over."""
    with serve("smollm2", "--engine", "mock", "--policy", "single", "--no-prefix-cache") as cluster:
        yield cluster


class Asker:
    """Asks for prompts that nobody has seen; each answer must be the right one."""

    def __init__(self, cluster: Cluster, whole: Cluster) -> None:
        self._cluster, self._whole, self._draw = cluster, whole, Random(3)

    def ask(self) -> dict[str, Any]:
        """The decision record of one more prompt."""
        prompt = fresh(self._draw)
        answer, expected = (
            cluster.complete(prompt, max_tokens=OUTPUT, ignore_eos=True) for cluster in (self._cluster, self._whole)
        )
        assert tokens_of(answer) == tokens_of(expected)
        assert answer["route"].startswith("remote;")
        listed = self._cluster.http.get(f"{self._cluster.ready['admin_url']}/admin/decisions", params={"limit": 1})
        [record] = listed.json()["decisions"]
        return dict(record)

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Ask until a record is as wanted."""
        deadline = time.monotonic() + WITHIN_S
        while not condition(record := self.ask()):
            assert time.monotonic() < deadline, f"{what}; the last one: {record}"
        return record


def is_pushed(record: dict[str, Any]) -> bool:
    return record["actual"]["handoff"] is None


def is_loaded(record: dict[str, Any]) -> bool:
    moved = record["actual"]["handoff"]
    return moved is not None and moved["loaded_tokens"].get("remote", 0) > LENGTH // 2


@pytest.fixture
def redis() -> Iterator[RedisProcess]:
    with redis_process() as process:
        yield process


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lending", [True, False], ids=["lending", "not lending"])
def test_handoffs_leave_a_dead_tier_and_come_back_to_it(
    redis: RedisProcess, whole: Cluster, tmp_path: Path, lending: bool
) -> None:
    (tmp_path / "cost.json").write_text('{"token_s": 1e-3}')
    flags = ["--engine", "mock", "--kv-memory", "128KiB", "--cost-model", str(tmp_path / "cost.json")]
    flags += ["--policy", "disaggregated", "--handoff", "store", "--kv-remote", redis.url]
    flags += [] if lending else ["--no-peer-fetch"]
    with serve("smollm2", *flags) as cluster:
        asker = Asker(cluster, whole)
        asker.until(is_loaded, "handed over by way of the store")
        redis.stop()
        record = asker.until(is_pushed, "pushed")
        assert TOLD in record["reason"]
        passed = [asker.ask() for _ in range(12)]
        assert sum(map(is_pushed, passed)) > 4, "at most a trial after each pause"
        redis.start()
        asker.until(is_loaded, "handed over by way of the store again")
        asker.until(lambda record: is_loaded(record) and TOLD not in record["reason"], "the tier in use again")
        cluster.wait_idle()
