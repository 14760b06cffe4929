"""A step that never ends is noticed, and ends the worker; one that is slow, or was stopped with its process, is not."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from engine_rig import CARD, Rig, greedy, work

from bascule.clock import VirtualClock
from bascule.engine.mock import MockRunner
from bascule.engine.protocol import Sampled, Slice
from bascule.engine.work import UnderWay
from bascule.types import CostModel
from bascule.worker.steploop import LOOK_S, StepLoop, StepWatch, patience_s


@pytest.mark.parametrize(
    ("steps", "expected_s", "patience"),
    [(1000, 0.0, 30.0), (1000, 1.0, 30.0), (1000, 4.0, 80.0), (0, 1.0, 300.0), (15, 1.0, 300.0), (3, 20.0, 400.0)],
    ids=["unknown", "short", "long", "first", "early", "early and long"],
)
def test_a_step_may_take_far_longer_than_expected_and_the_first_ones_longer(
    steps: int, expected_s: float, patience: float
) -> None:
    assert patience_s(UnderWay(steps, 1, expected_s)) == patience


def test_only_one_and_the_same_step_grows_older() -> None:
    watch, now, ages = StepWatch(), 100.0, []
    for number in (None, 5, 5, 5, 6, 6, None, 6):
        ages.append(watch.look(None if number is None else UnderWay(number, 1, 0.0), now))
        now += LOOK_S
    assert ages == [0, 0, LOOK_S, 2 * LOOK_S, 0, LOOK_S, 0, 0]


def test_time_in_which_the_whole_process_was_stopped_does_not_count() -> None:
    watch, step = StepWatch(), UnderWay(5, 1, 0.0)
    watch.look(step, 0.0)
    assert watch.look(step, 3600.0) == 2 * LOOK_S
    assert watch.look(step, 3600.0 + LOOK_S) == 3 * LOOK_S


class HangingRunner(MockRunner):
    """Computes nothing before it is let go."""

    def __init__(self, cost: CostModel) -> None:
        super().__init__(CARD, cost, lambda _: None)
        self.begun, self.let_go = threading.Event(), threading.Event()

    def execute(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        self.begun.set()
        assert self.let_go.wait(20)
        return super().execute(batch)


def test_a_step_that_hangs_is_told_of_once_its_patience_is_over(caplog: pytest.LogCaptureFixture) -> None:
    cost, clock, hung, ended = CostModel(step_s=0.5, token_s=0.25), VirtualClock(), [], threading.Event()
    runner = HangingRunner(cost)
    rig = Rig(runner=runner, cost=cost)
    loop = StepLoop(rig.engine, lambda _: ended.set(), lambda _: None, on_hang=lambda: hung.append(1), clock=clock)
    assert rig.engine.under_way() is None
    rig.engine.submit(work("a", range(10), greedy(1)))
    loop.start()
    assert runner.begun.wait(20)
    assert rig.engine.under_way() == UnderWay(0, 1, pytest.approx(3.0))

    def look(seconds: float) -> None:
        for _ in range(round(seconds / LOOK_S)):
            loop.watch()
            clock.advance(LOOK_S)

    look(300.0)
    assert hung == []
    look(2 * LOOK_S)
    assert len(hung) == 1
    assert "1 sequence(s) has run for 300 s, and was expected to take 3 s: it hangs" in caplog.text
    runner.let_go.set()
    assert ended.wait(20)
    loop.stop(20.0)
    hung.clear()
    look(1000.0)
    assert hung == [] and rig.engine.under_way() is None


def test_a_step_that_fails_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def broken(batch: Sequence[Slice]) -> list[Sampled | None]:
        raise RuntimeError("out of order")

    monkeypatch.setattr(rig.runner, "execute", broken)
    rig.engine.submit(work("a", range(10), greedy(1)))
    rig.step()
    assert rig.failed and rig.engine.under_way() is None
