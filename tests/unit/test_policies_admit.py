"""Who is taken, in what order they wait, and who had better come back later."""

from __future__ import annotations

import pytest
from tests.unit.routing_rig import Cluster

from bascule.policies.admit import has_room, worth_starting, worth_waiting
from bascule.policies.order import place_in_line
from bascule.policies.predict import predict
from bascule.policies.route import adaptive
from bascule.policies.snapshot import Candidate
from bascule.types import Role, Slo


def in_order(*keys: tuple[int, float]) -> bool:
    return list(keys) == sorted(keys)


def test_the_shortest_prompt_goes_first() -> None:
    assert in_order(place_in_line(0, 0.1, due_s=10.0), place_in_line(0, 2.0, due_s=10.0))


def test_a_long_prompt_is_passed_only_by_short_ones_that_come_soon_after_it() -> None:
    long = place_in_line(0, 2.0, due_s=10.0)
    assert place_in_line(0, 0.1, due_s=11.0) < long
    assert place_in_line(0, 0.1, due_s=12.5) > long


def test_of_equal_work_the_one_that_is_due_sooner_goes_first_and_priority_goes_before_all() -> None:
    assert in_order(place_in_line(0, 1.0, 5.0), place_in_line(0, 1.0, 6.0))
    assert in_order(place_in_line(-1, 100.0, 100.0), place_in_line(0, 0.0, 0.0), place_in_line(1, 0.0, 0.0))


def chosen(cluster: Cluster, tokens: int, slo: Slo) -> Candidate:
    candidate = adaptive(cluster.snapshot(), cluster.query(tokens, slo=slo)).chosen()
    assert candidate is not None
    return candidate


def test_a_request_that_will_meet_its_bounds_is_started() -> None:
    cluster = Cluster()
    cluster.add("a")
    for slo in (Slo(), Slo(1.0, 0.05)):
        assert worth_starting(cluster.snapshot(), cluster.query(slo=slo), chosen(cluster, 100, slo)).admitted


def test_one_that_will_not_is_told_which_bound_and_when_to_come_again() -> None:
    cluster = Cluster()
    cluster.add("a", prompts=(200,))
    slo = Slo(0.01, 0.05)
    verdict = worth_starting(cluster.snapshot(), cluster.query(slo=slo), chosen(cluster, 100, slo))
    assert not verdict.admitted
    assert "TTFT" in verdict.reason
    assert verdict.retry_after_s >= 1.0


def test_a_bound_on_gaps_alone_turns_nobody_away() -> None:
    cluster = Cluster()
    cluster.add("a", streams=(10,))
    slo = Slo(gap_s=1e-4)
    assert worth_starting(cluster.snapshot(), cluster.query(slo=slo), chosen(cluster, 100, slo)).admitted


@pytest.mark.parametrize(("queued_s", "admitted"), [(0.0, True), (1.0, True), (8.0, False)])
def test_waiting_is_worth_it_while_what_is_ahead_is_done_in_time_by_all_workers(
    queued_s: float, admitted: bool
) -> None:
    cluster = Cluster()
    for name in "abcd":
        cluster.add(name)
    assert worth_waiting(cluster.snapshot(), cluster.query(slo=Slo(1.0)), queued_s).admitted == admitted


def test_the_pace_that_was_seen_counts_more_than_the_number_of_workers() -> None:
    cluster = Cluster()
    for name in "abcd":
        cluster.add(name)
    snapshot, query = cluster.snapshot(), cluster.query(slo=Slo(1.0))
    assert worth_waiting(snapshot, query, 1.0, pace=4.0).admitted
    verdict = worth_waiting(snapshot, query, 1.0, pace=0.5)
    assert "TTFT 2" in verdict.reason and verdict.retry_after_s >= 1.0


def test_where_no_worker_takes_another_stream_waiting_is_for_streams_to_end() -> None:
    cluster = Cluster()
    for name in "ab":
        cluster.add(name, slots=2, streams=(200, 200))
    snapshot, query = cluster.snapshot(), cluster.query(slo=Slo(1.0))
    output_s = query.output_tokens * float(predict(snapshot, query)[1].tpot_s[0])
    for ahead in (0, 3, 40):
        verdict = worth_waiting(snapshot, query, 0.0, ahead=ahead)
        assert verdict.admitted == ((ahead + 1) * output_s / 4 + 0.05 < 0.8), "four streams, one of them ends at a time"
    assert not verdict.admitted
    cluster.add("c", slots=2, streams=(200,))
    assert worth_waiting(cluster.snapshot(), cluster.query(slo=Slo(1.0)), 0.0, ahead=40).admitted


def test_what_a_request_has_waited_already_counts() -> None:
    cluster = Cluster()
    cluster.add("a")
    assert worth_waiting(cluster.snapshot(), cluster.query(slo=Slo(1.0)), 0.0).admitted
    verdict = worth_waiting(cluster.snapshot(), cluster.query(slo=Slo(1.0), waited_s=3.0), 0.0)
    assert "TTFT" in verdict.reason
    assert verdict.retry_after_s > 1.0


def test_waiting_for_streams_that_are_too_slow_is_not_worth_it() -> None:
    cluster = Cluster()
    cluster.add("a", Role.DECODE, streams=(500,) * 40)
    verdict = worth_waiting(cluster.snapshot(), cluster.query(slo=Slo(tpot_s=0.01)), 0.0)
    assert "TPOT" in verdict.reason


def test_nobody_is_turned_away_for_a_cluster_without_workers_or_with_one_role_only() -> None:
    cluster = Cluster()
    cluster.add("a", placeable=False)
    assert worth_waiting(cluster.snapshot(), cluster.query(slo=Slo(1.0)), 0.0).admitted
    cluster.add("p", Role.PREFILL)
    assert worth_waiting(cluster.snapshot(), cluster.query(slo=Slo(1.0)), 0.0).admitted


def test_an_idle_attached_server_is_given_what_its_guessed_cost_would_refuse() -> None:
    cluster = Cluster()
    row = cluster.add("attached-0", hands_off=False)
    slo = Slo(0.01)
    candidate = chosen(cluster, 3000, slo)
    assert worth_starting(cluster.snapshot(), cluster.query(3000, slo=slo), candidate).admitted
    cluster.columns.decoding[row] = 1
    assert not worth_starting(cluster.snapshot(), cluster.query(3000, slo=slo), candidate).admitted


def test_one_stream_more_waits_where_it_would_break_the_usual_tpot_and_only_there() -> None:
    usual = Slo(tpot_s=0.02)
    crowded, alone = Cluster(), Cluster()
    crowded.add("a", streams=(500,) * 12)
    alone.add("a")
    for cluster, room in ((crowded, False), (alone, True)):
        query = cluster.query(slo=usual)
        assert has_room(cluster.snapshot(), query, chosen(cluster, 100, usual), usual) is room


def test_who_asks_for_a_tighter_tpot_than_usual_holds_nobody_up() -> None:
    cluster = Cluster()
    cluster.add("a", streams=(500,))
    tight = Slo(tpot_s=0.00655)
    candidate = chosen(cluster, 100, tight)
    assert candidate.predicted.tpot_s > tight.tpot_s
    assert has_room(cluster.snapshot(), cluster.query(slo=tight), candidate, Slo(tpot_s=0.06))
    assert not has_room(cluster.snapshot(), cluster.query(slo=tight), candidate, tight)


def test_where_not_even_a_lone_stream_could_keep_the_bound_waiting_is_no_use() -> None:
    cluster = Cluster()
    cluster.add("a", streams=(500,) * 12)
    slo = Slo(tpot_s=0.001)
    assert has_room(cluster.snapshot(), cluster.query(slo=slo), chosen(cluster, 100, slo), slo)
