"""Many clients at once, and clients that go away: every token counted, every block given back."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator

import httpx
import psutil
import pytest

from support.cluster import Cluster, serve

TIMEOUT = httpx.Timeout(240.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with serve("smollm2", "--kv-memory", "512MiB") as running:
        yield running


def body(cluster: Cluster, prompt_tokens: int, output_tokens: int, salt: int) -> dict[str, object]:
    source = random.Random(salt)
    return {
        "model": cluster.model,
        "prompt": [source.randrange(1000, 40000) for _ in range(prompt_tokens)],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


async def stream(client: httpx.AsyncClient, cluster: Cluster, request: dict[str, object]) -> tuple[int, int]:
    """Run a stream to its end; returns the token ids counted and what usage says."""
    counted, usage, done = 0, 0, False
    async with client.stream("POST", f"{cluster.url}/v1/completions", json=request) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                counted += sum(len(choice["token_ids"]) for choice in chunk["choices"])
                usage = (chunk.get("usage") or {}).get("completion_tokens", usage)
    assert done
    return counted, usage


@pytest.mark.timeout(400)
def test_64_streams_of_mixed_lengths_all_complete_with_exact_counts(cluster: Cluster) -> None:
    source = random.Random(1)
    lengths = [(16, 1), (16, 256), (3000, 1), (3000, 256)]
    lengths += [(source.randint(16, 200), source.randint(1, 48)) for _ in range(60)]

    async def all_at_once() -> list[tuple[int, int]]:
        async with httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)) as client:
            runs = [stream(client, cluster, body(cluster, n, out, i)) for i, (n, out) in enumerate(lengths)]
            return await asyncio.gather(*runs)

    counts = asyncio.run(all_at_once())
    assert counts == [(out, out) for _, out in lengths]
    cluster.wait_idle()


@pytest.mark.timeout(200)
def test_requests_that_end_with_their_first_token_leave_no_ticket_behind(cluster: Cluster) -> None:
    async def all_at_once() -> list[tuple[int, int]]:
        async with httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(stream(client, cluster, body(cluster, 17, 1, 5000 + i)) for i in range(96)))

    assert asyncio.run(all_at_once()) == [(1, 1)] * 96
    state = cluster.wait_idle()
    assert all(worker["promised"] == 0 for worker in state["workers"])


def worker_memory(cluster: Cluster) -> int:
    """Bytes of all workers' own memory but that for KV, which is taken as it is used, up to its bound."""
    maps = (each for worker in cluster.state()["workers"] for each in psutil.Process(worker["pid"]).memory_maps())
    return sum(each.private_dirty + each.private_clean for each in maps if "memfd:bascule-kv" not in each.path)


@pytest.mark.timeout(400)
def test_200_requests_half_of_them_abandoned_leave_nothing_behind(cluster: Cluster) -> None:
    source = random.Random(2)

    async def one(client: httpx.AsyncClient, index: int) -> bool:
        request = body(cluster, source.randint(16, 120), source.randint(4, 32), index)
        if index % 2 == 0:
            await stream(client, cluster, request)
            return True
        try:
            await asyncio.wait_for(stream(client, cluster, request), source.uniform(0.0, 0.8))
            return True
        except TimeoutError:
            return False

    async def waves(first: int, count: int) -> list[bool]:
        async with httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)) as client:
            gate = asyncio.Semaphore(16)

            async def gated(index: int) -> bool:
                async with gate:
                    return await one(client, index)

            return await asyncio.gather(*(gated(first + index) for index in range(count)))

    asyncio.run(waves(1000, 40))
    cluster.wait_idle()
    before = worker_memory(cluster)
    completed = asyncio.run(waves(0, 200))
    state = cluster.wait_idle()
    assert all(completed[::2]) and not all(completed[1::2]), "no request was abandoned half way"
    assert state["active"] == 0
    assert worker_memory(cluster) < 1.05 * before
