"""Prompts beside streams, on a clock that only steps move: what streams are promised holds, and nobody starves."""

from __future__ import annotations

from itertools import pairwise

import pytest
from engine_rig import Rig, greedy, reference, work

from bascule.engine.mock import mock_card
from bascule.types import CostModel, RequestId, Slo

CARD = mock_card(context=4096, vocab=10_000_000, block_size=16)
COST = CostModel(step_s=0.015, token_s=0.0008, pair_s=1e-7, context_s=1e-6, stream_s=(0.01, 0.012, 0.016, 0.024))
"""About a thousand prompt tokens a second, as a core computes the smallest models."""
SLO = Slo(2.0, 0.06, 0.2)
LONG = 1400


def slow_rig(slo: Slo, blocks: int = 1200, sequences: int = 16) -> Rig:
    return Rig(blocks=blocks, chunk=512, step=512, sequences=sequences, card=CARD, slo=slo, cost=COST)


def prompt(first: int, tokens: int) -> range:
    """Token ids that no other prompt begins with."""
    return range(first * 5000, first * 5000 + tokens)


def long_prompts_beside_streams(slo: Slo, outputs: int, streams: int = 4, longs: int = 3) -> Rig:
    rig = slow_rig(slo)
    for index in range(streams):
        rig.engine.submit(work(f"stream {index}", prompt(index, 40), greedy(outputs)))
    for _ in range(8):
        rig.step()
    for index in range(longs):
        rig.engine.submit(work(f"long {index}", prompt(10 + index, LONG), greedy(1)))
    rig.run()
    return rig


def worst(rig: Rig) -> tuple[float, float]:
    """The longest gap and the largest TPOT of the streams (s)."""
    each = [times for name, times in rig.times.items() if name.startswith("stream")]
    gaps = [later - sooner for times in each for sooner, later in pairwise(times)]
    return max(gaps), max((times[-1] - times[0]) / (len(times) - 1) for times in each)


@pytest.mark.parametrize("outputs", [16, 40, 120])
def test_streams_keep_gap_and_tpot_while_long_prompts_are_computed(outputs: int) -> None:
    gap, tpot = worst(long_prompts_beside_streams(SLO, outputs))
    assert gap <= SLO.gap_s
    assert tpot <= SLO.tpot_s
    uncut_gap, uncut_tpot = worst(long_prompts_beside_streams(Slo(), outputs))
    assert uncut_gap > 2 * SLO.gap_s
    assert uncut_tpot > SLO.tpot_s or outputs == 120, "4.6 s of prompts vanish in the mean of a long output only"


def test_a_gap_bound_alone_does_not_keep_the_tpot() -> None:
    gap, tpot = worst(long_prompts_beside_streams(Slo(gap_s=SLO.gap_s), 40))
    assert gap <= SLO.gap_s
    assert tpot > 1.5 * SLO.tpot_s


def test_prompts_beside_streams_come_nearly_as_far_as_the_bounds_let_them() -> None:
    rig = long_prompts_beside_streams(SLO, 400, longs=1)
    steps_alone = 0.024 + 4 * 200 * COST.context_s
    usable = 1 - steps_alone / SLO.tpot_s  # of the time; the rest goes to the streams
    took = rig.times["long 0"][0] - rig.times["stream 0"][7]
    assert took < LONG * COST.token_s / usable * 1.5


def test_a_request_may_ask_for_a_tighter_gap_than_the_engines() -> None:
    rig = slow_rig(SLO)
    rig.engine.submit(work("stream", prompt(0, 40), greedy(60), slo=Slo(gap_s=0.08)))
    rig.step()
    rig.engine.submit(work("long", prompt(1, LONG), greedy(1)))
    rig.run()
    assert worst(rig)[0] <= 0.08


def test_a_stream_that_was_handed_over_is_kept_like_one_that_began_here() -> None:
    rig = slow_rig(SLO)
    lease = rig.engine.reserve(tuple(prompt(0, 40)), 41)
    assert lease is not None
    rig.engine.adopt(work("stream", prompt(0, 40), greedy(60), generated=(5,)), lease)
    rig.engine.submit(work("long", prompt(1, LONG), greedy(1)))
    rig.run()
    gap, tpot = worst(rig)
    assert max(gap, rig.times["stream"][0]) <= SLO.gap_s
    assert tpot <= SLO.tpot_s


def test_before_its_cost_is_known_a_worker_of_this_speed_keeps_gaps_too() -> None:
    rig = slow_rig(SLO)
    rig.engine.cost = CostModel()
    rig.engine.submit(work("stream", prompt(0, 40), greedy(60)))
    rig.step()
    rig.engine.submit(work("long", prompt(1, LONG), greedy(1)))
    rig.run()
    assert worst(rig)[0] <= SLO.gap_s


def order_of_first_tokens(rig: Rig) -> list[str]:
    return sorted(rig.times, key=lambda name: rig.times[name][0])


def test_of_prompts_that_came_together_the_shortest_is_computed_first() -> None:
    rig = slow_rig(SLO)
    for name, tokens in {"long": LONG, "middle": 600, "short": 100}.items():
        rig.engine.submit(work(name, prompt(tokens, tokens), greedy(1)))
    rig.run()
    assert order_of_first_tokens(rig) == ["short", "middle", "long"]


def test_a_handoff_that_was_to_have_memory_first_is_computed_in_its_turn() -> None:
    """Or a prompt that is not handed over waits for as long as there are such, whatever its length."""
    rig = slow_rig(SLO)
    rig.engine.submit(work("whole", prompt(1, 600), greedy(1)))
    rig.engine.submit(work("handed over", prompt(2, LONG), greedy(4), handoff=True))
    assert rig.engine.secure(RequestId("handed over"), 1)
    rig.engine.permit(RequestId("handed over"), 1)
    while "whole" not in rig.times:
        rig.step()
    assert rig.progress and not any(progress.last for progress in rig.progress)


def test_a_long_prompt_in_the_cache_goes_before_a_shorter_one_that_is_not() -> None:
    rig = slow_rig(SLO)
    rig.engine.submit(work("before", prompt(1, 1280), greedy(1)))
    rig.run()
    rig.engine.submit(work("middle", prompt(2, 600), greedy(1)))
    rig.engine.submit(work("cached", prompt(1, 1300), greedy(1)))
    rig.run()
    assert order_of_first_tokens(rig) == ["before", "cached", "middle"]


def test_one_that_waits_moves_up_when_another_has_computed_its_prefix() -> None:
    rig = slow_rig(SLO, sequences=1)
    rig.engine.submit(work("running", prompt(1, 1280), greedy(1)))
    rig.step()
    rig.engine.submit(work("middle", prompt(2, 600), greedy(1)))
    rig.engine.submit(work("alike", prompt(1, 1300), greedy(1)))
    rig.run()
    assert order_of_first_tokens(rig) == ["running", "alike", "middle"]


def test_one_that_has_a_reader_goes_before_shorter_prompts() -> None:
    rig = slow_rig(SLO, sequences=1)
    rig.engine.submit(work("running", prompt(1, 100), greedy(4)))
    rig.step()
    rig.engine.submit(work("short", prompt(2, 50), greedy(1)))
    rig.engine.submit(work("again", prompt(3, 900), greedy(3), generated=(7, 8)))
    rig.run()
    assert order_of_first_tokens(rig) == ["running", "again", "short"]


def keep_busy(rig: Rig, tokens: int, outputs: int, count: int, until: str) -> int:
    """Step while there are always a few short requests; returns how many had come when `until` was served."""
    sent = 0
    while until not in rig.times and sent < count:
        while rig.engine.load().running + rig.engine.load().waiting < 5:
            rig.engine.submit(work(f"short {sent}", prompt(100 + sent, tokens), greedy(outputs)))
            sent += 1
        rig.step()
    return sent


def test_a_long_prompt_is_not_starved_by_short_ones_that_never_end() -> None:
    rig = slow_rig(SLO)
    rig.engine.submit(work("stream", prompt(0, 40), greedy(2000)))
    rig.step()
    rig.engine.submit(work("long", prompt(1, LONG), greedy(1)))
    assert keep_busy(rig, tokens=100, outputs=1, count=200, until="long") > 10, "short ones keep it waiting at first"
    assert rig.times["long"][0] < 6.0
    assert worst(rig)[0] <= SLO.gap_s


def test_a_large_prompt_gets_its_memory_though_small_ones_always_fit() -> None:
    rig = slow_rig(SLO, blocks=96)
    keep_busy(rig, tokens=200, outputs=8, count=5, until="")
    begun = rig.clock.now()
    rig.engine.submit(work("large", prompt(1, LONG), greedy(1)))
    keep_busy(rig, tokens=200, outputs=8, count=200, until="large")
    assert rig.times["large"][0] - begun < 10.0, "nobody that came much later was let past"
    rig.run()
    assert rig.engine.load().waiting == 0


def test_one_that_gave_way_is_next_whatever_waits() -> None:
    rig = Rig(blocks=10, sequences=2)
    first, second = tuple(range(100, 112)), tuple(range(300, 312))
    rig.engine.submit(work("old", first, greedy(20)))
    rig.engine.submit(work("young", second, greedy(20)))
    rig.run(until=lambda: len(rig.tokens("young")) > 0 and rig.engine.load().waiting > 0)
    rig.engine.submit(work("short", (1, 2), greedy(20)))
    had = len(rig.tokens("young"))
    rig.run(until=lambda: "short" in rig.times)
    assert len(rig.tokens("young")) > had
    rig.run()
    assert rig.tokens("young") == reference(second, greedy(20))
    rig.assert_idle()
