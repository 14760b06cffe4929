"""The mock runner: its tokens depend on every byte of the context, and its time on the cost model."""

from __future__ import annotations

import numpy as np
import pytest
from engine_rig import BLOCK, CARD, STOP, greedy, no_sleep, reference

from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.protocol import Slice
from bascule.kv.arena import Arena
from bascule.types import CostModel, SamplingParams

PROMPT = list(range(40, 51))


def bound(runner: MockRunner) -> Arena:
    arena = Arena.create(CARD.layout, 8)
    runner.bind(arena)
    return arena


def free_runner() -> MockRunner:
    return MockRunner(CARD, CostModel(), no_sleep, stop_tokens=frozenset({STOP}))


def draw(runner: MockRunner, blocks: list[int], tokens: list[int], start: int) -> int:
    [sampled] = runner.execute([Slice(tokens[start:], start, blocks, greedy(9), tokens, len(PROMPT))])
    assert sampled is not None
    return sampled.token


def test_tokens_do_not_depend_on_where_the_blocks_lie_or_how_the_prompt_is_cut() -> None:
    whole, cut = free_runner(), free_runner()
    bound(whole)
    bound(cut)
    first = draw(whole, [0, 1, 2], PROMPT, 0)
    assert cut.execute([Slice(PROMPT[:5], 0, [6, 2, 4])]) == [None]
    assert draw(cut, [6, 2, 4], PROMPT, 5) == first


@pytest.mark.parametrize("position", range(len(PROMPT)))
@pytest.mark.parametrize("plane", range(CARD.layout.planes))
def test_one_wrong_byte_anywhere_in_the_context_changes_the_next_token(position: int, plane: int) -> None:
    runner = free_runner()
    arena = bound(runner)
    first = draw(runner, [0, 1, 2], PROMPT, 0)
    right = draw(runner, [0, 1, 2], [*PROMPT, first], len(PROMPT))
    block, offset = divmod(position, BLOCK)
    arena.bytes[plane, block, offset * CARD.layout.token_bytes] ^= 1
    assert draw(runner, [0, 1, 2], [*PROMPT, first], len(PROMPT)) != right


def test_what_lies_beyond_the_context_does_not_matter() -> None:
    runner = free_runner()
    arena = bound(runner)
    right = draw(runner, [0, 1, 2], PROMPT, 0)
    arena.bytes[:] = 255
    assert draw(runner, [0, 1, 2], PROMPT, 0) == right


def test_own_memory_reaches_the_arena_only_when_published_and_comes_back_when_absorbed() -> None:
    source = MockRunner(CARD, CostModel(), no_sleep, own_memory=True)
    arena = bound(source)
    first = draw(source, [0, 1, 2], PROMPT, 0)
    assert not arena.bytes.any()
    source.publish([0, 2])
    assert np.flatnonzero(arena.bytes.any(axis=(0, 2))).tolist() == [0, 2]
    source.publish([1])
    target = MockRunner(CARD, CostModel(), no_sleep, own_memory=True)
    target.bind(arena)
    target.absorb([0, 1, 2])
    tokens = [*PROMPT, first]
    assert draw(target, [0, 1, 2], tokens, len(PROMPT)) == draw(source, [0, 1, 2], tokens, len(PROMPT))


def test_end_tokens_are_drawn_only_where_asked_for_and_not_before_min_tokens() -> None:
    tiny = mock_card(vocab=4, block_size=BLOCK)
    stops = frozenset({1, 2})
    for stop_at, min_tokens, expected in [(None, 0, False), (0, 0, True), (0, 1, False)]:
        runner = MockRunner(tiny, CostModel(), no_sleep, stop_tokens=stops, stop_at=stop_at)
        runner.bind(Arena.create(tiny.layout, 4))
        sampling = SamplingParams(max_tokens=3, min_tokens=min_tokens)
        prompts = [[token] * length for token in range(4) for length in range(1, 9)]
        drawn = [runner.execute([Slice(p, 0, [0, 1], sampling, p, len(p))])[0] for p in prompts]
        assert {token is not None and token.token in stops for token in drawn} == {expected}


def test_a_step_sleeps_what_the_cost_model_says() -> None:
    slept: list[float] = []
    cost = CostModel(step_s=1.0, token_s=0.1, pair_s=0.01, context_s=0.001)
    runner = MockRunner(CARD, cost, slept.append)
    bound(runner)
    runner.execute([Slice(PROMPT[:8], 0, [0, 1, 2])])
    runner.execute([Slice(PROMPT[8:9], 8, [0, 1, 2]), Slice(PROMPT[:4], 0, [3])])
    assert slept == pytest.approx([1.0 + 0.8 + 0.01 * 32, 1.0 + 0.5 + 0.01 * 8 + 0.001 * 8])


def test_a_slice_that_breaks_the_rules_is_refused() -> None:
    runner = free_runner()
    bound(runner)
    with pytest.raises(ValueError, match="do not fit"):
        runner.execute([Slice(PROMPT, 0, [0, 1])])
    with pytest.raises(ValueError, match="history"):
        runner.execute([Slice(PROMPT, 0, [0, 1, 2], greedy(1), PROMPT[:-1], len(PROMPT))])


def test_an_arena_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout"):
        free_runner().bind(Arena.create(mock_card(layers=3).layout, 2))


def test_a_reference_output_is_a_function_of_prompt_and_seed() -> None:
    sampled = SamplingParams(max_tokens=6, seed=1)
    assert reference(PROMPT, sampled) == reference(PROMPT, sampled)
    assert reference(PROMPT, sampled) != reference(PROMPT, SamplingParams(max_tokens=6, seed=2))
    assert reference(PROMPT, greedy(6)) != reference(PROMPT[1:], greedy(6))
