"""How a step's tokens are shared out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bascule.policies.batch import BatchLimits, Row, grant_tokens

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
