"""What a slow tier costs a prompt: TTFT over a cold one, by how long its load takes and was predicted to take.

    python benchmarks/late_loading.py

A worker's engine and store side in one process. The engine is the mock, whose steps sleep for as long as a cost model
says, and so does the tier: what is measured is who waits for whom, and not this machine. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from threading import Event, Thread

from bascule.engine.core import Engine, EngineLimits, StepResult, Work
from bascule.engine.mock import MockRunner, mock_card
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.forms import Forms
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.tiers import Tiers
from bascule.types import BlockHash, CostModel, LinkCost, RequestId, SamplingParams, Tier
from bascule.wire import Submit
from bascule.worker.store_side import StoreSide

CARD = mock_card()
SIZE = CARD.layout.block_size
COST = CostModel(step_s=0.002, token_s=0.001)
CHUNK_TOKENS = 512
CASES = ((0.02, 0.02), (0.1, 0.1), (0.3, 0.3), (0.7, 0.7), (1.5, 1.5), (3.0, 3.0), (0.1, 1.0), (0.1, 10.0))
"""What a load is predicted to take, and takes, over computing the prompt."""


class SlowStore(MemoryStore):
    """Takes its time for each block, and outlives the nodes that use it."""

    block_s = 0.0

    def close(self) -> None:
        pass

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        time.sleep(self.block_s * len(names))
        return super().get(names)


class Node:
    """The parts of a worker that matter here. Made in the asyncio loop."""

    def __init__(self, store: SlowStore, blocks: int) -> None:
        self.arena = Arena.create(CARD.layout, blocks)
        self.books = Books(blocks, SIZE)
        hasher = BlockHasher(CARD.fingerprint, SIZE)
        limits = EngineLimits(max_sequences=4, chunk_tokens=CHUNK_TOKENS, step_tokens=CHUNK_TOKENS)
        self.engine = Engine(MockRunner(CARD, COST, time.sleep), self.arena, self.books, hasher, limits)
        self.engine.cost, self.engine.publishes = COST, True
        self.tiers = Tiers([store], self.arena, self.books, CARD.fingerprint, Forms("none", CARD.layout))
        self.side = StoreSide(self.tiers, self.engine, self.books, hasher, CARD.layout, lambda *_: None)

    async def ask(self, prompt: tuple[int, ...]) -> tuple[float, int]:
        """Seconds to the first token, and the tokens that were not computed."""
        loop, first, stop = asyncio.get_running_loop(), asyncio.Event(), Event()
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        work = Work(request=RequestId("r"), attempt=1, prompt=prompt, sampling=sampling)
        cached: list[int] = []

        def stepped(result: StepResult) -> None:
            self.side.stepped(result)
            cached.extend(output.cached_tokens for output in result.outputs)
            if cached:
                first.set()

        def steps() -> None:
            while not stop.is_set():
                if not self.engine.has_work():
                    time.sleep(0.001)
                elif not (result := self.engine.step()).is_empty:
                    loop.call_soon_threadsafe(stepped, result)

        thread = Thread(target=steps)
        thread.start()
        begun = time.perf_counter()
        submission = Submit(request=work.request, attempt=1, prompt=prompt, generated=(), sampling=sampling)
        await self.side.start(submission, lambda _: self.engine.submit(work))
        await first.wait()
        seconds = time.perf_counter() - begun
        stop.set()
        thread.join()
        return seconds, cached[0]

    async def close(self) -> None:
        self.side.computed(self.books.changes().stored)
        while self.side.saving or self.side.loading:
            await asyncio.sleep(0.01)
        await self.side.close()
        self.arena.close()


async def measure(tokens: int) -> None:
    blocks = tokens // SIZE
    prompt = tuple(range(1, tokens + 3))
    store = SlowStore(1 << 30, Tier.REMOTE)
    node = Node(store, 2 * blocks + 64)
    cold, _ = await node.ask(prompt)
    await node.close()
    print(f"A prompt of {tokens} tokens that takes {cold:.2f} s to compute:\n")
    print("| load / computing, predicted | actual | TTFT / cold | tokens not computed |\n|---|---|---|---|")
    for predicted, actual in CASES:
        node = Node(store, 2 * blocks + 64)
        cost = LinkCost(0.001, blocks * CARD.layout.block_bytes / (predicted * cold))
        node.tiers.costs = lambda cost=cost: {Tier.REMOTE: cost}  # type: ignore[method-assign, misc]
        store.block_s = actual * cold / blocks
        ttft, cached = await node.ask(prompt)
        store.block_s = 0.0
        print(f"| {predicted:g} | {actual:g} | {ttft / cold:.2f} | {cached} |", flush=True)
        await node.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="of the prompt")
    asyncio.run(measure(parser.parse_args().tokens))


if __name__ == "__main__":
    main()
