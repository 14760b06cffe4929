"""Whatever is loaded when, while prompts are computed, cancelled and evicted: the tokens are the right ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
from engine_rig import BLOCK
from store_side_rig import KNOWN, LENGTH, OUTPUT, Gated, Node, finish, patient, prompt_of, run, until
from torch_support import BLOCK_SIZE, VOCAB, float_runner, make_model, reference_greedy

from bascule.engine.sequence import Key
from bascule.kv.store.directory import DirectoryStore
from bascule.types import Tier


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Chance:
    """Requests, calls let through, cancels, evictions and steps, in any order."""

    def __init__(self, seed: int, stack: ExitStack) -> None:
        self.random = random = Random(seed)
        self.stores = [Gated(1 << 18), Gated(1 << 20, Tier.DISK)]
        lengths = [random.randrange(4, LENGTH * BLOCK) for _ in range(9)]
        self.prompts = [prompt_of(number % 3, length) for number, length in enumerate(lengths)]
        self.first = Node(self.stores, stack)
        self.node = Node(
            self.stores,
            stack,
            blocks=random.choice((64, 160)),
            chunk=random.choice((3, 2 * BLOCK, 64)),
            own_memory=bool(seed % 2),
            sequences=random.choice((1, 4)),
        )
        self.node.rig.engine.cost = KNOWN
        self.asked: dict[Key, list[int]] = {}
        self.deeds = [self.ask] * 2 + [self.let] * 2 + [self.cancel, self.evict] + [self.step] * 6

    async def ask(self) -> None:
        if len(self.asked) < 12:
            prompt = self.random.choice(self.prompts)
            key, ready = self.node.submit(prompt)
            self.asked[key] = prompt
            if self.random.random() < 0.7:
                await ready

    async def let(self) -> None:
        self.random.choice(self.stores).gate.release()
        await asyncio.sleep(self.random.choice((0, 0.002)))

    async def cancel(self) -> None:
        if self.asked and self.random.random() < 0.3:
            key = self.random.choice(list(self.asked))
            self.node.side.cancel(key)
            self.node.rig.engine.cancel(*key)
            del self.asked[key]

    async def evict(self) -> None:
        if (lease := self.node.rig.books.acquire([], [], 30)) is not None:
            lease.release()

    async def step(self) -> None:
        if self.node.rig.engine.has_work():
            self.node.step()

    async def all(self) -> None:
        for prompt in self.prompts[:7]:
            await self.first.complete(prompt)
        for store in self.stores:
            store.open = False
        for _ in range(150):
            await self.random.choice(self.deeds)()
            await asyncio.sleep(0)
            assert self.node.rig.engine.check_integrity() == []
        for store in self.stores:
            store.let_all()
        while self.node.rig.engine.has_work() or self.node.side._starting or self.node.side.loading:
            self.node.step()
            await asyncio.sleep(0.0002)
        for key, prompt in self.asked.items():
            self.node.check(key, prompt)
        await self.node.rest()
        self.node.rig.assert_idle()


@pytest.mark.parametrize("seed", range(8))
def test_random_interleavings_give_the_right_tokens_and_leak_nothing(seed: int, stack: ExitStack) -> None:
    async def scenario() -> None:
        await Chance(seed, stack).all()

    run(scenario)


class TorchNode(Node):
    """One that computes a real model in float32."""

    def expected(self, prompt: Sequence[int]) -> list[int]:
        return self.tokens[tuple(prompt)]

    tokens: dict[tuple[int, ...], list[int]]


def test_a_real_model_gives_the_same_tokens_whatever_it_loads_on_the_way(stack: ExitStack, tmp_path: Path) -> None:
    model = make_model("llama3-untied", tmp_path)
    random = Random(3)
    prompt = [random.randrange(3, VOCAB) for _ in range(40 * BLOCK_SIZE + 3)]

    def node() -> TorchNode:
        node = TorchNode([store], stack, runner=float_runner(tmp_path), chunk=2 * BLOCK_SIZE)
        node.tokens = {tuple(prompt): reference_greedy(model, prompt, OUTPUT)}
        return node

    async def scenario() -> None:
        await node().complete(prompt)
        store.open = False
        patient(store, stack)
        second = node()
        second.rig.engine.cost = KNOWN
        key, ready = second.submit(prompt)
        await ready
        second.step()
        store.gate.release(2)
        await until(lambda: len(store.asked) == 3)
        while second.rig.engine.has_work():
            second.step()
        brought = second.check(key, prompt)
        assert brought is not None and brought.tokens == {Tier.HOST: 30 * BLOCK_SIZE}
        await finish(second, store)

    store = Gated(1 << 26)
    run(scenario)


def test_another_model_of_the_same_name_finds_nothing_of_the_first_in_the_same_tier(
    stack: ExitStack, tmp_path: Path
) -> None:
    """As where weights are replaced in their folder, and the disk that served the old ones goes on."""
    models = [make_model("llama3-untied", tmp_path / str(seed), seed) for seed in (7, 8)]
    prompt = [Random(4).randrange(3, VOCAB) for _ in range(5 * BLOCK_SIZE + 3)]
    expected = [reference_greedy(model, prompt, OUTPUT) for model in models]
    assert expected[0] != expected[1]
    (tmp_path / "kv").mkdir()

    async def scenario() -> None:
        runners = [float_runner(tmp_path / str(seed)) for seed in (7, 8)]
        assert runners[0].card.name == runners[1].card.name
        assert runners[0].card.layout == runners[1].card.layout
        for which, known in ((0, False), (1, False), (0, True), (1, True)):
            node = TorchNode([DirectoryStore(tmp_path / "kv", 1 << 24)], stack, runner=runners[which])
            node.tokens = {tuple(prompt): expected[which]}
            brought = await node.complete(prompt)
            assert (brought.tokens if brought is not None else {}) == ({Tier.DISK: 5 * BLOCK_SIZE} if known else {})
            assert node.rig.outputs.popitem()[1][0].cached_tokens == (5 * BLOCK_SIZE if known else 0)
            await node.side.close()

    run(scenario)
