"""Batches, chunks, the prefix cache and the ends of requests: scheduling must never change the tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from engine_rig import BLOCK, CARD, STOP, Rig, greedy, reference, work

from bascule.engine.core import Engine, EngineLimits
from bascule.engine.protocol import Sampled, Slice
from bascule.errors import ConfigError, InvalidRequest
from bascule.kv.arena import Arena
from bascule.kv.hashing import BlockHasher
from bascule.types import FinishReason, RequestId, SamplingParams

PROMPT = tuple(range(100, 130))
WAIT = 20.0


def test_one_request_gets_the_reference_tokens_and_leaves_nothing_behind() -> None:
    rig = Rig()
    rig.engine.submit(work("a", PROMPT, greedy(10)))
    rig.run()
    assert rig.tokens("a") == reference(PROMPT, greedy(10))
    assert rig.finish("a") is FinishReason.LENGTH
    rig.assert_idle()


def test_sequences_that_arrive_at_different_times_share_steps() -> None:
    rig = Rig()
    prompts = {name: tuple(range(ord(name), ord(name) + 9)) for name in "abcd"}
    for name, prompt in prompts.items():
        rig.engine.submit(work(name, prompt, greedy(12)))
        rig.step()
    rig.run()
    assert rig.steps == len(prompts) - 1 + 12
    for name, prompt in prompts.items():
        assert rig.tokens(name) == reference(prompt, greedy(12))
    rig.assert_idle()


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16])
def test_chunked_prefill_gives_the_tokens_of_whole_prefill(chunk: int) -> None:
    rig = Rig(chunk=chunk)
    rig.engine.submit(work("a", PROMPT, greedy(8)))
    rig.run()
    assert rig.steps == -(-len(PROMPT) // chunk) + 7
    assert rig.tokens("a") == reference(PROMPT, greedy(8))


def test_a_running_stream_gets_a_token_in_every_step_of_a_long_prefill() -> None:
    rig = Rig(chunk=4, step=16)
    rig.engine.submit(work("stream", PROMPT[:3], greedy(12)))
    rig.step()
    rig.engine.submit(work("long", range(200, 240), greedy(1)))
    for tokens in range(2, 12):
        rig.step()
        assert len(rig.tokens("stream")) == tokens
    rig.run()
    assert rig.tokens("long") == reference(range(200, 240), greedy(1))


def test_a_seed_gives_the_same_tokens_in_any_batch_and_another_seed_gives_others() -> None:
    rig = Rig(chunk=5)
    samplings = {f"s{seed}": SamplingParams(max_tokens=8, temperature=0.7, seed=seed) for seed in range(3)}
    for name, sampling in samplings.items():
        rig.engine.submit(work(name, PROMPT, sampling))
    rig.run()
    for name, sampling in samplings.items():
        assert rig.tokens(name) == reference(PROMPT, sampling)
    assert len({tuple(rig.tokens(name)) for name in samplings}) == len(samplings)


def test_no_more_sequences_than_the_limit_compute_at_once() -> None:
    rig = Rig(sequences=2)
    prompts = {name: (number, *PROMPT) for number, name in enumerate("abc")}
    for name, prompt in prompts.items():
        rig.engine.submit(work(name, prompt, greedy(4)))
    rig.step()
    assert (rig.engine.load().running, rig.engine.load().waiting) == (2, 1)
    rig.run()
    assert all(rig.tokens(name) == reference(prompt, greedy(4)) for name, prompt in prompts.items())


def test_of_siblings_that_come_together_one_computes_what_they_share() -> None:
    rig = Rig(chunk=BLOCK * 3)
    shared = tuple(range(8 * BLOCK))
    prompts = {name: (*shared, *[100 + number] * 5) for number, name in enumerate("abc")}
    for name, prompt in prompts.items():
        rig.engine.submit(work(name, prompt, greedy(4)))
    rig.run()
    assert all(rig.tokens(name) == reference(prompt, greedy(4)) for name, prompt in prompts.items())
    assert rig.hit_tokens >= 2 * (8 - 3) * BLOCK
    rig.assert_idle()


def test_who_shares_little_with_a_sibling_does_not_wait_for_it() -> None:
    rig = Rig(chunk=BLOCK)
    for number, name in enumerate("ab"):
        rig.engine.submit(work(name, (*range(2 * BLOCK), *[100 + number] * 3 * BLOCK), greedy(2)))
    rig.step()
    assert rig.engine.load().running == 2
    rig.run()
    rig.assert_idle()


def test_a_sibling_that_is_cancelled_is_not_waited_for() -> None:
    rig = Rig(chunk=BLOCK)
    prompt = tuple(range(8 * BLOCK))
    for name in ("gone", "stays"):
        rig.engine.submit(work(name, prompt, greedy(3)))
    rig.step()
    assert (rig.engine.load().running, rig.engine.load().waiting) == (1, 1)
    rig.engine.cancel(RequestId("gone"), 1)
    rig.run()
    assert rig.tokens("stays") == reference(prompt, greedy(3))
    rig.assert_idle()


def test_a_repeated_prompt_is_found_in_the_cache_but_for_its_last_token() -> None:
    rig = Rig()
    prompt = PROMPT[:28]
    for name in ("cold", "warm"):
        rig.engine.submit(work(name, prompt, greedy(6)))
        rig.run()
        assert rig.tokens(name) == reference(prompt, greedy(6))
    cached = {name: {output.cached_tokens for output in rig.outputs[(RequestId(name), 1)]} for name in ("cold", "warm")}
    assert cached == {"cold": {0}, "warm": {28 - BLOCK}}
    assert rig.hit_tokens == 28 - BLOCK


def test_a_follow_up_turn_finds_the_answer_before_it_in_the_cache() -> None:
    rig = Rig()
    rig.engine.submit(work("first", PROMPT, greedy(11)))
    rig.run()
    turn = (*PROMPT, *rig.tokens("first"), 1, 2, 3)
    rig.engine.submit(work("second", turn, greedy(5)))
    rig.run()
    assert rig.tokens("second") == reference(turn, greedy(5))
    computed = len(PROMPT) + 10
    assert rig.outputs[(RequestId("second"), 1)][0].cached_tokens == computed // BLOCK * BLOCK


def test_two_new_prompts_alike_in_one_step_are_both_right() -> None:
    rig = Rig()
    rig.engine.submit(work("a", PROMPT, greedy(9)))
    rig.engine.submit(work("b", PROMPT, greedy(9)))
    rig.run()
    assert rig.tokens("a") == rig.tokens("b") == reference(PROMPT, greedy(9))
    rig.assert_idle()


def test_without_prefix_cache_nothing_is_found_and_nothing_stays() -> None:
    rig = Rig(prefix_cache=False)
    for name in "ab":
        rig.engine.submit(work(name, PROMPT, greedy(6)))
        rig.run()
        assert rig.tokens(name) == reference(PROMPT, greedy(6))
    assert rig.outputs[(RequestId("b"), 1)][0].cached_tokens == 0
    assert rig.books.counts.cached == 0


def test_tokens_that_were_sent_already_are_computed_and_not_drawn_again() -> None:
    rig = Rig(chunk=6)
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    expected = reference(PROMPT, sampling)
    rig.engine.submit(work("again", PROMPT, sampling, generated=expected[:5]))
    rig.run()
    assert rig.tokens("again") == expected[5:]
    assert rig.outputs[(RequestId("again"), 1)][0].position == 5


def test_the_models_end_token_stops_and_is_itself_output() -> None:
    rig = Rig(stop_at=4)
    rig.engine.submit(work("a", PROMPT, greedy(20)))
    rig.run()
    assert rig.tokens("a") == reference(PROMPT, greedy(20), stop_at=4)
    assert rig.tokens("a")[-1] == STOP
    assert len(rig.tokens("a")) == 5
    assert rig.finish("a") is FinishReason.STOP
    rig.assert_idle()


def test_ignore_eos_runs_over_the_models_end_token() -> None:
    rig = Rig(stop_at=4)
    rig.engine.submit(work("a", PROMPT, SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)))
    rig.run()
    assert rig.tokens("a")[4] == STOP
    assert len(rig.tokens("a")) == 9
    assert rig.finish("a") is FinishReason.LENGTH


@pytest.mark.parametrize(("min_tokens", "length"), [(0, 4), (3, 4), (4, 10)])
def test_a_stop_token_id_ends_the_output_after_min_tokens(min_tokens: int, length: int) -> None:
    fourth = reference(PROMPT, greedy(10))[3]
    rig = Rig()
    sampling = SamplingParams(max_tokens=10, temperature=0.0, stop_token_ids=(fourth,), min_tokens=min_tokens)
    rig.engine.submit(work("a", PROMPT, sampling))
    rig.run()
    assert len(rig.tokens("a")) == length
    assert rig.finish("a") is (FinishReason.STOP if length == 4 else FinishReason.LENGTH)


def test_logprobs_come_with_the_tokens_that_asked_for_them() -> None:
    rig = Rig()
    rig.engine.submit(work("plain", PROMPT, greedy(3)))
    rig.engine.submit(work("asked", PROMPT, SamplingParams(max_tokens=3, temperature=0.0, logprobs=2)))
    rig.run()
    assert all(output.logprobs is None for output in rig.outputs[(RequestId("plain"), 1)])
    for output in rig.outputs[(RequestId("asked"), 1)]:
        assert output.logprobs is not None
        assert len(output.logprobs.top) == 2
        assert output.logprobs.top[0] == (output.token, output.logprobs.logprob)


def test_a_request_over_the_context_is_refused_with_both_numbers() -> None:
    rig = Rig(blocks=200)
    with pytest.raises(InvalidRequest, match=rf"{30 + 300}.*{CARD.context}") as refused:
        rig.engine.submit(work("a", PROMPT, greedy(300)))
    assert refused.value.code == "context_length_exceeded"
    rig.assert_idle()


def test_a_request_that_can_never_fit_the_memory_is_refused_with_both_numbers() -> None:
    rig = Rig(blocks=8)
    rig.engine.submit(work("fits", PROMPT, greedy(2)))
    with pytest.raises(InvalidRequest, match=r"33.*32 tokens"):
        rig.engine.submit(work("never", PROMPT, greedy(3)))
    rig.run()
    assert len(rig.tokens("fits")) == 2


def test_an_empty_prompt_and_a_finished_request_are_refused() -> None:
    rig = Rig()
    with pytest.raises(InvalidRequest, match="empty"):
        rig.engine.submit(work("a", (), greedy(3)))
    with pytest.raises(InvalidRequest, match="2 of 2"):
        rig.engine.submit(work("a", PROMPT, greedy(2), generated=(1, 2)))


@pytest.mark.parametrize("token", [-1, CARD.vocab, 1 << 40])
def test_a_token_that_the_model_does_not_know_is_refused_before_it_reaches_a_step(token: int) -> None:
    rig = Rig()
    rig.engine.submit(work("good", PROMPT, greedy(2)))
    with pytest.raises(InvalidRequest, match=rf"vocabulary ends at {CARD.vocab - 1}"):
        rig.engine.submit(work("bad", (*PROMPT, token), greedy(2)))
    rig.run()
    assert len(rig.tokens("good")) == 2


def test_the_same_attempt_twice_is_refused() -> None:
    rig = Rig()
    rig.engine.submit(work("a", PROMPT, greedy(3)))
    with pytest.raises(ValueError, match="already"):
        rig.engine.submit(work("a", PROMPT, greedy(3)))


def test_limits_under_which_prefill_could_starve_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"8.*16"):
        EngineLimits(max_sequences=16, chunk_tokens=8, step_tokens=8)


def test_a_step_without_work_executes_nothing() -> None:
    rig = Rig()
    assert not rig.engine.has_work()
    assert not rig.step().executed


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_cancelling_at_any_phase_frees_everything_and_may_be_repeated(steps: int) -> None:
    rig = Rig(chunk=10)
    rig.engine.submit(work("gone", PROMPT, greedy(20)))
    rig.engine.submit(work("stays", PROMPT[:5], greedy(20)))
    for _ in range(steps):
        rig.step()
    before = rig.tokens("gone")
    for _ in range(2):
        rig.engine.cancel(RequestId("gone"), 1)
    assert rig.engine.check_integrity() == []
    rig.run()
    assert rig.tokens("gone") == before
    assert rig.tokens("stays") == reference(PROMPT[:5], greedy(20))
    rig.assert_idle()


class GatedRunner:
    """Wraps the mock so that a step stands still while another thread acts."""

    def __init__(self, rig: Rig) -> None:
        self._inner = rig.runner
        self.card = rig.runner.card
        self.stop_tokens = rig.runner.stop_tokens
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def bind(self, arena: Arena) -> None:
        self._inner.bind(arena)

    def execute(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        self.entered.set()
        assert self.go_on.wait(WAIT)
        return self._inner.execute(batch)

    def publish(self, blocks: Sequence[int]) -> None:
        self._inner.publish(blocks)

    def absorb(self, blocks: Sequence[int]) -> None:
        self._inner.absorb(blocks)


def test_no_call_waits_for_a_running_step_and_what_is_cancelled_in_it_says_nothing() -> None:
    rig = Rig()
    gate = GatedRunner(rig)
    limits = EngineLimits(max_sequences=4, chunk_tokens=64, step_tokens=64)
    rig.engine = Engine(gate, rig.arena, rig.books, BlockHasher("mock", BLOCK), limits)
    rig.engine.submit(work("gone", (7, *PROMPT), greedy(4)))
    rig.engine.submit(work("stays", PROMPT, greedy(4)))
    stepper = threading.Thread(target=rig.step)
    stepper.start()
    assert gate.entered.wait(WAIT)
    rig.engine.cancel(RequestId("gone"), 1)
    rig.engine.submit(work("late", PROMPT, greedy(4)))
    assert rig.engine.load().running == 2
    assert rig.engine.check_integrity() == []
    gate.go_on.set()
    stepper.join(WAIT)
    assert rig.tokens("gone") == []
    rig.run()
    assert rig.tokens("stays") == rig.tokens("late") == reference(PROMPT, greedy(4))
    assert rig.tokens("gone") == []
    rig.assert_idle()


def test_a_failing_runner_fails_the_sequences_of_its_step_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(sequences=1)
    rig.engine.submit(work("unlucky", PROMPT, greedy(4)))
    rig.engine.submit(work("next", PROMPT, greedy(4)))

    def fail(batch: Sequence[Slice]) -> list[Sampled | None]:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as broken:
        broken.setattr(rig.runner, "execute", fail)
        result = rig.step()
    assert [failure.request for failure in result.failed] == ["unlucky"]
    assert "the device is on fire" in result.failed[0].message
    rig.run()
    assert rig.tokens("next") == reference(PROMPT, greedy(4))
    rig.assert_idle()


def test_a_runner_that_forgets_to_draw_fails_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.engine.submit(work("a", PROMPT, greedy(4)))
    monkeypatch.setattr(rig.runner, "execute", lambda batch: [None for _ in batch])
    assert [failure.request for failure in rig.step().failed] == ["a"]
    rig.assert_idle()
