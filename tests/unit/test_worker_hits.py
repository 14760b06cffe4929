"""What a worker tells of the prompt tokens that it found and computed: all of one moment, and none twice."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from random import Random

import pytest
from engine_rig import BLOCK, Rig, greedy, work
from store_side_rig import Node, prompt_of
from worker_rig import Cluster, over_sockets

from bascule.engine.core import StepResult
from bascule.kv.store.memory import MemoryStore
from bascule.types import Tier


def test_a_heartbeat_between_a_step_and_its_news_tells_of_no_hit_that_no_tier_has() -> None:
    store, prompt = MemoryStore(1 << 20), prompt_of(2, 8 * BLOCK + 2)

    async def scenario(cluster: Cluster) -> None:
        worker, held = cluster.worker, list[StepResult]()
        side = worker._store
        assert side is not None
        cluster.engine.publishes = True
        await cluster.complete(prompt)
        await cluster.wait(lambda: store.stats().blocks >= 8 and not side.saving)
        cluster.books.acquire([], [], 24).release()  # type: ignore[union-attr]
        assert worker._load().computed_tokens == len(prompt)
        publish = worker._publish
        worker._publish = held.append  # type: ignore[method-assign]
        asked = asyncio.create_task(cluster.complete(prompt))
        await cluster.wait(lambda: any(result.found for result in held))
        load = worker._load()
        assert (load.hit_tokens, load.stores[Tier.HOST].hit_tokens, load.computed_tokens) == (0, 0, len(prompt))
        worker._publish = publish  # type: ignore[method-assign]
        for result in held:
            publish(result)
        await asked
        load = worker._load()
        assert load.hit_tokens == load.stores[Tier.HOST].hit_tokens == 8 * BLOCK
        assert load.computed_tokens == len(prompt) + 2

    over_sockets(scenario, stores=[store])


def test_a_prompts_tokens_are_found_or_computed_however_it_is_cut_and_its_output_is_neither() -> None:
    rig = Rig(chunk=7)
    prompt = prompt_of(1, 45)
    for number, length in enumerate((45, 30, 45, 44)):
        rig.engine.submit(work(str(number), prompt[:length], greedy(9)))
        rig.run()
    assert rig.hit_tokens + rig.computed_tokens == 45 + 30 + 45 + 44
    assert rig.hit_tokens == sum(outputs[0].cached_tokens for outputs in rig.outputs.values()) > 80


@pytest.mark.parametrize("seed", range(4))
def test_with_lower_tiers_evictions_and_restarts_each_prompt_token_is_found_once_or_computed(seed: int) -> None:
    random = Random(seed)
    stores = [MemoryStore(12_000), MemoryStore(60_000, Tier.DISK)]

    async def run() -> None:
        with ExitStack() as stack:
            node, asked, before = Node(stores, stack, blocks=24), 0, 0
            for _ in range(30):
                prompt = prompt_of(random.randrange(5), random.randrange(2, 45))
                asked += len(prompt)
                await node.complete(prompt)
                loaded = sum(load.hit_tokens for load in node.side.loads().values())
                assert node.rig.hit_tokens + node.rig.computed_tokens == asked - before
                assert loaded == sum(sum(brought.tokens.values()) for brought in node.loaded.values())
                assert loaded <= node.rig.hit_tokens
                if random.random() < 0.2:
                    node, before = Node(stores, stack, blocks=24), asked

    asyncio.run(run())
