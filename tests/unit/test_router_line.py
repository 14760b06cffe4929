"""Requests wait in the order of their keys, and may leave from anywhere."""

from __future__ import annotations

import pytest

from bascule.policies.order import place_in_line
from bascule.router.flight import Flight
from bascule.router.line import FIRST, Line
from bascule.types import Request, RequestId, SamplingParams


def flight(name: str) -> Flight:
    request = Request(id=RequestId(name), prompt=(1,), sampling=SamplingParams(max_tokens=1), timeout=9.0)
    return Flight(request, 0.0, 9.0, lambda flight: None)


def drained(line: Line) -> str:
    names = ""
    while (head := line.head()) is not None:
        names += head.request.id
        line.remove(head)
    return names


def test_the_smallest_key_is_at_the_head_and_equal_ones_keep_their_order() -> None:
    line = Line()
    for name, key in (("a", 2.0), ("b", 1.0), ("c", 2.0), ("d", 1.0)):
        line.push(flight(name), (0, key), 0.0)
    assert len(line) == 4
    assert drained(line) == "bdac"
    assert len(line) == 0


def test_what_was_placed_before_goes_before_all_others_whatever_their_priority() -> None:
    line = Line()
    line.push(flight("a"), place_in_line(-1000, 0.0, 0.0), 0.0)
    line.push(flight("b"), FIRST, 0.0)
    assert drained(line) == "ba"


def test_requests_leave_from_anywhere_and_take_their_work_with_them() -> None:
    line, flights = Line(), [flight(name) for name in "abc"]
    for at, each in enumerate(flights):
        line.push(each, (0, at), 0.5)
    assert line.ahead_s(flights[2]) == pytest.approx(1.0)
    assert line.others_s(flights[2]) == line.others_s(flights[0]) == pytest.approx(1.0)
    line.remove(flights[0])
    line.remove(flights[0])
    assert flights[0] not in line
    assert flights[1] in line
    assert line.ahead_s(flights[2]) == pytest.approx(0.5)
    assert (line.others_s(flights[2]), line.others_s(flights[0])) == pytest.approx((0.5, 1.0)), "one that waits no more"
    assert drained(line) == "bc"
    assert line.others_s(flights[1]) == 0.0


def test_only_those_that_go_first_are_ahead_and_who_is_moved_back_is_not() -> None:
    line, early, late = Line(), flight("early"), flight("late")
    line.push(early, (0, 1.0), 0.5)
    line.push(late, (0, 2.0), 0.25)
    assert (line.ahead_s(early), line.ahead_s(late)) == (0.0, 0.5)
    line.demote(early, 10.0)
    assert (line.ahead_s(early), line.ahead_s(late)) == (0.25, 0.0)


def test_among_those_that_wait_are_all_but_those_of_lower_priority() -> None:
    line, early, late, low = Line(), flight("early"), flight("late"), flight("low")
    for each, key, work_s in ((early, (0, 1.0), 0.5), (late, (0, 2.0), 0.25), (low, (1, 0.0), 1.0)):
        line.push(each, key, work_s)
    assert (line.among_s(early), line.among_s(late), line.among_s(low)) == (0.25, 0.5, 0.75)


def waiting(count: int, work_s: float) -> tuple[Line, list[Flight]]:
    line, flights = Line(), [flight(f"r{number}") for number in range(count)]
    for at, each in enumerate(flights):
        line.push(each, (0, at), work_s)
    return line, flights


def test_the_pace_is_what_was_placed_while_others_had_to_wait() -> None:
    line, flights = waiting(30, work_s=0.2)
    for number in range(20):
        line.place(flights[number], now=0.1 * number)
    assert line.pace(now=1.9) == pytest.approx(2.0)
    assert line.pace(now=3.8) == pytest.approx(1.0), "a line that stands still has a slower pace"


def test_nothing_is_said_of_the_pace_where_nobody_had_to_wait_or_too_few_went() -> None:
    line, flights = waiting(8, work_s=0.2)
    for number, each in enumerate(flights):
        line.place(each, now=0.1 * number)
    assert line.pace(now=1.0) is None
    for number in range(40):
        line.push(each := flight(f"alone{number}"), (0, 0.0), 0.2)
        line.place(each, now=100.0 + number)
    assert line.pace(now=200.0) is None
    work = waiting(30, work_s=0.0)
    for number, each in enumerate(work[1]):
        work[0].place(each, now=0.1 * number)
    assert work[0].pace(now=3.0) is None


def test_one_that_left_may_come_back_elsewhere() -> None:
    line, first, second = Line(), flight("a"), flight("b")
    line.push(first, (0, 1.0), 0.1)
    line.push(second, (0, 2.0), 0.1)
    line.remove(first)
    line.push(first, (0, 3.0), 0.1)
    assert drained(line) == "ba"
    assert line.head() is None
    assert "a" not in line


def test_those_that_left_are_not_kept_though_nobody_comes_to_the_head() -> None:
    line = Line()
    line.push(flight("first"), (0, 0.0), 0.0)
    for number in range(1000):
        refused = flight(f"r{number}")
        line.push(refused, (0, 1.0 + number), 0.0)
        line.remove(refused)
    assert len(line._heap) < 100
    assert drained(line) == "first"


def test_a_late_one_is_moved_back_once() -> None:
    line, late = Line(), flight("a")
    line.push(late, (0, 1.0), 0.0)
    line.push(flight("b"), (0, 2.0), 0.0)
    assert line.demote(late, 5.0)
    assert not line.demote(late, 5.0)
    assert not line.demote(flight("elsewhere"), 5.0)
    assert len(line) == 2
    assert drained(line) == "ba"
