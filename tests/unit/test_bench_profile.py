"""What `bascule profile` makes of measured steps: turns, the fit, its residuals, and what it says of poor ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from bascule.bench.profile import cells_of, doubts, fitted, in_turns, kind_of, residuals
from bascule.bench.profile_target import Ready
from bascule.engine.mock import MockRunner, mock_card
from bascule.kv.arena import Arena
from bascule.policies.cost import PrefillPart, decode_seconds, step_seconds
from bascule.types import CostModel
from bascule.worker.profile import Cell, step_time

TRUE = CostModel(
    step_s=0.004, token_s=0.001, pair_s=5e-7, context_s=1e-5, draw_s=0.0005, stream_s=(0.005, 0.006, 0.008, 0.011)
)
BLOCKS = 2400
CARD = mock_card(context=8192, vocab=1000)


def ready(*, blocks: int = BLOCKS, context: int = 8192, sequences: int = 64, chunk: int = 512) -> Ready:
    card = mock_card(context=context, vocab=1000)
    return Ready(
        card=card, blocks=blocks, max_sequences=sequences, chunk_tokens=chunk, step_tokens=512, weights=0, resident=0
    )


class Device:
    """A mock on a clock of its own; the step of number n takes `factor(n, cell)` times what `TRUE` says."""

    def __init__(self, factor: Callable[[int, Cell], float] = lambda number, cell: 1.0) -> None:
        self.seconds = 0.0
        self.cells: list[Cell] = []
        self._factor = factor
        self._runner = MockRunner(CARD, TRUE, self._sleep)
        self._runner.bind(Arena.create(CARD.layout, BLOCKS))

    def step(self, cell: Cell) -> float:
        self.cells.append(cell)
        return step_time(self._runner, cell, lambda: self.seconds)

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds * self._factor(len(self.cells), self.cells[-1])


def ignored(*told: object) -> None: ...


@pytest.mark.parametrize("quick", [True, False])
def test_the_model_is_found_and_the_residuals_say_so(quick: bool) -> None:
    taken = in_turns(cells_of(ready(), quick=quick), 1, Device().step, ignored)
    cost, steps = fitted(taken)
    for parts in ([PrefillPart(512, 0)], [PrefillPart(100, 3000)]):
        assert step_seconds(cost, parts, 4, 2000) == pytest.approx(step_seconds(TRUE, parts, 4, 2000), rel=0.05)
    for streams in (1, 8, 32):
        assert decode_seconds(cost, streams, 5000) == pytest.approx(decode_seconds(TRUE, streams, 5000), rel=0.05)
    errors = residuals(steps)
    assert [error.kind for error in errors] == ["prefill", "cached prefix", "decode", "mixed"]
    assert max(error.worst for error in errors) < 0.05
    assert doubts(errors) == []


def test_steps_are_measured_in_turns_and_the_first_time_does_not_count() -> None:
    device = Device(lambda number, cell: 100.0 if number <= len(cells) else 1.0)
    cells = cells_of(ready(), quick=True)
    taken = in_turns(cells, 3, device.step, ignored)
    assert all(len(found) >= 3 for found in taken.values())
    turns = [cell for cell, after in pairwise([*device.cells, None]) if cell != after]
    ends = cells[::-1] + cells + cells[::-1] + cells
    assert turns == [cell for cell, after in pairwise([*ends, None]) if cell != after]
    cost, steps = fitted(taken)
    assert max(step.most_s for step in steps) < 5.0
    assert cost.token_s == pytest.approx(TRUE.token_s, rel=0.05)


def test_a_machine_that_is_disturbed_now_and_then_is_measured_all_the_same() -> None:
    taken = in_turns(
        cells_of(ready(), quick=False), 5, Device(lambda number, cell: 4.0 if number % 7 == 0 else 1.0).step, ignored
    )
    cost, steps = fitted(taken)
    assert cost.token_s == pytest.approx(TRUE.token_s, rel=0.05)
    assert max(step.most_s / step.measured_s for step in steps) > 3


def test_a_poor_fit_is_told_with_the_kind_of_step_and_by_how_much() -> None:
    """A device on which long contexts come with a cliff that no term of the model has."""
    device = Device(lambda number, cell: 6.0 if cell.streams and not cell.new and cell.context == 1024 else 1.0)
    _, steps = fitted(in_turns(cells_of(ready(), quick=True), 1, device.step, ignored))
    told = doubts(residuals(steps))
    assert len(told) >= 1 and any(line.startswith("the fit of decode steps is poor: off by") for line in told)
    assert any("streams of" in line or "stream of" in line for line in told)


def test_kinds_of_steps_that_had_no_room_are_told() -> None:
    _, steps = fitted(in_turns([Cell(64), Cell(16)], 1, Device(lambda *_: 1.0).step, ignored))
    told = doubts(residuals(steps))
    assert [line.partition(" step was measured")[0] for line in told] == ["no cached prefix", "no decode", "no mixed"]


def test_only_steps_that_a_worker_could_have_are_taken() -> None:
    small = ready(blocks=40, context=600, sequences=4, chunk=128)
    found = cells_of(small, quick=False)
    for cell in found:
        assert cell.new <= 128 and cell.streams <= 4 and cell.new + cell.behind <= 600
        assert cell.tokens(16) <= 40 * 16
    assert {kind_of(cell) for cell in found} == {"prefill", "cached prefix", "decode", "mixed"}
    assert len(found) < len(cells_of(ready(), quick=False))


def test_the_estimate_of_what_is_left_is_about_right_once_all_was_measured_once() -> None:
    device, told = Device(), []
    in_turns(cells_of(ready(), quick=True), 3, device.step, lambda *news: told.append((device.seconds, *news[1:])))
    for at, spent, left in told[len(told) // 3 :]:
        assert spent == pytest.approx(at)
        assert spent + left == pytest.approx(device.seconds, rel=0.1)
