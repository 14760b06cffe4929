"""When blocks run out: who gives way, and that recomputing changes no token."""

from __future__ import annotations

import pytest
from engine_rig import BLOCK, Rig, greedy, reference, work

from bascule.types import RequestId, SamplingParams

FIRST = tuple(range(100, 112))
SECOND = tuple(range(300, 312))


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_preempted_sequence_goes_on_with_the_same_positions_and_random_stream(
    prefix_cache: bool, temperature: float
) -> None:
    rig = Rig(blocks=10, prefix_cache=prefix_cache)
    sampling = SamplingParams(max_tokens=20, temperature=temperature, seed=11)
    rig.engine.submit(work("old", FIRST, sampling))
    rig.engine.submit(work("young", SECOND, sampling))
    rig.run(until=lambda: rig.engine.load().waiting > 0 and len(rig.tokens("young")) > 0)
    assert rig.engine.load().waiting == 1, "the memory is too small for both, so one was preempted"
    rig.run()
    assert rig.tokens("old") == reference(FIRST, sampling)
    assert rig.tokens("young") == reference(SECOND, sampling)
    assert {output.cached_tokens for output in rig.outputs[(RequestId("young"), 1)]} == {0}
    rig.assert_idle()


def test_a_preempted_sequence_reports_the_cache_hits_of_its_first_admission_only() -> None:
    rig = Rig(blocks=14)
    prompt = tuple(range(300, 336))
    rig.engine.submit(work("old", FIRST, greedy(6)))
    rig.engine.submit(work("young", prompt, greedy(12)))
    rig.run(until=lambda: len(rig.tokens("young")) > 0 and rig.engine.load().waiting > 0)
    assert rig.engine.load().waiting == 1
    assert rig.books.counts.cached > 0, "its first blocks can be found again"
    rig.run()
    assert rig.tokens("young") == reference(prompt, greedy(12))
    assert {output.cached_tokens for output in rig.outputs[(RequestId("young"), 1)]} == {0}
    assert rig.hit_tokens == 0


def test_a_preempted_sequence_goes_on_before_those_that_never_ran() -> None:
    rig = Rig(blocks=10)
    rig.engine.submit(work("old", FIRST, greedy(20)))
    rig.engine.submit(work("young", SECOND, greedy(20)))
    rig.engine.submit(work("last", range(400, 412), greedy(20)))
    rig.run(until=lambda: "last" in {key.request for key in rig.outputs})
    assert len(rig.tokens("young")) > 1
    assert rig.finish("old") is not None
    rig.run()
    assert rig.tokens("young") == reference(SECOND, greedy(20))
    assert rig.tokens("last") == reference(range(400, 412), greedy(20))


def test_the_older_of_two_is_never_held_up_by_the_younger() -> None:
    rig = Rig(blocks=10)
    rig.engine.submit(work("old", FIRST, greedy(20)))
    rig.engine.submit(work("young", SECOND, greedy(20)))
    for count in range(1, 21):
        rig.step()
        assert len(rig.tokens("old")) == count
    rig.run()
    assert rig.tokens("young") == reference(SECOND, greedy(20))


def test_the_lowest_priority_gives_its_blocks_up_first_and_goes_on_later() -> None:
    """Lower numbers go first, as at the router."""
    rig = Rig(blocks=10)
    rig.engine.submit(work("low", FIRST, greedy(20), priority=1))
    rig.run(until=lambda: len(rig.tokens("low")) == 2)
    rig.engine.submit(work("high", SECOND, greedy(20), priority=-1))
    preempted = False
    for count in range(1, 21):
        rig.step()
        assert len(rig.tokens("high")) == count, "it is never held up"
        preempted |= rig.engine.load().waiting == 1
    assert preempted and len(rig.tokens("low")) < 20, "the memory is too small for both"
    rig.run()
    assert rig.tokens("low") == reference(FIRST, greedy(20))
    assert rig.tokens("high") == reference(SECOND, greedy(20))
    rig.assert_idle()


def test_of_equal_priority_the_youngest_gives_way() -> None:
    rig = Rig(blocks=13)
    for name, start, priority in (("a", 100, 5), ("b", 200, 5), ("c", 300, 0)):
        rig.engine.submit(work(name, range(start, start + 12), greedy(20), priority=priority))
    rig.run(until=lambda: rig.engine.load().running == 3)
    rig.run(until=lambda: rig.engine.load().running < 3)
    assert [one.key.request for one in rig.engine._scheduler.waiting] == ["b"]
    rig.run(until=lambda: rig.engine.load().running < 2)
    assert [one.key.request for one in rig.engine._scheduler.waiting] == ["a", "b"]
    rig.run()
    for name, start in (("a", 100), ("b", 200), ("c", 300)):
        assert rig.tokens(name) == reference(range(start, start + 12), greedy(20))
    rig.assert_idle()


def test_those_that_wait_in_a_worker_go_by_priority_too() -> None:
    rig = Rig(sequences=1)
    for number, priority in enumerate((3, -2, 0)):
        rig.engine.submit(work(f"r{number}", FIRST, greedy(2), priority=priority))
    rig.run()
    assert list(rig.times) == ["r1", "r2", "r0"]


def test_admission_leaves_each_running_stream_room_for_its_next_block() -> None:
    rig = Rig(blocks=6)
    rig.engine.submit(work("running", FIRST, greedy(8)))
    rig.step()
    rig.engine.submit(work("large", SECOND, greedy(2)))
    rig.step()
    assert rig.engine.load().waiting == 1, "3 free blocks are what the new prompt needs, but none would be left"
    rig.run()
    assert rig.tokens("running") == reference(FIRST, greedy(8))
    assert rig.tokens("large") == reference(SECOND, greedy(2))


def test_a_sequence_alone_waits_for_memory_without_spinning_and_goes_on_when_it_is_freed() -> None:
    rig = Rig(blocks=8)
    foreign = rig.engine.reserve(SECOND, 16)
    assert foreign is not None
    rig.engine.submit(work("a", FIRST, greedy(16)))
    rig.run()
    assert 0 < len(rig.tokens("a")) < 16
    assert not rig.engine.has_work()
    assert rig.engine.load().running == 1, "it keeps what it has"
    foreign.release()
    assert rig.engine.has_work()
    rig.run()
    assert rig.tokens("a") == reference(FIRST, greedy(16))
    rig.assert_idle()


def test_a_waiting_request_runs_once_a_foreign_lease_ends() -> None:
    rig = Rig(blocks=8)
    foreign = rig.engine.reserve(SECOND, 8 * BLOCK)
    assert foreign is not None
    rig.engine.submit(work("a", FIRST, greedy(4)))
    rig.run()
    assert rig.steps <= 1
    foreign.release()
    rig.run()
    assert rig.tokens("a") == reference(FIRST, greedy(4))


def test_a_reservation_leaves_running_streams_room_to_go_on() -> None:
    rig = Rig(blocks=8)
    rig.engine.submit(work("a", FIRST, greedy(8)))
    rig.step()
    assert rig.engine.reserve(SECOND, 5 * BLOCK) is None
    lease = rig.engine.reserve(SECOND, 4 * BLOCK)
    assert lease is not None
    rig.step()
    assert rig.engine.reserve((1, 2), 1) is None
    lease.release()
    rig.run()
    assert rig.tokens("a") == reference(FIRST, greedy(8))
    rig.assert_idle()


def test_nothing_is_reserved_while_as_many_sequences_run_as_may() -> None:
    rig = Rig(sequences=1)
    rig.engine.submit(work("a", FIRST, greedy(3)))
    rig.step()
    assert rig.engine.reserve(SECOND, 12) is None
    rig.run()
    lease = rig.engine.reserve(SECOND, 12)
    assert lease is not None
    lease.release()


def test_a_reservation_starts_with_all_full_prompt_blocks_that_are_here() -> None:
    rig = Rig()
    rig.engine.submit(work("a", FIRST, greedy(2)))
    rig.run()
    with rig.engine.reserve(FIRST, len(FIRST) + 8, room_tokens=20) as lease:  # type: ignore[union-attr]
        assert lease.cached == len(FIRST) // BLOCK
        assert len(lease.blocks) == (len(FIRST) + 8) // BLOCK
    rig.assert_idle()
