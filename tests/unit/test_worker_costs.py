"""What a worker learns of its costs: by a profile at its start, from its steps, and from its handoffs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest

from bascule.engine.core import Engine, EngineLimits, Work
from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.protocol import Sampled, Slice
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.policies.cost import PrefillPart, decode_seconds, step_seconds
from bascule.policies.cost_fit import fit, step_sample
from bascule.types import CostModel, RequestId, SamplingParams, WorkerId
from bascule.worker.learning import Links, StepCosts
from bascule.worker.profile import _TRIES, BUDGET_S, NEEDED, OTHERS, measure, profiled

TRUE = CostModel(
    step_s=0.004, token_s=0.001, pair_s=5e-7, context_s=1e-5, draw_s=0.0005, stream_s=(0.005, 0.006, 0.008)
)
CARD = mock_card(context=4096, vocab=1000)
BLOCKS = 400
PEER = WorkerId("decode-0")


class Machine:
    """A mock on a machine with a clock of its own, which a step moves on by what `TRUE` says, times `factor`."""

    def __init__(self, context: int = 4096, blocks: int = BLOCKS) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.factor: Callable[[int], float] = lambda step: 1.0
        self.arena = Arena.create(CARD.layout, blocks)
        self.runner = MockRunner(mock_card(context=context, vocab=1000), TRUE, self._sleep)
        self.runner.bind(self.arena)
        self.books = Books(blocks, CARD.layout.block_size)
        hasher = BlockHasher(CARD.fingerprint, CARD.layout.block_size)
        limits = EngineLimits(max_sequences=32, chunk_tokens=64, step_tokens=128)
        self.engine = Engine(self.runner, self.arena, self.books, hasher, limits, now=lambda: self.seconds)

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds * self.factor(self.steps)
        self.steps += 1

    def serve(self, prompts: Sequence[int], outputs: int, names: count[int]) -> None:
        """Requests of so many prompt tokens each, until all is done."""
        for tokens in prompts:
            name = RequestId(str(next(names)))
            prompt = tuple(1 + (7 * index + int(name)) % 900 for index in range(tokens))
            sampling = SamplingParams(max_tokens=outputs, temperature=0.0)
            self.engine.submit(Work(request=name, attempt=0, prompt=prompt, sampling=sampling))
        while self.engine.has_work():
            self.engine.step()


def timed(machine: Machine) -> list[float]:
    return [sample.seconds for sample in measure(machine.runner, BLOCKS, 32, BUDGET_S, now=lambda: machine.seconds)]


# ---------------------------------------------------------------- the profile


def test_a_profile_keeps_its_time_and_leaves_the_books_clean() -> None:
    machine = Machine()
    assert sum(timed(machine)) <= machine.seconds < 1.2 * BUDGET_S
    assert machine.engine.check_integrity() == []
    assert machine.books.counts.free == BLOCKS
    machine.serve([200, 30], 20, count())
    assert machine.engine.check_integrity() == []


def test_a_profile_finds_the_model() -> None:
    machine = Machine()
    found = fit(measure(machine.runner, BLOCKS, 32, BUDGET_S, now=lambda: machine.seconds), CostModel())
    assert found.token_s == pytest.approx(TRUE.token_s, rel=0.05)
    assert found.pair_s == pytest.approx(TRUE.pair_s, rel=0.2)
    for streams in (1, 8, 32):
        assert decode_seconds(found, streams, 0) == pytest.approx(decode_seconds(TRUE, streams, 0), rel=0.05)


def test_a_slow_device_is_measured_as_far_as_nothing_can_be_done_without() -> None:
    machine = Machine()
    machine.factor = lambda step: 50.0
    assert len(timed(machine)) == len(NEEDED)


def test_a_slow_device_s_first_guess_of_long_prompts_is_of_the_right_size() -> None:
    machine = Machine()
    machine.factor = lambda step: 50.0
    samples = measure(machine.runner, BLOCKS, 32, BUDGET_S, now=lambda: machine.seconds)
    for prompt in (500, 1500):
        parts = [PrefillPart(prompt, 0)]
        ratio = step_seconds(fit(samples, CostModel()), parts, 0, 0) / (50 * step_seconds(TRUE, parts, 0, 0))
        assert 0.5 < ratio < 1.5, prompt


def test_what_pairs_cost_is_not_guessed_from_short_prompts() -> None:
    """It would take a part of what each token costs, and a prompt of a thousand tokens would seem ten times as dear."""
    found = fit([step_sample([(0, 64)], 0.35), step_sample([(15, 1)], 0.2)], CostModel())
    assert found.pair_s == 0.0
    assert step_seconds(found, [PrefillPart(1024, 0)], 0, 0) <= 16 * 0.35 * 1.1


def test_steps_that_do_not_fit_the_memory_the_context_or_the_batch_are_left_out() -> None:
    machine = Machine(context=128, blocks=10)
    found = measure(machine.runner, 10, 4, BUDGET_S, now=lambda: machine.seconds)
    assert found and max(sample.streams for sample in found) == 4
    assert max(sample.new + sample.behind for sample in found) <= 128
    assert len({tuple(sample[:5]) for sample in found}) < len(NEEDED) + len(OTHERS)


class Counting:
    """A runner that counts its steps, each of which takes `seconds` by its own clock."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.steps = 0
        self.seconds = seconds
        self.stop_tokens: frozenset[int] = frozenset()
        self.card = CARD

    def bind(self, arena: Arena) -> None: ...

    def execute(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        self.steps += 1
        return [None] * len(batch)

    def now(self) -> float:
        return self.steps * self.seconds

    def publish(self, blocks: Sequence[int]) -> None: ...

    def absorb(self, blocks: Sequence[int]) -> None: ...


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("cache")
def test_a_restart_skips_the_profile_and_another_device_does_not() -> None:
    runner = Counting()
    first = profiled(runner, "cpu 1", BLOCKS, 32, runner.now)
    measured = runner.steps
    assert measured > 0
    assert profiled(runner, "cpu 1", BLOCKS, 32, runner.now) == first
    checked = runner.steps - measured
    assert checked < measured / 2
    profiled(runner, "cpu 2", BLOCKS, 32, runner.now)
    assert runner.steps >= 2 * measured + checked


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("factor", [0.5, 1.4])
def test_a_kept_profile_that_steps_speak_against_is_made_again(factor: float) -> None:
    runner, other = Machine(), Machine()
    first = profiled(runner.runner, "cpu 1", BLOCKS, 32, lambda: runner.seconds)
    other.factor = lambda step: factor
    again = profiled(other.runner, "cpu 1", BLOCKS, 32, lambda: other.seconds)
    assert again.token_s == pytest.approx(factor * first.token_s, rel=0.1)
    steps = other.steps
    assert profiled(other.runner, "cpu 1", BLOCKS, 32, lambda: other.seconds) == again
    assert other.steps - steps <= 2 * (_TRIES + 1)


@pytest.mark.parametrize("content", [b"", b"{", b'{"token_s": -1}', b"{}", b'{"step_s": 1, "unknown": 2}'])
def test_a_damaged_file_is_ignored_and_written_again(cache: Path, content: bytes) -> None:
    runner = Counting()
    profiled(runner, "cpu 1", BLOCKS, 32, runner.now)
    [path] = (cache / "costs").iterdir()
    path.write_bytes(content)
    measured = runner.steps
    again = profiled(runner, "cpu 1", BLOCKS, 32, runner.now)
    assert runner.steps > measured
    assert profiled(runner, "cpu 1", BLOCKS, 32, runner.now) == again
    assert list((cache / "costs").iterdir()) == [path]


def test_a_profile_that_was_cut_short_is_not_kept(cache: Path) -> None:
    runner = Counting(seconds=0.5)
    assert any(profiled(runner, "cpu 1", BLOCKS, 32, runner.now).stream_s)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("BASCULE_CACHE", str(cache / "file"))
    runner = Counting()
    assert profiled(runner, "cpu 1", BLOCKS, 32, runner.now) != CostModel()


# ---------------------------------------------------------------- from steps


def test_the_engine_tells_what_its_steps_had_in_them() -> None:
    machine = Machine()
    machine.serve([100], 3, count())
    samples = machine.engine.take_samples()
    assert [(sample.new, sample.behind, sample.streams, sample.context) for sample in samples] == [
        (64, 0, 0, 0),
        (36, 64, 0, 0),
        (0, 0, 1, 100),
        (0, 0, 1, 101),
    ]
    assert sum(sample.seconds for sample in samples) == pytest.approx(machine.seconds)
    assert machine.engine.take_samples() == []


def learnt(machine: Machine, costs: StepCosts, rounds: int, names: count[int]) -> None:
    for _ in range(rounds):
        machine.serve([100, 30, 80, 250], 20, names)
        costs.refit()


@pytest.mark.parametrize("start", [CostModel(), TRUE])
def test_a_worker_follows_its_machine_when_that_becomes_twice_as_slow(start: CostModel) -> None:
    machine, names = Machine(), count()
    costs = StepCosts(machine.engine, start)
    learnt(machine, costs, 5, names)
    assert costs.error is not None and costs.error < 0.02
    machine.factor = lambda step: 2.0
    learnt(machine, costs, 1, names)
    assert costs.error > 0.4  # what was predicted before it was learnt
    learnt(machine, costs, 5, names)
    assert costs.error < 0.02
    assert machine.engine.cost == costs.model != start


def test_a_worker_that_is_stopped_now_and_then_keeps_its_model() -> None:
    machine, names = Machine(), count()
    machine.factor = lambda step: 20.0 if step % 10 == 0 else 1.0
    costs = StepCosts(machine.engine, TRUE)
    learnt(machine, costs, 10, names)
    assert costs.model is not None
    for streams in (1, 2, 4):
        assert decode_seconds(costs.model, streams, 0) == pytest.approx(decode_seconds(TRUE, streams, 0), rel=0.1)
    assert costs.model.token_s == pytest.approx(TRUE.token_s, rel=0.1)


def test_nothing_is_known_before_there_are_steps() -> None:
    machine = Machine()
    costs = StepCosts(machine.engine, CostModel())
    costs.refit()
    machine.serve([20], 2, count())
    costs.refit()
    assert (costs.model, costs.error) == (None, None)


# ---------------------------------------------------------------- from handoffs


def test_a_link_is_the_rate_of_its_pushes_and_what_a_handoff_takes_beyond() -> None:
    links = Links()
    for _ in range(20):
        links.pushed(PEER, 10_000_000, 0.01)
        links.handed_over(PEER, 2_000_000, 0.005)
    links.pushed(PEER, 10_000_000, 10.0)
    links.handed_over(PEER, 2_000_000, 30.0)
    assert links.costs()[PEER].bytes_per_s == pytest.approx(1e9)
    assert links.costs()[PEER].latency_s == pytest.approx(0.003)


@pytest.mark.parametrize(("sent", "seconds"), [(0, 0.1), (0, 0.0), (1 << 20, 0.0), (1 << 20, -1.0), (10, 0.1)])
def test_pushes_that_say_nothing_of_the_rate_are_ignored(sent: int, seconds: float) -> None:
    links = Links()
    links.pushed(PEER, sent, seconds)
    assert links.costs() == {}
    links.handed_over(PEER, 0, 0.002)
    assert links.costs()[PEER].latency_s == 0.002
    assert links.costs()[PEER].bytes_per_s > 1e8


def test_a_link_that_was_slow_once_is_forgotten_and_what_it_moves_is_not() -> None:
    now = [100.0]
    links = Links(lambda: now[0])
    links.crossed(PEER, "tcp", 1 << 20, 10.0)
    links.pushed(PEER, 1 << 20, 10.0)
    links.handed_over(PEER, 1 << 20, 10.1)
    assert links.costs()[PEER].bytes_per_s == pytest.approx((1 << 20) / 10.0)
    now[0] += 61.0
    assert links.costs() == {}
    assert links.wire_rate(PEER, "tcp") == pytest.approx((1 << 20) / 10.0)
    links.pushed(PEER, 1 << 20, 0.01)
    links.handed_over(PEER, 1 << 20, 0.02)
    assert links.costs()[PEER].bytes_per_s == pytest.approx((1 << 20) / 0.01)


def test_a_handoff_shorter_than_its_bytes_would_take_still_has_a_positive_latency() -> None:
    links = Links()
    links.pushed(PEER, 1 << 20, 1.0)
    links.handed_over(PEER, 1 << 20, 0.1)
    assert links.costs()[PEER].latency_s > 0


def test_the_link_s_own_rate_is_told_apart_from_that_of_kv_and_by_transport() -> None:
    links = Links()
    assert links.wire_rate(PEER, "tcp") is None
    for _ in range(3):
        links.crossed(PEER, "tcp", 1_000_000, 0.01)
        links.pushed(PEER, 2_000_000, 0.04)
    links.crossed(PEER, "tcp", 1_000_000, 10.0)
    links.crossed(PEER, "shm", 1_000_000, 1e-4)
    assert links.wire_rate(PEER, "tcp") == pytest.approx(1e8)
    assert links.wire_rate(PEER, "shm") == pytest.approx(1e10)
    links.handed_over(PEER, 0, 0.002)
    assert links.costs()[PEER].bytes_per_s == pytest.approx(5e7)


@pytest.mark.parametrize(("sent", "seconds"), [(0, 0.1), (1 << 20, 0.0), (1 << 20, -1.0), (10, 0.1)])
def test_what_says_nothing_of_a_link_is_ignored(sent: int, seconds: float) -> None:
    links = Links()
    links.crossed(PEER, "tcp", sent, seconds)
    assert links.wire_rate(PEER, "tcp") is None
