"""Sequences that gave their blocks up: what they lost comes back from the store where that is quicker, token by token
the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
from engine_rig import BLOCK, greedy, reference, work
from store_side_rig import KNOWN, Node, endless, prompt_of, run
from torch_support import BLOCK_SIZE, VOCAB, float_runner, make_model, reference_greedy

from bascule.engine.core import Work
from bascule.kv.store.memory import MemoryStore
from bascule.types import CostModel, Tier

BLOCKS = 64
OUTPUT = 60 * BLOCK
DEAR, CHEAP = KNOWN, CostModel(token_s=1e-7)
"""What a token takes to compute, against a load."""


def two_that_do_not_fit() -> list[Work]:
    """Each fits alone; together their outputs need twice what is there."""
    return [work(name, prompt_of(family, 3 * BLOCK), greedy(OUTPUT)) for family, name in enumerate(("old", "young"))]


async def served(
    node: Node,
    asked: list[Work],
    expected: Callable[[Work], list[int]] = lambda one: reference(one.prompt, one.sampling),
) -> int:
    """Run all to their ends, check every token; how often somebody had to go on anew with KV lost. Savers catch
    up now and then, and loads end before the next step."""
    resumed = steps = 0
    for each in asked:
        node.rig.engine.submit(each)
    while node.rig.engine.has_work():
        await asyncio.sleep(0.0005)  # for the loader and the savers
        steps += 1
        while node.side.loading or (not steps % 20 and node.side.saving):
            await asyncio.sleep(0.0005)
        result = node.step()
        resumed += len(result.admitted)
    await node.rest()
    for each in asked:
        assert node.rig.tokens(each.request) == expected(each)
    node.rig.assert_idle()
    return resumed


@pytest.mark.parametrize(
    ("cost", "loads"), [(DEAR, True), (CHEAP, False)], ids=["loading is quicker", "computing is quicker"]
)
@pytest.mark.timeout(60)
def test_a_preempted_sequence_gets_its_kv_back_by_the_quicker_way(cost: CostModel, loads: bool) -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            store = MemoryStore(1 << 24, Tier.HOST)
            node = Node([store], stack, blocks=BLOCKS, chunk=2 * BLOCK, step=16 + 2 * BLOCK)
            node.rig.engine.cost = cost
            endless(stack)
            assert await served(node, two_that_do_not_fit()) > 0
            assert (node.tiers.figures[Tier.HOST].loaded_blocks > 0) == loads

    run(scenario)


@pytest.mark.timeout(60)
def test_a_preempted_sequence_whose_stored_kv_is_gone_is_computed_anew() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            node = Node([MemoryStore(1, Tier.HOST)], stack, blocks=BLOCKS, chunk=2 * BLOCK, step=16 + 2 * BLOCK)
            node.rig.engine.cost = DEAR
            assert await served(node, two_that_do_not_fit()) > 0
            assert node.tiers.figures[Tier.HOST].loaded_blocks == 0

    run(scenario)


@pytest.mark.timeout(120)
def test_a_real_model_gives_the_same_tokens_after_giving_blocks_up_with_a_tier_and_without(tmp_path: Path) -> None:
    model, output, random = make_model("llama3-untied", tmp_path), 10 * BLOCK_SIZE, Random(5)
    prompts = [tuple(random.randrange(3, VOCAB) for _ in range(3 * BLOCK_SIZE)) for _ in range(2)]
    expected = {prompt: reference_greedy(model, prompt, output) for prompt in prompts}

    async def scenario() -> None:
        with ExitStack() as stack:
            for tiers in ([MemoryStore(1 << 26, Tier.HOST)], []):
                node = Node(tiers, stack, runner=float_runner(tmp_path), blocks=16, chunk=BLOCK_SIZE)
                node.rig.engine.cost = DEAR
                endless(stack)
                asked = [work(name, prompt, greedy(output)) for name, prompt in zip(("a", "b"), prompts, strict=True)]
                assert await served(node, asked, lambda one: expected[one.prompt]) > 0
                assert all(figures.loaded_blocks > 0 for figures in node.tiers.figures.values())

    run(scenario)
