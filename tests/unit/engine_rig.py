"""An engine over a mock runner for tests, driven step by step, with a reference that shares none of its scheduling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from bascule.clock import VirtualClock
from bascule.engine.core import Engine, EngineLimits, Failure, Output, Progress, StepResult, Work
from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.protocol import Runner, Slice
from bascule.engine.sequence import Key
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.types import CostModel, FinishReason, ModelCard, RequestId, SamplingParams, Slo

BLOCK = 4
CARD = mock_card(context=256, vocab=1_000_000, block_size=BLOCK)
HASHER = BlockHasher("mock", BLOCK)
STOP = 7
MAX_STEPS = 2000


def no_sleep(seconds: float) -> None:
    raise AssertionError(f"a free cost model asked for {seconds} seconds")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def work(
    name: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    generated: Sequence[int] = (),
    handoff: bool = False,
    slo: Slo | None = None,
    salt: bytes = b"",
    priority: int = 0,
) -> Work:
    return Work(
        request=RequestId(name),
        attempt=1,
        prompt=tuple(prompt),
        sampling=sampling,
        generated=tuple(generated),
        handoff=handoff,
        slo=slo,
        salt=salt,
        priority=priority,
    )


def reference(prompt: Sequence[int], sampling: SamplingParams, *, stop_at: int | None = None) -> list[int]:
    """The tokens a request has to get: computed alone, in memory of its own, the prompt in one piece."""
    blocks = list(range(-(-(len(prompt) + sampling.max_tokens) // BLOCK)))
    with Arena.create(CARD.layout, len(blocks)) as arena:
        runner = MockRunner(CARD, CostModel(), no_sleep, stop_tokens=frozenset({STOP}), stop_at=stop_at)
        runner.bind(arena)
        tokens, computed = list(prompt), 0
        while len(tokens) < len(prompt) + sampling.max_tokens:
            part = Slice(tokens[computed:], computed, blocks, sampling, tokens, len(prompt))
            [sampled] = runner.execute([part])
            assert sampled is not None
            computed = len(tokens)
            tokens.append(sampled.token)
            if sampled.token in runner.stop_tokens:
                break
    return tokens[len(prompt) :]


def named(transport: str) -> tuple[str, bytes | None]:
    """A transport of these tests as the package knows it: its name and the cluster's key; `sealed` is tcp with one."""
    return ("tcp", b"c" * 32) if transport == "sealed" else (transport, None)


@cache
def kv_of(prompt: tuple[int, ...]) -> NDArray[np.uint8]:
    """[planes, full blocks, bytes], computed alone."""
    blocks = list(range(-(-len(prompt) // BLOCK)))
    with Arena.create(CARD.layout, len(blocks)) as arena:
        runner = MockRunner(CARD, CostModel(), no_sleep)
        runner.bind(arena)
        runner.execute([Slice(prompt, 0, blocks)])
        return arena.bytes[:, : len(prompt) // BLOCK].copy()


def bring(rig: Rig, prompt: Sequence[int], places: range) -> bool:
    """Have these full blocks of a prompt found from now on, as one who loads them does; False if memory is short."""
    tokens = [token for place in places for token in prompt[place * BLOCK : (place + 1) * BLOCK]]
    if (lease := rig.engine.borrow([], [], len(places))) is None:
        return False
    with lease:
        rig.arena.bytes[:, lease.blocks] = kv_of(tuple(prompt))[:, list(places)]
        rig.engine.take_in(lease.blocks)
        lease.seal(0, [HASHER.chain(prompt)[place] for place in places], tokens)
    return True


class Rig:
    """An engine, everything it was made of, and everything that came out of it."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        chunk: int = 64,
        step: int = 64,
        sequences: int = 16,
        prefix_cache: bool = True,
        stop_at: int | None = None,
        own_memory: bool = False,
        card: ModelCard = CARD,
        runner: Runner | None = None,
        slo: Slo = Slo(),
        cost: CostModel = CostModel(),
    ) -> None:
        """Steps take the time of `cost` on the rig's own clock, and the engine knows it. `runner` is for no mock."""
        card = runner.card if runner is not None else card
        size = card.layout.block_size
        self.arena = Arena.create(card.layout, blocks)
        self.books = Books(blocks, size)
        self.clock = VirtualClock()
        self.runner = runner or MockRunner(
            card, cost, self.clock.advance, stop_tokens=frozenset({STOP}), stop_at=stop_at, own_memory=own_memory
        )
        limits = EngineLimits(
            max_sequences=sequences, chunk_tokens=chunk, step_tokens=step, prefix_cache=prefix_cache, slo=slo
        )
        self.hasher = BlockHasher("mock" if runner is None else card.fingerprint, size)
        self.engine = Engine(self.runner, self.arena, self.books, self.hasher, limits, self.clock.now)
        self.engine.cost = cost
        self.times: dict[str, list[float]] = {}
        """When each request's tokens came."""
        self.outputs: dict[Key, list[Output]] = {}
        self.progress: list[Progress] = []
        self.failed: list[Failure] = []
        self.steps = 0
        self.hit_tokens = self.computed_tokens = 0
        """Of prompts."""

    def step(self) -> StepResult:
        """One step; what came of it is remembered, and the engine's state is checked."""
        result = self.engine.step()
        self.steps += 1
        self.note(result)
        assert self.engine.check_integrity() == []
        return result

    def note(self, result: StepResult) -> None:
        """Remember what came of a step."""
        for output in result.outputs:
            self.outputs.setdefault(Key(output.request, output.attempt), []).append(output)
            self.times.setdefault(output.request, []).append(self.clock.now())
        self.progress += result.progress
        self.failed += result.failed
        self.hit_tokens += sum(found.tokens for found in result.found)
        self.computed_tokens += result.computed_tokens

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Step while there is work, or until a condition holds."""
        for _ in range(MAX_STEPS):
            if until() or not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"still work after {MAX_STEPS} steps")

    def tokens(self, name: str) -> list[int]:
        """The output of a request; its positions have no gap and no repeat."""
        outputs = self.outputs.get(Key(RequestId(name), 1), [])
        first = outputs[0].position if outputs else 0
        assert [output.position for output in outputs] == list(range(first, first + len(outputs)))
        return [output.token for output in outputs]

    def finish(self, name: str) -> FinishReason | None:
        outputs = self.outputs[Key(RequestId(name), 1)]
        assert all(output.finish is None for output in outputs[:-1])
        return outputs[-1].finish

    def assert_idle(self) -> None:
        """Nothing is left: no sequence, no lease."""
        load = self.engine.load()
        assert (load.running, load.waiting) == (0, 0)
        assert self.books.counts.held == 0
        assert self.books.counts.quarantined == 0
        assert self.engine.check_integrity() == []
