"""The simulated engine beside the real one: the same requests at the same times give the same steps."""

from __future__ import annotations

import random

import pytest

from bascule.clock import VirtualClock
from bascule.engine.core import Engine, EngineLimits, Output
from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.sequence import Key, Work
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.sim.engine import SimEngine
from bascule.types import CostModel, RequestId, SamplingParams, Slo

COST = CostModel(step_s=0.004, token_s=0.0004, pair_s=1e-7, context_s=1e-6, draw_s=1e-4, stream_s=(0.006, 0.008, 0.012))
CARD = mock_card(context=2048, vocab=1000)
Arrival = tuple[float, Work]


class Told(dict[Key, tuple[list[float], int]]):
    """When each request's first and last token came, and what it found in the cache."""


def arrivals(seed: int, count: int) -> list[Arrival]:
    rng = random.Random(seed)
    stems = [tuple(rng.choices(range(1000), k=200)) for _ in range(2)]
    at, made = 0.0, []
    for number in range(count):
        at += rng.expovariate(8)
        stem = rng.choice([(), *stems])
        prompt = stem + tuple(rng.choices(range(1000), k=rng.randint(1, 300)))
        sampling = SamplingParams(max_tokens=rng.randint(1, 60), temperature=0.0, ignore_eos=True)
        made.append((at, Work(request=RequestId(f"r{number}"), attempt=0, prompt=prompt, sampling=sampling)))
    return made


def limits(sequences: int) -> EngineLimits:
    return EngineLimits(
        max_sequences=sequences, chunk_tokens=128, step_tokens=160, slo=Slo(ttft_s=2.0, tpot_s=0.03, gap_s=0.08)
    )


def take(told: Told, outputs: list[Output], now: float) -> None:
    for output in outputs:
        if output.position == 0 or output.finish is not None:
            times, _ = told.setdefault(Key(output.request, output.attempt), ([], 0))
            times.append(now)
            told[Key(output.request, output.attempt)] = times, output.cached_tokens


def real(asked: list[Arrival], sequences: int, blocks: int) -> Told:
    """Requests come while steps run, too."""
    clock, told, waiting = VirtualClock(), Told(), list(asked)

    def sleep(seconds: float) -> None:
        end = clock.now() + seconds
        while waiting and waiting[0][0] <= end:
            clock.advance(waiting[0][0] - clock.now())
            engine.submit(waiting.pop(0)[1])
        clock.advance(end - clock.now())

    books = Books(blocks, 16)
    with Arena.create(CARD.layout, blocks) as arena:
        runner = MockRunner(CARD, COST, sleep)
        engine = Engine(runner, arena, books, BlockHasher("x", 16), limits(sequences), clock.now)
        engine.cost = COST
        while waiting or engine.has_work():
            if engine.has_work():
                take(told, engine.step().outputs, clock.now())
            else:
                sleep(waiting[0][0] - clock.now())
        assert engine.check_integrity() == []
    return told


def simulated(asked: list[Arrival], sequences: int, blocks: int) -> tuple[Told, int]:
    told = Told()
    waiting, steps = list(asked), 0
    engine = SimEngine(CARD, Books(blocks, 16), BlockHasher("x", 16), limits(sequences), COST)
    end: float | None = None
    while waiting or end is not None:
        if end is None and not engine.has_work():
            engine.moment = waiting[0][0]
        if end is not None and (not waiting or end <= waiting[0][0]):
            engine.moment = end
            result, _ = engine.end()
            for output in result.outputs:
                if (sequence := engine.sequence(Key(output.request, output.attempt))) is not None:
                    sequence.told = True
            take(told, result.outputs, engine.moment)
            end = None
        else:
            engine.moment = waiting[0][0]
            if (cut := engine.interrupt()) is not None:
                end = cut[0]
            engine.submit(waiting.pop(0)[1])
            while waiting and waiting[0][0] <= engine.moment:
                engine.submit(waiting.pop(0)[1])
        if end is None and (seconds := engine.begin()) is not None:
            end, steps = engine.moment + seconds, steps + 1
    assert engine.check_integrity() == []
    return told, steps


@pytest.mark.parametrize(("sequences", "blocks"), [(16, 1000), (3, 1000), (16, 60)], ids=["roomy", "few", "tight"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_simulated_engine_makes_the_same_steps_as_the_real_one(seed: int, sequences: int, blocks: int) -> None:
    asked = arrivals(seed, 40)
    was, (says, steps) = real(asked, sequences, blocks), simulated(asked, sequences, blocks)
    assert says.keys() == was.keys() and len(was) == 40
    for key, (times, cached) in was.items():
        assert says[key][0] == pytest.approx(times, abs=1e-6), key
        assert says[key][1] == cached
    tokens = sum(work.sampling.max_tokens for _, work in asked)
    assert steps < tokens / 2  # spans have been used


def test_a_span_ends_with_the_step_that_runs_when_something_comes() -> None:
    engine = SimEngine(CARD, Books(100, 16), BlockHasher("x", 16), limits(4), COST)
    sampling = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
    engine.submit(Work(request=RequestId("a"), attempt=0, prompt=(1, 2, 3), sampling=sampling))
    first = engine.begin()
    assert first is not None and engine.span is None
    engine.moment = first
    engine.end()
    sequence = engine.sequence(Key(RequestId("a"), 0))
    assert sequence is not None
    sequence.told = True
    whole = engine.begin()
    assert whole is not None and engine.span is not None and engine.span.steps == 49
    engine.moment += 10.5 * 0.006
    cut = engine.interrupt()
    assert cut is not None
    end, before = cut
    assert [(one.tokens, one.key.request) for one in before] == [(10, "a")]
    assert end == pytest.approx(first + 11 * 0.006, abs=1e-4)
    engine.moment = end
    result, more = engine.end()
    assert more == [] and [output.position for output in result.outputs] == [11]
