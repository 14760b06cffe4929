"""The columns count what was placed until workers have it, and rows are used again without a trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.policies.snapshot import SIZES, Snapshot, size_of
from bascule.router.columns import SHARE_S, Columns
from bascule.types import CostModel, Role, StepLoad, WorkerId


def join(columns: Columns, row: int, name: str = "a") -> None:
    columns.add(row, WorkerId(name), Role.MIXED, slots=4, kv_tokens=1000, machine=1, hands_off=True)


def snapshot(columns: Columns, now: float = 0.0) -> Snapshot:
    return columns.snapshot(now, 0, {}, 4096)


def one() -> Columns:
    columns = Columns(2)
    join(columns, 0)
    return columns


def backlog(columns: Columns) -> float:
    return float(snapshot(columns).ahead_tokens[0, -1])


def test_a_row_is_used_again_without_a_trace_of_who_had_it() -> None:
    used, fresh = one(), one()
    used.cost.put(0, CostModel(step_s=1.0))
    used.submitted(0, 100, 1.0, 0.0)
    used.decoding[0] += 1
    used.context_tokens[0] += 10
    used.report(0, StepLoad(0, 1, 50, 3, 30))
    used.remove(0)
    assert not snapshot(used).placeable[0]
    assert snapshot(used).ids[0] == ""
    join(used, 0)
    for name in Snapshot.__struct_fields__:
        mine, theirs = getattr(snapshot(used), name), getattr(snapshot(fresh), name)
        if isinstance(mine, np.ndarray):
            assert mine.tolist() == theirs.tolist(), name
    assert used.cost.step_s[0] == 0.0
    assert used.sent(0) == 0


def test_columns_grow_and_keep_what_they_hold() -> None:
    columns = one()
    columns.cost.put(0, CostModel(step_s=0.5))
    columns.submitted(0, 100, 2.0, 1.0)
    columns.streams[0] = 3
    join(columns, 9, "far")
    grown = snapshot(columns, now=1.0)
    assert (grown.ids[0], grown.ids[9]) == ("a", "far")
    assert (grown.prefilling[0], grown.streams[0], grown.ahead_tokens[0, -1]) == (1, 3, 100)
    assert grown.cost.step_s[0] == 0.5
    assert grown.prefill_share[0] == pytest.approx(2.0 / SHARE_S)
    assert [bool(placeable) for placeable in grown.placeable] == [row in (0, 9) for row in range(len(grown.ids))]


def test_what_is_on_its_way_to_a_worker_counts_until_it_reports_it_and_then_not_twice() -> None:
    columns = one()
    columns.submitted(0, 100, 0.0, 0.0)
    assert backlog(columns) == 100
    columns.report(0, StepLoad(1, 1, 60, 0, 0))
    assert backlog(columns) == 60
    columns.submitted(0, 40, 0.0, 0.0)
    assert backlog(columns) == 100
    columns.report(0, StepLoad(1, 1, 20, 0, 0))
    assert backlog(columns) == 60
    columns.report(0, StepLoad(2, 2, 50, 0, 0))
    assert backlog(columns) == 50
    columns.computed(0, 100)
    columns.report(0, StepLoad(2, 1, 10, 0, 0))
    assert backlog(columns) == 10
    columns.computed(0, 40)
    assert backlog(columns) == 0
    assert snapshot(columns).prefilling[0] == 0


def test_a_worker_that_has_not_reported_is_taken_to_have_done_nothing() -> None:
    columns = one()
    columns.submitted(0, 100, 0.0, 0.0)
    columns.submitted(0, 50, 0.0, 0.0)
    columns.computed(0, 50)
    assert backlog(columns) == 100


def test_what_is_done_is_taken_off_short_prompts_first() -> None:
    columns = one()
    for tokens in (1000, 10, 100):
        columns.submitted(0, tokens, 0.0, 0.0)
    columns.report(0, StepLoad(3, 3, 1050, 0, 0))
    ahead = snapshot(columns).ahead_tokens[0]
    assert [ahead[size_of(tokens)] for tokens in (10, 100, 1000)] == [0, 50, 1050]


def test_longer_prompts_are_counted_by_size() -> None:
    columns = one()
    for tokens in (1000, 1000, 10):
        columns.submitted(0, tokens, 0.0, 0.0)
    behind = snapshot(columns).prompts_behind[0]
    assert [behind[size_of(tokens)] for tokens in (1, 10, 500, 1000, 10**6)] == [3, 2, 2, 0, 0]
    columns.computed(0, 1000)
    assert snapshot(columns).prompts_behind[0, 0] == 2


def test_sizes_double_and_the_last_takes_the_rest() -> None:
    assert [size_of(tokens) for tokens in (0, 1, 2, 3, 4, 65_535, 65_536, 10**9)] == [0, 0, 1, 1, 2, 15, 15, 15]
    assert SIZES == 16


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=12), st.integers(0, 12), st.integers(0, 20_000))
def test_a_backlog_is_never_negative_nor_more_than_was_placed(prompts: list[int], received: int, left: int) -> None:
    columns = one()
    for tokens in prompts:
        columns.submitted(0, tokens, 0.0, 0.0)
    received = min(received, len(prompts))
    columns.report(0, StepLoad(received, 0, left, 0, 0))
    ahead = snapshot(columns).ahead_tokens[0]
    assert np.all(np.diff(ahead) >= 0)
    assert ahead[0] >= 0
    assert ahead[-1] == min(sum(prompts), left + sum(prompts[received:]))
    for tokens in prompts:
        columns.computed(0, tokens)
    state = snapshot(columns)
    assert not state.ahead_tokens.any()
    assert not state.prompts_behind.any()


def test_the_share_of_prompts_fades_when_none_come_and_is_never_all() -> None:
    columns = one()
    columns.submitted(0, 100, 2.0, 0.0)
    assert snapshot(columns, 0.0).prefill_share[0] == pytest.approx(0.2)
    assert snapshot(columns, SHARE_S).prefill_share[0] == pytest.approx(0.2 / np.e)
    assert snapshot(columns, SHARE_S / 2).prefill_share[0] == pytest.approx(0.2 / np.e)
    columns.submitted(0, 100, 1e6, SHARE_S)
    assert snapshot(columns, SHARE_S).prefill_share[0] == pytest.approx(0.9)


def test_prompts_that_come_in_one_moment_stretch_what_is_predicted_in_that_moment() -> None:
    columns = one()
    for count in range(1, 6):
        columns.submitted(0, 100, SHARE_S / 10, 0.0)
        assert snapshot(columns).stretch[0] == pytest.approx(1 / (1 - 0.1 * count))


def stepped(columns: Columns, at: float, took: float, steps: int, alone_s: float = 0.01) -> float:
    """Steps of one stream, one after another from `at` on; returns when the last is over."""
    for _ in range(steps):
        columns.report(0, StepLoad(0, 0, 0, 1, 100))
        columns.stepped(0, alone_s, at)
        at += took
    return at


def test_steps_that_take_longer_than_their_streams_stretch_what_is_predicted_and_are_forgotten_when_idle() -> None:
    columns = one()
    at = stepped(columns, 0.0, 0.04, 400)
    assert 2.0 < snapshot(columns, at).stretch[0] < 4.1
    assert snapshot(columns, at + 3.0).stretch[0] == pytest.approx(1.0)


def test_late_first_tokens_count_for_prompts_of_their_kind_and_fade() -> None:
    columns = one()
    for _ in range(50):
        columns.arrived(0, chunked=False, queue_s=0.0, own_s=0.1, actual_s=0.3)
        columns.arrived(0, chunked=True, queue_s=0.0, own_s=0.0, actual_s=9.0)
    now = snapshot(columns, 1.0).lag[0]
    assert 2.0 < now[0] <= 8.0
    assert now[1:].tolist() == [1.0, 1.0]
    assert snapshot(columns, 400.0).lag[0, 0] == pytest.approx(1.0, abs=0.01)


def test_what_a_queue_took_longer_is_not_taken_for_the_prompts_own() -> None:
    columns = one()
    for _ in range(50):
        columns.arrived(0, chunked=False, queue_s=0.3, own_s=0.1, actual_s=1.0)
        columns.arrived(0, chunked=False, queue_s=0.1, own_s=0.1, actual_s=1.0)
        columns.arrived(0, chunked=True, queue_s=0.1, own_s=1.0, actual_s=1.6)
    short, long, queue = snapshot(columns, 1.0).lag[0].tolist()
    assert (short, long > 1.3, 2.0 < queue <= 8.0) == (1.0, True, True)


def test_streams_without_a_bound_let_prompts_take_what_they_want() -> None:
    columns = one()
    assert snapshot(columns, 0.0).slack_s[0] == math.inf
    columns.report(0, StepLoad(0, 0, 0, 2, 100, 0.25))
    assert snapshot(columns, 0.0).slack_s[0] == 0.25
    columns.report(0, StepLoad(0, 0, 0, 0, 0, None))
    assert snapshot(columns, 0.0).slack_s[0] == math.inf


def test_nothing_is_on_its_way_to_a_worker_that_owes_no_first_token() -> None:
    columns = one()
    for _ in range(100):
        columns.submitted(0, 20, 0.0, 0.0)
        columns.computed(0, 20)
    columns.submitted(0, 50, 0.0, 0.0)
    assert backlog(columns) == 50
    assert len(columns._unreceived[0]) == 1


def test_the_step_that_runs_is_as_old_as_the_last_report_or_the_work_that_woke_the_worker() -> None:
    columns = one()

    def age(now: float) -> float:
        return float(snapshot(columns, now).step_age_s[0])

    assert age(5.0) == 0.0
    columns.submitted(0, 100, 1.0, 6.0)
    columns.submitted(0, 100, 1.0, 6.1)
    assert age(6.25) == pytest.approx(0.25)
    columns.stepped(0, 0.01, 6.5)
    columns.report(0, StepLoad(2, 1, 100, 1, 100))
    assert age(6.6) == pytest.approx(0.1)
    columns.stepped(0, 0.01, 7.0)
    columns.report(0, StepLoad(2, 0, 0, 0, 0))
    assert age(8.0) == 0.0, "it has nothing to do any more"


def test_steps_that_are_told_together_leave_what_steps_told_one_by_one_leave() -> None:
    alone = [0.01, 0.0101, 0.0102, 0.0103, 0.0104]
    ends = np.cumsum(alone)
    load = StepLoad(0, 0, 0, 1, 100)
    one_by_one, together = one(), one()
    for columns in (one_by_one, together):
        columns.report(0, load)
        columns.stepped(0, 0.005, 0.0)
        columns.stepped(0, alone[0], 0.02)
    for at in range(4):
        one_by_one.stepped(0, alone[at + 1], 0.02 + float(ends[at]))
    together.streamed(np.array([0]), np.array([4.0]), ends[3:4], np.array(alone[4:]), 0.02 + ends[3:4])
    for columns in (one_by_one, together):
        columns.stepped(0, 0.01, 0.09)
    was, says = snapshot(one_by_one, 0.095), snapshot(together, 0.095)
    assert says.step_age_s[0] == pytest.approx(was.step_age_s[0])
    assert says.stretch[0] == pytest.approx(was.stretch[0], rel=1e-4) != pytest.approx(1.0, rel=1e-2)
