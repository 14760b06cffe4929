"""Both sides of a handoff inside an engine: pause, permit, keep, park, release, and decoding on from copied KV."""

from __future__ import annotations

import pytest
from engine_rig import BLOCK, Rig, greedy, reference, work

from bascule.engine.core import Progress
from bascule.errors import InvalidRequest
from bascule.types import RequestId, SamplingParams

PROMPT = tuple(range(100, 130))
NAME = RequestId("a")


def parked(rig: Rig, sampling: SamplingParams) -> Progress:
    """Prefill PROMPT as a handoff until it is parked."""
    rig.engine.submit(work("a", PROMPT, sampling, handoff=True))
    rig.engine.permit(NAME, 1)
    rig.run()
    assert len(rig.tokens("a")) == 1
    assert rig.progress[-1].last
    return rig.progress[-1]


def test_a_handoff_pauses_after_its_first_chunk_until_it_is_permitted() -> None:
    rig = Rig(chunk=8)
    rig.engine.submit(work("a", PROMPT, greedy(5), handoff=True))
    rig.run()
    assert [(step.computed, step.last) for step in rig.progress] == [(8, False)]
    assert rig.tokens("a") == []
    rig.engine.permit(NAME, 1)
    rig.run()
    assert [(step.computed, step.last) for step in rig.progress] == [(8, False), (16, False), (24, False), (30, True)]
    assert all(len(step.blocks) * BLOCK >= step.computed for step in rig.progress)
    assert rig.tokens("a") == reference(PROMPT, greedy(5))[:1]
    assert not rig.engine.has_work()


def test_a_permission_that_comes_first_lets_prefill_run_through() -> None:
    rig = Rig(chunk=8)
    rig.engine.submit(work("a", PROMPT, greedy(5), handoff=True))
    rig.engine.permit(NAME, 1)
    rig.run()
    assert rig.progress[-1].last


def test_a_prompt_of_one_chunk_is_parked_without_waiting_for_a_permission() -> None:
    rig = Rig()
    rig.engine.submit(work("a", PROMPT, greedy(5), handoff=True))
    rig.run()
    assert [step.last for step in rig.progress] == [True]
    assert len(rig.tokens("a")) == 1


def test_a_parked_handoff_keeps_its_blocks_until_it_is_released_and_then_they_stay_cached() -> None:
    rig = Rig()
    parked(rig, greedy(5))
    assert rig.engine.load().running == 1
    assert rig.books.counts.held == 8
    for _ in range(2):
        rig.engine.release(NAME, 1)
    rig.assert_idle()
    assert rig.books.counts.cached == len(PROMPT) // BLOCK


def test_a_release_before_the_first_token_changes_nothing() -> None:
    rig = Rig(chunk=8)
    rig.engine.submit(work("a", PROMPT, greedy(5), handoff=True))
    rig.run()
    rig.engine.release(NAME, 1)
    rig.engine.permit(NAME, 1)
    rig.run()
    assert len(rig.tokens("a")) == 1


def test_a_request_that_ends_with_its_first_token_never_parks() -> None:
    rig = Rig()
    rig.engine.submit(work("a", PROMPT, greedy(1), handoff=True))
    rig.run()
    assert rig.tokens("a") == reference(PROMPT, greedy(1))
    assert rig.progress == []
    rig.assert_idle()


@pytest.mark.parametrize("when", ["waiting", "paused", "permitted", "parked"])
def test_a_kept_handoff_decodes_where_it_prefilled_from_any_phase(when: str) -> None:
    rig = Rig(chunk=8)
    sampling = SamplingParams(max_tokens=12, temperature=0.9, seed=5)
    rig.engine.submit(work("a", PROMPT, sampling, handoff=True))
    if when != "waiting":
        rig.run()
    if when in ("permitted", "parked"):
        rig.engine.permit(NAME, 1)
        rig.step()
    if when == "parked":
        rig.run()
    rig.engine.keep(NAME, 1)
    seen = len(rig.progress)
    rig.run()
    assert len(rig.progress) == seen, "nobody takes it over any more"
    assert rig.tokens("a") == reference(PROMPT, sampling)
    rig.assert_idle()


def test_a_kept_handoff_is_not_ended_by_a_late_release() -> None:
    rig = Rig()
    parked(rig, greedy(6))
    rig.engine.keep(NAME, 1)
    rig.engine.release(NAME, 1)
    rig.run()
    assert rig.tokens("a") == reference(PROMPT, greedy(6))


@pytest.mark.parametrize("permitted", [False, True])
def test_cancelling_a_resting_handoff_frees_its_blocks_at_once(permitted: bool) -> None:
    rig = Rig(chunk=8)
    rig.engine.submit(work("a", PROMPT, greedy(5), handoff=True))
    if permitted:
        rig.engine.permit(NAME, 1)
    rig.run()
    assert rig.books.counts.held > 0
    rig.engine.cancel(NAME, 1)
    rig.assert_idle()


def test_a_handoffs_blocks_are_not_taken_by_a_stream_that_runs_out_of_memory() -> None:
    rig = Rig(blocks=12)
    parked(rig, greedy(5))
    rig.engine.submit(work("stream", (1, 2, 3, 4), greedy(20)))
    rig.run()
    assert not rig.engine.has_work()
    assert 0 < len(rig.tokens("stream")) < 20
    rig.engine.keep(NAME, 1)
    rig.run()
    assert rig.tokens("stream") == reference((1, 2, 3, 4), greedy(20))
    assert rig.tokens("a") == reference(PROMPT, greedy(5))
    rig.assert_idle()


def test_a_handoff_in_the_middle_of_its_prompt_keeps_the_blocks_that_a_peer_reads() -> None:
    rig = Rig(blocks=12, chunk=2)
    rig.engine.submit(work("stream", (1, 2, 3, 4), greedy(28)))
    rig.step()
    rig.engine.submit(work("a", PROMPT, greedy(5), handoff=True))
    rig.engine.permit(NAME, 1)
    rig.run(until=lambda: bool(rig.progress) and rig.progress[-1].last)
    assert rig.engine.load().waiting == 0
    assert len({step.blocks for step in rig.progress}) == 1
    assert [step.computed for step in rig.progress] == list(range(2, len(PROMPT) + 1, 2))
    assert len(rig.tokens("stream")) == 13, "the blocks that are left hold 4 prompt tokens and 12 of the output"
    rig.engine.release(NAME, 1)
    rig.run()
    assert rig.tokens("stream") == reference((1, 2, 3, 4), greedy(28))


@pytest.mark.parametrize("own_memory", [False, True])
@pytest.mark.parametrize("decode_side_is_warm", [False, True])
def test_kv_copied_to_another_engine_continues_exactly_as_it_would_locally(
    own_memory: bool, decode_side_is_warm: bool
) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=9)
    prefill, decode = Rig(chunk=8, own_memory=own_memory), Rig(own_memory=own_memory)
    if decode_side_is_warm:
        decode.engine.submit(work("before", PROMPT[:17], greedy(1)))
        decode.run()
    progress = parked(prefill, sampling)
    lease = decode.engine.reserve(PROMPT, len(PROMPT) + 1)
    assert lease is not None
    assert lease.cached == (4 if decode_side_is_warm else 0)
    missing = slice(lease.cached, len(lease.blocks))
    decode.arena.bytes[:, lease.blocks[missing]] = prefill.arena.bytes[:, list(progress.blocks)[missing]]
    decode.engine.adopt(work("a", PROMPT, sampling, generated=prefill.tokens("a")), lease)
    prefill.engine.release(NAME, 1)
    decode.run()
    assert prefill.tokens("a") + decode.tokens("a") == reference(PROMPT, sampling)
    assert decode.outputs[(NAME, 1)][0].position == 1
    prefill.assert_idle()
    decode.assert_idle()


@pytest.mark.parametrize("handoff", [False, True])
def test_where_all_blocks_are_published_those_found_in_the_cache_have_been(handoff: bool) -> None:
    """A long prefix copied anew for each prompt that begins with it would make every stream wait."""
    rig = Rig(own_memory=True)
    rig.engine.publishes = True
    rig.engine.submit(work("before", PROMPT, greedy(1)))
    rig.run()
    published: list[int] = []
    publish = rig.runner.publish
    rig.runner.publish = lambda blocks: (published.extend(blocks), publish(blocks))[1]  # type: ignore[method-assign]
    rig.engine.submit(work("a", (*PROMPT, *range(500, 500 + BLOCK)), greedy(2), handoff=handoff))
    rig.engine.permit(NAME, 1)
    rig.step()
    [sequence] = rig.engine._scheduler.sequences.values()
    blocks, found = sequence.lease.blocks, sequence.lease.cached
    cached = blocks[:found]
    full = (len(PROMPT) + BLOCK) // BLOCK
    assert cached and published == blocks[found : full + handoff], "the last block, not full, is for handoffs alone"
    if handoff:
        held = list(rig.progress[-1].blocks[: len(cached)])
        assert (rig.arena.bytes[:, held] == rig.runner._memory[:, held]).all()


def test_a_block_that_did_not_arrive_changes_the_tokens() -> None:
    prefill, decode = Rig(), Rig()
    progress = parked(prefill, greedy(8))
    lease = decode.engine.reserve(PROMPT, len(PROMPT) + 1)
    assert lease is not None
    decode.arena.bytes[:, lease.blocks[1:]] = prefill.arena.bytes[:, list(progress.blocks)[1 : len(lease.blocks)]]
    decode.engine.adopt(work("a", PROMPT, greedy(8), generated=prefill.tokens("a")), lease)
    decode.run()
    assert decode.tokens("a") != reference(PROMPT, greedy(8))[1:]


def test_adopted_blocks_serve_later_prompts_from_the_cache() -> None:
    prefill, decode = Rig(own_memory=True), Rig(own_memory=True)
    progress = parked(prefill, greedy(4))
    lease = decode.engine.reserve(PROMPT, len(PROMPT) + 1)
    assert lease is not None
    decode.arena.bytes[:, lease.blocks] = prefill.arena.bytes[:, list(progress.blocks)[: len(lease.blocks)]]
    decode.engine.adopt(work("a", PROMPT, greedy(4), generated=prefill.tokens("a")), lease)
    decode.engine.submit(work("b", PROMPT, greedy(6)))
    decode.run()
    assert decode.outputs[(RequestId("b"), 1)][0].cached_tokens == len(PROMPT) // BLOCK * BLOCK
    assert decode.tokens("b") == reference(PROMPT, greedy(6))


def test_an_adopted_sequence_can_be_preempted_and_recomputed() -> None:
    prefill, decode = Rig(), Rig(blocks=13)
    sampling = SamplingParams(max_tokens=14, temperature=1.0, seed=1)
    progress = parked(prefill, sampling)
    decode.engine.submit(work("old", (1, 2, 3), greedy(30)))
    decode.step()
    lease = decode.engine.reserve(PROMPT, len(PROMPT) + 1)
    assert lease is not None
    decode.arena.bytes[:, lease.blocks] = prefill.arena.bytes[:, list(progress.blocks)[: len(lease.blocks)]]
    decode.engine.adopt(work("a", PROMPT, sampling, generated=prefill.tokens("a")), lease)
    decode.run(until=lambda: decode.engine.load().waiting > 0)
    assert decode.engine.load().waiting == 1
    decode.run()
    assert prefill.tokens("a") + decode.tokens("a") == reference(PROMPT, sampling)
    assert decode.tokens("old") == reference((1, 2, 3), greedy(30))
    decode.assert_idle()


def test_a_lease_that_cannot_hold_the_handed_over_kv_is_refused_and_stays_the_callers() -> None:
    rig = Rig(blocks=16)
    lease = rig.engine.reserve(PROMPT, len(PROMPT) - BLOCK)
    assert lease is not None
    with pytest.raises(ValueError, match="8 blocks, not 1 tokens and 7 blocks"):
        rig.engine.adopt(work("a", PROMPT, greedy(4), generated=(1,)), lease)
    with pytest.raises(InvalidRequest, match="130"):
        rig.engine.adopt(work("a", PROMPT, greedy(100), generated=(1,)), lease)
    lease.release()
    rig.assert_idle()


def test_steering_calls_for_unknown_sequences_do_nothing() -> None:
    rig = Rig()
    for call in (rig.engine.permit, rig.engine.keep, rig.engine.release, rig.engine.cancel):
        call(RequestId("nobody"), 1)
    rig.assert_idle()
