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
    assert line.work_s == pytest.approx(1.5)
    line.remove(flights[0])
    line.remove(flights[0])
    assert flights[0] not in line
    assert flights[1] in line
    assert line.work_s == pytest.approx(1.0)
    assert drained(line) == "bc"
    assert line.work_s == 0.0


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
