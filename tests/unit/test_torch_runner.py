"""The torch runner in float32 against transformers, over every family and every way to cut the work into steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_support import (
    BLOCK_SIZE,
    DISTRIBUTION,
    FAMILIES,
    VOCAB,
    Running,
    generate,
    log_probabilities,
    make_model,
    poisoned_arena,
    reference_greedy,
    reference_log_probabilities,
    step,
)

from bascule.engine.protocol import Slice
from bascule.engine.torch.runner import TorchRunner
from bascule.errors import ConfigError, ModelError
from bascule.kv.arena import Arena
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import resolve
from bascule.types import SamplingParams

BLOCKS = 96


@dataclass(frozen=True)
class Loaded:
    runner: TorchRunner
    arena: Arena
    reference: Any


def load(directory: Path, **changes: Any) -> TorchRunner:
    options = {"dtype": "float32", "device": "cpu", "threads": 1, "name": "tiny", "block_size": BLOCK_SIZE} | changes
    return TorchRunner(ModelDirectory(directory).spec(), resolve(str(directory)), **options)


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    directory = tmp_path_factory.mktemp("model")
    reference = make_model(request.param, directory)
    runner = load(directory)
    with poisoned_arena(runner, BLOCKS) as arena:
        runner.bind(arena)
        yield Loaded(runner, arena, reference)


@pytest.fixture(autouse=True)
def nothing_computed(request: pytest.FixtureRequest) -> None:
    """Every test starts from an arena full of NaN."""
    if "model" in request.fixturenames:
        request.getfixturevalue("model").arena.bytes[:] = 0xFF


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def straight(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


@pytest.mark.parametrize("length", [1, 2, BLOCK_SIZE, 50, 200])
def test_a_whole_prompt_has_the_distribution_of_transformers(model: Loaded, length: int) -> None:
    tokens = prompt(length)
    part = Slice(tokens, 0, straight(3, 30), DISTRIBUTION, tokens, length)
    [sampled] = model.runner.execute([part])
    expected = reference_log_probabilities(model.reference, tokens)
    torch.testing.assert_close(log_probabilities(sampled), expected, atol=2e-4, rtol=1e-4)
    assert sampled is not None
    assert sampled.token == int(expected.argmax())


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_generate_the_tokens_of_transformers(model: Loaded, chunk: int) -> None:
    sequence = Running(prompt(100), straight(0, 20))
    assert generate(model.runner, sequence, 24, chunk) == reference_greedy(model.reference, prompt(100), 24)


def test_scattered_block_tables_change_nothing(model: Loaded) -> None:
    expected = reference_greedy(model.reference, prompt(90, seed=1), 10)
    shuffled = random.Random(2).sample(range(BLOCKS), 13)
    tables = [
        shuffled,
        straight(60, 13)[::-1],
        straight(80, 3) + straight(10, 4) + straight(30, 6),
        list(range(0, 39, 3)),
    ]
    for table in tables:
        model.arena.bytes[:] = 0xFF
        assert generate(model.runner, Running(prompt(90, seed=1), table), 10, chunk=40) == expected


def test_a_batch_mixes_new_chunks_with_running_streams(model: Loaded) -> None:
    lengths = [5, 70, 1, 33, 120, 16]
    ids = random.Random(3).sample(range(BLOCKS), BLOCKS)
    waiting = []
    for seed, length in enumerate(lengths):
        needed = -(-(length + 12) // BLOCK_SIZE)
        waiting.append(Running(prompt(length, seed), ids[:needed]))
        ids = ids[needed:]
    expected = [reference_greedy(model.reference, sequence.prompt, 12) for sequence in waiting]
    arrived: list[Running] = []
    while any(len(sequence.output) < 12 for sequence in waiting):
        arrived = waiting[: len(arrived) + 1]
        step(model.runner, [sequence for sequence in arrived if len(sequence.output) < 12], chunk=30)
    assert [sequence.output for sequence in waiting] == expected


def test_a_cached_prefix_is_shared_and_left_untouched(model: Loaded) -> None:
    shared, table = prompt(4 * BLOCK_SIZE), [7, 8, 40, 2]
    model.runner.execute([Slice(shared, 0, table)])
    before = model.arena.bytes[:, table].copy()
    for seed, tail_blocks in ((1, [9, 10, 11]), (2, [50, 49, 48])):
        tokens = shared + prompt(5, seed)
        sequence = Running(tokens, table + tail_blocks, computed=len(shared))
        assert generate(model.runner, sequence, 8, chunk=64) == reference_greedy(model.reference, tokens, 8)
    assert (model.arena.bytes[:, table] == before).all()


def test_kv_copied_to_another_arena_continues_there(model: Loaded) -> None:
    """The bytes of the blocks, and the tokens, are the whole state of a sequence."""
    expected = reference_greedy(model.reference, prompt(45), 12)
    here, there = [4, 5, 6, 30, 31, 32, 33, 34], [70, 71, 20, 21, 22, 23, 24, 25]
    sequence = Running(prompt(45), here)
    generate(model.runner, sequence, 5, chunk=16)
    with poisoned_arena(model.runner, BLOCKS) as other:
        model.runner.publish(here)
        other.bytes[:, there] = model.arena.bytes[:, here]
        try:
            model.runner.bind(other)
            model.runner.absorb(there)
            sequence.blocks = there
            assert generate(model.runner, sequence, 12, chunk=16) == expected
        finally:
            model.runner.bind(model.arena)


def test_the_arena_holds_a_keys_and_a_values_plane_per_layer(model: Loaded) -> None:
    tokens = prompt(BLOCK_SIZE)
    model.runner.execute([Slice(tokens, 0, [5])])
    layout = model.runner.card.layout
    planes = torch.from_numpy(model.arena.bytes[:, 5]).view(torch.float32)
    written = planes.view(layout.planes, BLOCK_SIZE, layout.kv_heads, layout.head_dim)
    cache = model.reference(torch.tensor([tokens]), use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        torch.testing.assert_close(written[2 * index], layer.keys[0].transpose(0, 1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(written[2 * index + 1], layer.values[0].transpose(0, 1), atol=1e-4, rtol=1e-4)


def test_only_the_named_positions_are_written(model: Loaded) -> None:
    model.runner.execute([Slice(prompt(BLOCK_SIZE + 3), 0, [20, 60])])
    untouched = [block for block in range(BLOCKS) if block not in (20, 60)]
    assert (model.arena.bytes[:, untouched] == 0xFF).all()
    assert (model.arena.bytes[:, 60, 3 * model.runner.card.layout.token_bytes :] == 0xFF).all()


def test_steps_that_draw_nothing_return_none(model: Loaded) -> None:
    assert model.runner.execute([Slice(prompt(4), 0, [1]), Slice(prompt(9), 0, [2, 3])]) == [None, None]


def test_sampling_is_the_same_in_any_batch_and_chunking(model: Loaded) -> None:
    sampled = SamplingParams(max_tokens=1, temperature=0.9, top_p=0.9, seed=5, frequency_penalty=0.4)

    def run(chunk: int, company: list[Running]) -> list[int]:
        sequence = Running(prompt(40), straight(0, 8))
        while len(sequence.output) < 15:
            running = [sequence, *company]
            batch = [one.next_slice(chunk, sampled) for one in running]
            for one, part, drawn in zip(running, batch, model.runner.execute(batch), strict=True):
                one.take(part, drawn)
        return sequence.output

    alone = run(64, [])
    assert run(6, [Running(prompt(30, 8), straight(40, 8)), Running(prompt(3, 9), straight(60, 8))]) == alone
    assert alone != reference_greedy(model.reference, prompt(40), 15)


def test_damaged_kv_is_an_error_and_no_token(model: Loaded) -> None:
    sequence = Running(prompt(20), straight(0, 4))
    generate(model.runner, sequence, 1, chunk=64)
    model.arena.bytes[1, 0, :64] = 0xFF
    with pytest.raises(ModelError, match="not finite"):
        step(model.runner, [sequence], chunk=64)


def test_a_block_table_that_is_too_short_is_refused(model: Loaded) -> None:
    with pytest.raises(ValueError, match="over 1 blocks"):
        model.runner.execute([Slice(prompt(BLOCK_SIZE + 1), 0, [1])])


def test_the_card_describes_model_and_layout(tmp_path: Path) -> None:
    make_model("mistral-wide-heads", tmp_path)
    runner = load(tmp_path, dtype="bfloat16", context=100)
    card = runner.card
    assert (card.name, card.context, card.vocab) == ("tiny", 100, VOCAB)
    assert (card.layout.planes, card.layout.token_bytes, card.layout.dtype) == (6, 2 * 16 * 2, "bfloat16")
    assert runner.stop_tokens == {2}
    assert card.fingerprint == load(tmp_path, dtype="bfloat16").card.fingerprint
    assert card.fingerprint != load(tmp_path).card.fingerprint
    with Arena.create(load(tmp_path).card.layout, 2) as other, pytest.raises(ValueError, match="arena"):
        runner.bind(other)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bfloat16_stays_close_to_float32(family: str, tmp_path: Path) -> None:
    reference = make_model(family, tmp_path)
    runner = load(tmp_path, dtype="bfloat16")
    with poisoned_arena(runner, 30) as arena:
        runner.bind(arena)
        sequence = Running(prompt(60), straight(4, 12))
        while sequence.computed < 60:
            part = sequence.next_slice(25, DISTRIBUTION)
            [sampled] = runner.execute([part])
            sequence.take(part, sampled)
        difference = log_probabilities(sampled) - reference_log_probabilities(reference, prompt(60))
    assert float(difference.abs().mean()) < 0.1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"device": "tpu-9"}, "unknown device"),
        ({"device": "meta"}, "not supported"),
        ({"device": "cuda:63"}, "CUDA devices"),
        ({"context": 513}, "513"),
        ({"context": 0}, "1 to 512"),
    ],
)
def test_what_this_machine_or_model_cannot_do_is_refused_at_load(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    make_model("qwen2-tied", tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        load(tmp_path, **changes)
