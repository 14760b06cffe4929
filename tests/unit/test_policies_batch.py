"""How a step's tokens are shared out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from bascule.policies.batch import (
    GAP_MARGIN,
    LEAST_CHUNK,
    TPOT_MARGIN,
    BatchLimits,
    Row,
    Stream,
    allowed_seconds,
    grant_tokens,
    slack_seconds,
)
from bascule.policies.cost import PrefillPart, decode_seconds, step_seconds
from bascule.policies.order import AGEING, place_in_line
from bascule.types import CostModel

LIMITS = BatchLimits(chunk_tokens=8, step_tokens=20)
WIDE = BatchLimits(chunk_tokens=512, step_tokens=512)
COST = CostModel(step_s=0.02, token_s=0.001)
PAIRS = CostModel(step_s=0.02, token_s=0.001, pair_s=1e-6, context_s=1e-6)


def test_streams_come_before_chunks_whatever_the_order() -> None:
    rows = [Row(0, 100), Row(30, 31), Row(0, 100), Row(50, 51)]
    assert grant_tokens(rows, BatchLimits(chunk_tokens=8, step_tokens=9)) == (7, 1, 0, 1)


def test_chunks_go_out_in_the_order_given_until_the_step_is_full() -> None:
    assert grant_tokens([Row(0, 100)] * 4, LIMITS) == (8, 8, 4, 0)


def test_a_chunk_ends_where_the_known_tokens_end() -> None:
    assert grant_tokens([Row(95, 100), Row(0, 3)], LIMITS) == (5, 3)


def test_more_streams_than_tokens_leave_the_last_out() -> None:
    assert grant_tokens([Row(9, 10)] * 3, BatchLimits(chunk_tokens=8, step_tokens=2)) == (1, 1, 0)


def test_nobody_is_behind_and_nobody_gets_anything() -> None:
    assert grant_tokens([], LIMITS) == ()
    assert grant_tokens([Row(5, 5)], LIMITS) == (0,)


GAP = Stream(gap_s=0.2, left=100)


def test_a_prompt_beside_a_stream_is_cut_so_that_the_step_keeps_its_gap() -> None:
    stream = Row(40, 41, GAP)  # 0.8 * 0.2 s less 0.021 s are 139 tokens
    assert grant_tokens([stream, Row(0, 1000)], WIDE, COST) == (1, 128)
    assert grant_tokens([stream, Row(0, 1000)], WIDE, PAIRS) == (1, 128)
    assert grant_tokens([stream, Row(600, 1600)], WIDE, PAIRS) == (1, 80), "a token far back sees more"
    late = Row(40, 41, structs.replace(GAP, since_s=0.05))
    assert grant_tokens([late, Row(0, 1000)], WIDE, COST) == (1, 80)
    assert grant_tokens([Row(0, 1000)], WIDE, COST) == (512,)
    assert grant_tokens([Row(40, 41, Stream(left=9)), Row(0, 1000)], WIDE, COST) == (1, 511)


def test_short_prompts_share_a_step_and_need_not_fill_the_grain() -> None:
    rows = [Row(40, 41, GAP), Row(0, 50), Row(0, 41), Row(0, 1000), Row(0, 7)]
    assert grant_tokens(rows, WIDE, COST) == (1, 50, 41, 48, 0)


def test_the_tightest_stream_decides() -> None:
    tight = Row(40, 41, Stream(gap_s=0.1, left=100))
    assert grant_tokens([Row(40, 41, GAP), tight, Row(0, 1000)], WIDE, COST) == (1, 1, 48)


def test_a_sequence_whose_first_token_is_not_out_has_no_gap_to_keep() -> None:
    assert grant_tokens([Row(40, 41), Row(0, 1000)], WIDE, COST) == (1, 511)


def test_prompts_go_on_where_streams_alone_take_longer_than_their_gap() -> None:
    slow = CostModel(step_s=0.5, token_s=0.001)
    assert grant_tokens([Row(40, 41, GAP), Row(0, 10), Row(0, 1000)], WIDE, slow) == (1, 10, LEAST_CHUNK - 10)


def test_before_anything_is_known_chunks_keep_the_gap_of_a_slow_worker() -> None:
    assert grant_tokens([Row(40, 41, GAP), Row(0, 1000)], WIDE) == (1, 64)


def test_a_prompt_may_spend_what_a_stream_has_saved_and_no_more() -> None:
    stream = Stream(tpot_s=0.06, gaps=10, elapsed_s=0.2, left=1)
    assert allowed_seconds(stream, 0.02, 0.03) == pytest.approx(TPOT_MARGIN * 0.06 * 11 - 0.2)
    spent = structs.replace(stream, elapsed_s=0.5)
    assert allowed_seconds(spent, 0.02, 0.03) == pytest.approx(TPOT_MARGIN * 0.06 * 11 - 0.5)


def test_a_stream_that_has_just_begun_lends_what_it_will_save() -> None:
    first = Stream(tpot_s=0.06, left=5)
    assert allowed_seconds(first, 0.02, 0.03) == pytest.approx(TPOT_MARGIN * 0.06 * 5 - 4 * 0.03)
    longer = structs.replace(first, left=1000)
    assert allowed_seconds(longer, 0.02, 0.03) == pytest.approx(TPOT_MARGIN * 0.06 * 17 - 16 * 0.03)
    assert allowed_seconds(longer, 0.02, 0.07) == pytest.approx(TPOT_MARGIN * 0.06), "it could not repay"


def test_a_stream_that_misses_its_tpot_anyway_asks_for_its_gap_alone() -> None:
    lost = Stream(gap_s=0.2, tpot_s=0.06, gaps=10, elapsed_s=2.0, left=20)
    assert allowed_seconds(lost, 0.02, 0.03) == pytest.approx(GAP_MARGIN * 0.2)
    assert allowed_seconds(structs.replace(lost, left=200), 0.02, 0.05) < 0.02, "this one can still catch up"


def test_slack_is_what_the_stream_with_the_least_of_it_has_saved_or_lends() -> None:
    saved = Stream(tpot_s=0.06, gaps=10, elapsed_s=0.2)
    lost = Stream(tpot_s=0.06, gaps=10, elapsed_s=2.0, left=20)
    cost = CostModel(step_s=0.01, token_s=0.0001)
    assert slack_seconds([saved], 0, cost) == pytest.approx(TPOT_MARGIN * 0.6 - 0.2)
    assert slack_seconds([saved, structs.replace(saved, elapsed_s=0.5)], 0, cost) == pytest.approx(0.04)
    assert slack_seconds([structs.replace(saved, elapsed_s=0.59)], 0, cost) == 0.0, "it is behind, and cannot lend"
    lends = slack_seconds([structs.replace(saved, left=100)], 0, cost)
    assert lends is not None and lends > 0.34 + 16 * 0.04
    assert slack_seconds([saved, lost], 0, cost) == slack_seconds([saved], 0, cost), "who is late anyway says nothing"
    assert slack_seconds([lost], 0, cost) == slack_seconds([lost, GAP], 0, cost) == 0.0, "nor makes it room for more"
    for nobody in ([], [GAP]):
        assert slack_seconds(nobody, 0, cost) is None


costs = st.builds(
    lambda step, token, pair, context: CostModel(step_s=step, token_s=token, pair_s=pair, context_s=context),
    st.floats(0, 0.1),
    st.floats(1e-6, 0.01),
    st.sampled_from([0.0, 1e-8, 1e-6]),
    st.sampled_from([0.0, 1e-7, 1e-5]),
)
bounds = st.one_of(st.just(math.inf), st.floats(0.001, 2))
streams = st.builds(
    lambda gap, tpot, gaps, pace, since, left: Stream(
        gap_s=gap, tpot_s=tpot, gaps=gaps, elapsed_s=gaps * pace + since, since_s=since, left=left
    ),
    bounds,
    bounds,
    st.integers(0, 300),
    st.floats(0, 0.3),
    st.floats(0, 0.3),
    st.integers(1, 300),
)
stream_rows = st.builds(lambda done, stream: Row(done, done + 1, stream), st.integers(1, 900), streams)
prompt_rows = st.builds(lambda done, more: Row(done, done + more), st.integers(0, 900), st.integers(2, 900))
some_streams = st.lists(stream_rows, min_size=1, max_size=8)
some_prompts = st.lists(prompt_rows, min_size=1, max_size=6)
some_limits = st.builds(
    lambda chunk, step: BatchLimits(chunk_tokens=chunk, step_tokens=step), st.integers(1, 600), st.integers(1, 600)
)


@given(st.lists(st.one_of(stream_rows, prompt_rows)), some_limits, costs)
def test_limits_hold_and_every_stream_gets_its_token(rows: list[Row], limits: BatchLimits, cost: CostModel) -> None:
    grants = grant_tokens(rows, limits, cost)
    pairs = list(zip(grants, rows, strict=True))
    assert all(0 <= grant <= min(row.behind, limits.chunk_tokens) for grant, row in pairs)
    assert sum(grants) <= limits.step_tokens
    decoding = [grant for grant, row in pairs if row.behind == 1]
    assert sum(decoding) == min(len(decoding), limits.step_tokens)
    wanted = sum(min(row.behind, limits.chunk_tokens) for row in rows if row.behind > 1)
    assert sum(grants) - sum(decoding) >= min(wanted, LEAST_CHUNK, limits.step_tokens - sum(decoding))


@given(st.lists(prompt_rows), some_limits, costs)
def test_without_streams_no_token_of_the_step_is_wasted(rows: list[Row], limits: BatchLimits, cost: CostModel) -> None:
    wanted = sum(min(row.behind, limits.chunk_tokens) for row in rows)
    assert sum(grant_tokens(rows, limits, cost)) == min(wanted, limits.step_tokens)


def prompt_tokens(rows: list[Row], limits: BatchLimits, cost: CostModel) -> int:
    grants = grant_tokens(rows, limits, cost)
    return sum(grant for grant, row in zip(grants, rows, strict=True) if row.behind > 1)


def predicted(decoding: list[Row], prompt: Row, tokens: int, cost: CostModel) -> float:
    part = PrefillPart(tokens, prompt.computed)
    return step_seconds(cost, [part], len(decoding), sum(row.computed for row in decoding))


def allowed(decoding: list[Row], prompt: Row, cost: CostModel) -> float:
    """How long a step of streams and prompts, `prompt` the first, may take."""
    alone = decode_seconds(cost, len(decoding), sum(row.computed for row in decoding))
    least = predicted(decoding, prompt, LEAST_CHUNK, cost)
    return min(allowed_seconds(row.stream, alone, least) for row in decoding if row.stream)


@given(some_streams, some_prompts, costs)
def test_a_step_keeps_every_bound_unless_it_is_the_least(
    decoding: list[Row], prompts: list[Row], cost: CostModel
) -> None:
    rows = [*decoding, *prompts]
    grants = grant_tokens(rows, WIDE, cost)
    context = sum(row.computed for row in decoding)
    given_out = zip(grants[len(decoding) :], prompts, strict=True)
    parts = [PrefillPart(grant, row.computed) for grant, row in given_out if grant]
    seconds = step_seconds(cost, parts, len(decoding), context)
    assert seconds <= allowed(decoding, prompts[0], cost) + 1e-9 or sum(part.new for part in parts) <= LEAST_CHUNK


@given(some_streams, prompt_rows, costs)
def test_a_chunk_is_the_largest_that_keeps_them(decoding: list[Row], prompt: Row, cost: CostModel) -> None:
    tokens = prompt_tokens([*decoding, prompt], WIDE, cost)
    if tokens == min(prompt.behind, WIDE.step_tokens - len(decoding)):
        return
    assert tokens % 16 == 0
    assert predicted(decoding, prompt, tokens + 16, cost) > allowed(decoding, prompt, cost) - 1e-9


@given(some_streams, some_prompts, some_limits, costs, st.floats(0.01, 1))
def test_a_tighter_gap_never_gives_prompts_more(
    decoding: list[Row], prompts: list[Row], limits: BatchLimits, cost: CostModel, factor: float
) -> None:
    tighter = [
        structs.replace(row, stream=structs.replace(row.stream, gap_s=row.stream.gap_s * factor))
        for row in decoding
        if row.stream
    ]
    loose = prompt_tokens([*decoding, *prompts], limits, cost)
    assert prompt_tokens([*tighter, *prompts], limits, cost) <= loose


@given(some_streams, stream_rows, some_prompts, some_limits, costs)
def test_another_stream_never_gives_prompts_more(
    decoding: list[Row], another: Row, prompts: list[Row], limits: BatchLimits, cost: CostModel
) -> None:
    """Bounds by the gap: another stream may be what makes a TPOT impossible, which then binds no longer."""
    rows = [structs.replace(row, stream=Stream(gap_s=row.stream.gap_s)) for row in decoding if row.stream]
    fewer = prompt_tokens([*rows, *prompts], limits, cost)
    assert prompt_tokens([*rows, another, *prompts], limits, cost) <= fewer


@dataclass
class Waiting:
    place: tuple[int, float]
    arrived: float
    tokens: int
    computed: int = 0
    served: float = math.inf


def serve(line: list[Waiting], cost: CostModel, decoding: list[Row]) -> None:
    """Prompts beside streams on a clock of their own, each known from its arrival on, until all are computed."""
    now, left = 0.0, list(line)
    while left:
        here = sorted((one for one in left if one.arrived <= now), key=lambda one: one.place)
        if not here:
            now = min(one.arrived for one in left)
            continue
        rows = [*decoding, *(Row(one.computed, one.tokens + 1) for one in here)]
        grants = grant_tokens(rows, WIDE, cost)[len(decoding) :]
        parts = [PrefillPart(grant, one.computed) for grant, one in zip(grants, here, strict=True) if grant]
        now += step_seconds(cost, parts, len(decoding), sum(row.computed for row in decoding))
        for grant, one in zip(grants, here, strict=True):
            one.computed += grant
            if one.computed >= one.tokens:
                one.served = now
                left.remove(one)


def arrivals(lone: int, seconds: float, every: float, tokens: int) -> list[Waiting]:
    """A prompt of `lone` tokens at 0, then one of `tokens` each `every` seconds; 1 ms of work a token."""
    each = [Waiting((0, 0.0), 0.0, lone)]
    each += [Waiting((0, 0.0), every * index, tokens) for index in range(1, int(seconds / every))]
    for one in each:
        one.place = place_in_line(1, one.tokens * COST.token_s, one.arrived)
    return each


def test_a_long_prompt_beside_endless_short_ones_waits_for_those_of_its_own_duration_only() -> None:
    line = arrivals(lone=1400, seconds=20.0, every=0.16, tokens=150)
    serve(line, COST, [Row(40, 41, GAP)])
    long = line[0]
    assert long.served < 8.0, "it takes 1.4 s of work, and is passed by those that come within 1.3 s"
    passed = [one for one in line[1:] if one.served < long.served and one.place > long.place]
    assert all(AGEING * one.arrived <= 1400 * COST.token_s for one in line[1:] if one.place < long.place)
    assert len(passed) <= 1, "the one that finds room in its last step"
    by_length = arrivals(lone=1400, seconds=20.0, every=0.16, tokens=150)
    for one in by_length:
        one.place = (1, one.tokens * COST.token_s)
    serve(by_length, COST, [Row(40, 41, GAP)])
    assert by_length[0].served > 15.0, "without ageing it waits until no more come"
