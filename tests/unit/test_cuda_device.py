"""What only a GPU can show: graphs that are recorded, copies that are pinned, a runner from tokens to tokens."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch_support import (
    BLOCK_SIZE,
    VOCAB,
    Running,
    generate,
    make_model,
    poisoned_arena,
    reference_greedy,
    runner_of,
    step,
)

from bascule.engine.torch.runner import TorchRunner

DEVICE = os.environ.get("BASCULE_TEST_DEVICE", "cpu")
# Without a name Triton interprets in this process, which nothing could record.
pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU is named; where there is one, make test-cuda names it")

BLOCKS = 96


@pytest.fixture(params=["float32", "bfloat16"])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TorchRunner]:
    """Of a model with heads of 16 numbers: by torch in float32, by the kernels in bfloat16."""
    make_model("mistral-wide-heads", tmp_path)
    found = runner_of(tmp_path, request.param, DEVICE)
    with poisoned_arena(found, BLOCKS) as arena:
        found.bind(arena)
        found.absorb(range(BLOCKS))
        yield found


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def test_the_kernels_are_what_computes_bfloat16(runner: TorchRunner) -> None:
    kind = type(runner._decoders.few).__name__
    assert kind == ("CudaDecoder" if runner.card.layout.dtype == "bfloat16" else "Decoder")


def test_float32_generates_the_tokens_of_transformers(tmp_path: Path) -> None:
    reference = make_model("llama3-untied", tmp_path)
    exact = runner_of(tmp_path, "float32", DEVICE)
    with poisoned_arena(exact, BLOCKS) as arena:
        exact.bind(arena)
        assert generate(exact, Running(prompt(60), list(range(12))), 12, 25) == reference_greedy(
            reference, prompt(60), 12
        )


def test_streams_of_a_batch_are_those_of_each_alone(runner: TorchRunner) -> None:
    """Recorded steps of three beside one: in bfloat16 sums differ with the batch, so the first tokens are compared."""
    alone = [generate(runner, Running(prompt(40, seed), list(range(12))), 4, 64) for seed in range(3)]
    together = [Running(prompt(40, seed), list(range(20 + 12 * seed, 32 + 12 * seed))) for seed in range(3)]
    while len(together[0].output) < 4:
        step(runner, together, 64)
    assert [sequence.output[:2] for sequence in together] == [tokens[:2] for tokens in alone]


def test_kv_goes_through_the_arena_and_back(runner: TorchRunner) -> None:
    here, there = [4, 5, 6, 30, 31, 32, 33], [70, 71, 20, 21, 22, 23, 24]
    sequence = Running(prompt(45), here)
    generate(runner, sequence, 2, 16)
    arena = runner._copies._arena  # type: ignore[union-attr]
    runner.publish(here[:3])
    numbers = arena.isfinite().flatten(2).all(-1).all(0)
    assert numbers.nonzero().flatten().tolist() == list(range(4 * BLOCK_SIZE, 7 * BLOCK_SIZE))
    runner.publish(here)
    for source, target in zip(here, there, strict=True):
        arena[:, target * BLOCK_SIZE : (target + 1) * BLOCK_SIZE] = arena[
            :, source * BLOCK_SIZE : (source + 1) * BLOCK_SIZE
        ]
    runner.absorb(there)
    tokens = list(sequence.tokens)
    expected = generate(runner, sequence, 8, 16)
    moved = Running(prompt(45), there, computed=sequence.computed - 6)
    moved.tokens = tokens
    assert generate(runner, moved, 8, 16) == expected


def test_the_arena_is_pinned(runner: TorchRunner) -> None:
    assert runner._copies is not None and runner._copies._arena.is_pinned()
