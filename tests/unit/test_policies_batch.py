"""How a step's tokens are shared out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bascule.policies.batch import BatchLimits, Pace, Row, grant_tokens

LIMITS = BatchLimits(chunk_tokens=8, step_tokens=20)


def test_streams_come_before_chunks_whatever_the_order_of_arrival() -> None:
    rows = [Row(0, 100), Row(30, 31), Row(0, 100), Row(50, 51)]
    assert grant_tokens(rows, BatchLimits(chunk_tokens=8, step_tokens=9)) == (7, 1, 0, 1)


def test_chunks_go_out_in_order_of_arrival_until_the_step_is_full() -> None:
    assert grant_tokens([Row(0, 100)] * 4, LIMITS) == (8, 8, 4, 0)


def test_a_chunk_ends_where_the_known_tokens_end() -> None:
    assert grant_tokens([Row(95, 100), Row(0, 3)], LIMITS) == (5, 3)


def test_more_streams_than_tokens_leave_the_youngest_out() -> None:
    assert grant_tokens([Row(9, 10)] * 3, BatchLimits(chunk_tokens=8, step_tokens=2)) == (1, 1, 0)


def test_nobody_is_behind_and_nobody_gets_anything() -> None:
    assert grant_tokens([], LIMITS) == ()
    assert grant_tokens([Row(5, 5)], LIMITS) == (0,)


rows_strategy = st.lists(st.builds(lambda done, more: Row(done, done + more), st.integers(0, 99), st.integers(1, 40)))
limits_strategy = st.builds(
    lambda chunk, step: BatchLimits(chunk_tokens=chunk, step_tokens=step), st.integers(1, 30), st.integers(1, 60)
)


@given(rows_strategy, limits_strategy)
def test_limits_hold_and_no_token_of_the_step_is_wasted(rows: list[Row], limits: BatchLimits) -> None:
    grants = grant_tokens(rows, limits)
    wanted = [min(row.behind, limits.chunk_tokens) for row in rows]
    assert all(0 <= grant <= want for grant, want in zip(grants, wanted, strict=True))
    assert sum(grants) == min(sum(wanted), limits.step_tokens)


GAP = BatchLimits(chunk_tokens=512, step_tokens=512, gap_s=0.2)


def test_a_prompt_beside_streams_is_cut_so_that_the_step_keeps_the_gap() -> None:
    pace = Pace(stream_step_s=0.02, token_s=0.001)  # 0.8 * 0.2 s less 0.02 s are 140 tokens
    assert grant_tokens([Row(40, 41), Row(0, 1000)], GAP, pace) == (1, 128)
    assert grant_tokens([Row(40, 41), Row(0, 100), Row(0, 1000)], GAP, pace) == (1, 100, 28)
    assert grant_tokens([Row(0, 1000)], GAP, pace) == (512,)
    assert grant_tokens([Row(40, 41), Row(0, 1000)], BatchLimits(chunk_tokens=512, step_tokens=512), pace) == (1, 511)


def test_prompts_go_on_where_streams_alone_take_longer_than_the_gap() -> None:
    assert grant_tokens([Row(40, 41), Row(0, 1000)], GAP, Pace(stream_step_s=0.5, token_s=0.001)) == (1, 32)


def test_an_unknown_pace_cuts_nothing() -> None:
    assert grant_tokens([Row(40, 41), Row(0, 1000)], GAP, Pace()) == (1, 511)
    assert grant_tokens([Row(40, 41), Row(0, 1000)], GAP, Pace(stream_step_s=0.1)) == (1, 511)


def test_the_pace_is_learned_from_steps_alone_and_together() -> None:
    pace = Pace()
    for _ in range(60):
        pace = pace.after(prompt_tokens=200, streams=0, seconds=0.2)
        pace = pace.after(prompt_tokens=0, streams=4, seconds=0.03)
        pace = pace.after(prompt_tokens=100, streams=4, seconds=0.13)
        pace = pace.after(prompt_tokens=5, streams=4, seconds=9.0)  # too few to tell
    assert abs(pace.stream_step_s - 0.03) < 1e-6 if pace.stream_step_s is not None else False
    assert abs(pace.token_s - 0.001) < 1e-6 if pace.token_s is not None else False


def test_one_stopped_step_does_not_make_a_worker_slow() -> None:
    pace = Pace(stream_step_s=0.02, token_s=0.001).after(0, 3, 60.0).after(100, 3, 60.0)
    assert pace.prompt_tokens(GAP) >= 96


@given(
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 64), st.floats(0, 100)), max_size=30),
    rows_strategy,
    st.floats(0, 5),
)
def test_whatever_was_learned_streams_run_and_prompts_go_on(
    steps: list[tuple[int, int, float]], rows: list[Row], gap: float
) -> None:
    pace = Pace()
    for prompt_tokens, streams, seconds in steps:
        pace = pace.after(prompt_tokens, streams, seconds)
    grants = grant_tokens(rows, BatchLimits(chunk_tokens=512, step_tokens=512, gap_s=gap), pace)
    assert all(grant == 1 for grant, row in zip(grants, rows, strict=True) if row.behind == 1)
    prompts = [(grant, row.behind) for grant, row in zip(grants, rows, strict=True) if row.behind > 1]
    assert sum(grant for grant, _ in prompts) >= min(sum(behind for _, behind in prompts), 32)


def test_a_slow_moment_of_streams_does_not_starve_prompts_for_good() -> None:
    pace = Pace(stream_step_s=0.18, token_s=0.001)  # as after a stopped process; streams are back at 0.02 s
    for _ in range(3000):
        tokens = pace.prompt_tokens(GAP)
        pace = pace.after(tokens, 4, 0.02 + 0.001 * tokens)
    assert pace.prompt_tokens(GAP) >= 96


def test_no_pace_is_too_fast_to_reckon_with() -> None:
    assert Pace(stream_step_s=0.01, token_s=1e-300).prompt_tokens(GAP) == 512
    assert Pace(stream_step_s=9.0, token_s=1e-300).prompt_tokens(GAP) == 32
