"""What comes into the prefix cache while a prompt is computed: it is jumped over, never written, and never computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from engine_rig import BLOCK, HASHER, Rig, bring, greedy, kv_of, reference, work

from bascule.engine.core import Found
from bascule.engine.protocol import Sampled, Slice
from bascule.errors import ConfigError
from bascule.types import RequestId

PROMPT = tuple(range(100, 100 + 10 * BLOCK + 2))
OUTPUT = 4


def watched(rig: Rig) -> list[int]:
    """The positions that are computed, as they come."""
    positions: list[int] = []
    execute: Callable[[Sequence[Slice]], list[Sampled | None]] = rig.runner.execute

    def watching(batch: Sequence[Slice]) -> list[Sampled | None]:
        for part in batch:
            positions.extend(range(part.start, part.start + len(part.tokens)))
        return execute(batch)

    rig.runner.execute = watching  # type: ignore[method-assign]
    return positions


def blocks(*places: int) -> list[int]:
    """Positions of these blocks."""
    return [place * BLOCK + offset for place in places for offset in range(BLOCK)]


REST = list(range(10 * BLOCK, len(PROMPT) + OUTPUT - 1))
"""Positions of the block that is never full, and of the output."""


@pytest.mark.parametrize("own_memory", [False, True])
@pytest.mark.parametrize("chunk", [BLOCK, 3, 64])
def test_the_end_that_comes_meanwhile_is_jumped_over(chunk: int, own_memory: bool) -> None:
    rig = Rig(chunk=chunk, own_memory=own_memory)
    rig.engine.publishes = True
    computed = watched(rig)
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    if chunk < 64:
        rig.step()
    assert bring(rig, PROMPT, range(8, 10))
    assert bring(rig, PROMPT, range(6, 8))
    rig.run()
    assert rig.tokens("a") == reference(PROMPT, greedy(OUTPUT))
    assert sorted(computed) == [*blocks(0, 1, 2, 3, 4, 5), *REST]
    assert rig.outputs[next(iter(rig.outputs))][0].cached_tokens == 4 * BLOCK
    assert rig.hit_tokens == 4 * BLOCK
    rig.assert_idle()


def test_holes_are_computed_and_what_was_found_is_not_written() -> None:
    rig = Rig(chunk=BLOCK)
    computed = watched(rig)
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    for place in (1, 4, 5, 9):
        assert bring(rig, PROMPT, range(place, place + 1))
    kept = rig.books.peek([HASHER.chain(PROMPT)[place] for place in (1, 4, 5, 9)])
    found: list[Found] = []
    while rig.engine.has_work():
        found += rig.step().found
    assert rig.tokens("a") == reference(PROMPT, greedy(OUTPUT))
    assert [each.places for each in found] == [range(1, 2), range(4, 6), range(9, 10)]
    assert sorted(computed) == [*blocks(0, 2, 3, 6, 7, 8), *REST]
    for entry, place in zip(kept, (1, 4, 5, 9), strict=True):
        assert (rig.arena.bytes[:, entry.block] == kv_of(PROMPT)[:, place]).all()
    rig.assert_idle()


def test_what_a_sibling_computes_is_not_computed_twice() -> None:
    """Of a handoff that waits for its decode side, another request computes the prompt meanwhile."""
    rig = Rig(chunk=2 * BLOCK)
    computed = watched(rig)
    rig.engine.submit(work("handoff", PROMPT, greedy(OUTPUT), handoff=True))
    rig.step()
    rig.engine.submit(work("whole", PROMPT, greedy(OUTPUT)))
    rig.run()
    assert rig.tokens("whole") == reference(PROMPT, greedy(OUTPUT))
    del computed[:]
    rig.engine.permit(RequestId("handoff"), 1)
    rig.run()
    assert computed == [10 * BLOCK, 10 * BLOCK + 1]
    [*_, last] = rig.progress
    assert last.last and last.computed == len(PROMPT)
    assert (rig.arena.bytes[:, list(last.blocks[:10])] == kv_of(PROMPT)).all()
    rig.engine.keep(RequestId("handoff"), 1)
    rig.run()
    assert rig.tokens("handoff") == reference(PROMPT, greedy(OUTPUT))
    rig.assert_idle()


def test_what_a_handoff_found_on_the_way_lies_in_the_arena_for_its_peer() -> None:
    """Where the device has memory of its own, and what a sibling computed has never been in the arena's bytes."""
    rig = Rig(chunk=2 * BLOCK, own_memory=True)
    rig.engine.submit(work("handoff", PROMPT, greedy(OUTPUT), handoff=True))
    rig.step()
    rig.engine.submit(work("whole", PROMPT, greedy(OUTPUT)))
    rig.run()
    rig.engine.permit(RequestId("handoff"), 1)
    rig.run()
    assert (rig.arena.bytes[:, list(rig.progress[-1].blocks[:10])] == kv_of(PROMPT)).all()
    rig.engine.release(RequestId("handoff"), 1)
    rig.assert_idle()


def test_what_the_running_step_writes_is_left_alone() -> None:
    rig = Rig(chunk=2 * BLOCK)
    computed = watched(rig)
    execute, tables = rig.runner.execute, []

    def bringing(batch: Sequence[Slice]) -> list[Sampled | None]:
        """All of the prompt comes while its first chunk is computed."""
        if not tables:
            tables.append(list(batch[0].blocks))
            assert bring(rig, PROMPT, range(10))
            assert not rig.engine.take_found(RequestId("a"), 1), "there is nothing more to be found"
            tables.append(list(batch[0].blocks))
        return execute(batch)

    rig.runner.execute = bringing  # type: ignore[method-assign]
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    rig.run()
    before, after = tables
    assert [place for place in range(11) if before[place] == after[place]] == [0, 1, 10]
    assert computed == [*blocks(0, 1), *REST]
    assert rig.tokens("a") == reference(PROMPT, greedy(OUTPUT))
    rig.assert_idle()


def test_memory_for_what_was_found_is_given_back_before_it_is_reached() -> None:
    rig = Rig(chunk=BLOCK, blocks=16)
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    rig.step()
    held = rig.books.counts.held
    for place in range(9, 3, -1):
        assert bring(rig, PROMPT, range(place, place + 1))
        rig.step() if place == 9 else rig.engine._scheduler.plan(0.0)
        assert rig.books.counts.held == held
    assert rig.engine.load().backlog_tokens == len(PROMPT) - 8 * BLOCK
    rig.run()
    assert rig.tokens("a") == reference(PROMPT, greedy(OUTPUT))
    rig.assert_idle()


@pytest.mark.parametrize("evicted", [False, True])
def test_a_prompt_that_gives_its_blocks_up_finds_what_is_left_of_what_was_ahead(evicted: bool) -> None:
    rig = Rig(chunk=BLOCK)
    computed = watched(rig)
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    rig.step()
    assert bring(rig, PROMPT, range(5, 10))
    rig.step()
    [sequence] = rig.engine._scheduler.sequences.values()
    rig.engine._scheduler._preempt(sequence)
    assert rig.books.counts.held == 0
    if evicted:
        rig.books.acquire([], [], 64).release()  # type: ignore[union-attr]
        del computed[:]
    rig.run()
    assert sorted(computed) == [*blocks(*range(10 if evicted else 5)), *REST]
    assert rig.tokens("a") == reference(PROMPT, greedy(OUTPUT))
    rig.assert_idle()


def test_a_prompt_that_is_cancelled_lets_go_of_what_was_ahead() -> None:
    rig = Rig(chunk=BLOCK)
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    rig.step()
    assert bring(rig, PROMPT, range(5, 10))
    rig.step()
    rig.engine.cancel(RequestId("a"), 1)
    rig.assert_idle()
    assert rig.books.counts.cached == 7


def test_without_a_prefix_cache_nothing_is_looked_for() -> None:
    rig = Rig(chunk=BLOCK, prefix_cache=False)
    computed = watched(rig)
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    assert bring(rig, PROMPT, range(5, 10))
    rig.run()
    assert len(computed) == len(PROMPT) + OUTPUT - 1
    rig.assert_idle()


def test_a_failing_step_still_says_what_was_found() -> None:
    rig = Rig()
    assert bring(rig, PROMPT, range(2))
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))

    def failing(batch: Sequence[Slice]) -> list[Sampled | None]:
        raise ConfigError("broken")

    rig.runner.execute = failing  # type: ignore[method-assign]
    result = rig.step()
    assert [each.places for each in result.found] == [range(2)]
    assert [failure.request for failure in result.failed] == ["a"]
    rig.assert_idle()


def test_a_sequence_that_lacks_what_is_awaited_has_its_memory_and_is_computed_when_told_so() -> None:
    rig = Rig()
    computed = watched(rig)
    for name, awaited in (("a", 10), ("b", 0)):
        rig.engine.submit(work(name, PROMPT if name == "a" else PROMPT[:3], greedy(OUTPUT)))
        rig.engine.hold(RequestId(name), 1, awaited)
    result = rig.step()
    assert [(each.request, each.tokens, each.held) for each in result.admitted] == [("a", PROMPT, True)]
    rig.run()
    assert rig.tokens("b") == reference(PROMPT[:3], greedy(OUTPUT))
    assert not rig.engine.has_work() and rig.engine.load().running == 1
    computed.clear()
    assert bring(rig, PROMPT, range(8))
    rig.engine.go(RequestId("a"), 1)
    rig.run()
    assert computed == [*blocks(8, 9), *REST]
    assert rig.tokens("a") == reference(PROMPT, greedy(OUTPUT))
    rig.assert_idle()


def test_a_sequence_that_finds_what_is_awaited_is_not_held() -> None:
    rig = Rig()
    assert bring(rig, PROMPT, range(8))
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    rig.engine.hold(RequestId("a"), 1, 8)
    assert rig.step().admitted == []
    rig.run()
    assert rig.tokens("a") == reference(PROMPT, greedy(OUTPUT))


def test_that_a_sequence_is_held_is_told_though_no_step_is_made() -> None:
    rig = Rig()
    rig.engine.submit(work("a", PROMPT, greedy(OUTPUT)))
    rig.engine.hold(RequestId("a"), 1, 1)
    result = rig.step()
    assert not result.executed and not result.is_empty and result.admitted[0].held
    assert rig.step().is_empty
    rig.engine.cancel(RequestId("a"), 1)
    rig.assert_idle()
