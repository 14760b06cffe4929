"""Random schedules in little memory: whatever the order of calls, tokens are the reference's and nothing leaks."""

from __future__ import annotations

from functools import cache

from engine_rig import BLOCK, MAX_STEPS, Rig, bring, reference, work
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from bascule.engine.core import Work
from bascule.engine.sequence import Key, Phase
from bascule.kv.books import Lease
from bascule.types import CostModel, SamplingParams, Slo

BLOCKS = 14
COMMON = tuple(range(500, 509))

prompts = st.builds(
    lambda shared, own: (*COMMON[:shared], *own),
    st.integers(0, len(COMMON)),
    st.lists(st.integers(10, 14), min_size=1, max_size=14),
)
samplings = st.builds(
    lambda tokens, temperature, seed: SamplingParams(max_tokens=tokens, temperature=temperature, seed=seed),
    st.integers(1, 24),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 2),
)
priorities = st.integers(-1, 1)


@cache
def expected(prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    return reference(prompt, sampling)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, are cancelled, handed off, kept and released, while foreign leases take memory away."""

    submitted = Bundle("submitted")

    def __init__(self) -> None:
        super().__init__()
        self.works: dict[Key, Work] = {}
        self.cancelled: set[Key] = set()
        self.released: set[Key] = set()
        self.leases: list[Lease] = []

    @initialize(
        chunk=st.sampled_from([2, 5, 64]),
        sequences=st.sampled_from([1, 3, 8]),
        prefix_cache=st.booleans(),
        own_memory=st.booleans(),
        slo=st.sampled_from([Slo(), Slo(gap_s=0.02), Slo(1.0, 0.015, 0.03)]),
        cost=st.sampled_from([CostModel(), CostModel(step_s=0.01, token_s=0.001)]),
    )
    def start(
        self, chunk: int, sequences: int, prefix_cache: bool, own_memory: bool, slo: Slo, cost: CostModel
    ) -> None:
        self.rig = Rig(
            blocks=BLOCKS,
            chunk=chunk,
            step=max(8, chunk),
            sequences=sequences,
            prefix_cache=prefix_cache,
            own_memory=own_memory,
            slo=slo,
            cost=cost,
        )

    @rule(
        target=submitted,
        prompt=prompts,
        sampling=samplings,
        handoff=st.booleans(),
        sent=st.integers(0, 3),
        priority=priorities,
    )
    def submit(self, prompt: tuple[int, ...], sampling: SamplingParams, handoff: bool, sent: int, priority: int) -> Key:
        generated = expected(prompt, sampling)[: min(sent, sampling.max_tokens - 1)]
        name = f"r{len(self.works)}"
        asked = work(name, prompt, sampling, generated=generated, handoff=handoff, priority=priority)
        key = Key(asked.request, asked.attempt)
        self.works[key] = asked
        self.rig.engine.submit(asked)
        return key

    @rule(key=submitted)
    def cancel(self, key: Key) -> None:
        self.rig.engine.cancel(*key)
        self.cancelled.add(key)

    @rule(key=submitted)
    def permit(self, key: Key) -> None:
        self.rig.engine.permit(*key)

    @rule(key=submitted)
    def take_found(self, key: Key) -> None:
        self.rig.engine.take_found(*key)

    @rule(key=submitted, blocks=st.integers(0, 5))
    def hold(self, key: Key, blocks: int) -> None:
        self.rig.engine.hold(*key, blocks)

    @rule(key=submitted)
    def go(self, key: Key) -> None:
        self.rig.engine.go(*key)

    @rule(key=submitted)
    def keep(self, key: Key) -> None:
        self.rig.engine.keep(*key)

    @rule(key=submitted)
    def release(self, key: Key) -> None:
        running = self.rig.engine.load().running
        self.rig.engine.release(*key)
        if self.rig.engine.load().running < running:
            self.released.add(key)

    @rule(prompt=prompts, more=st.integers(1, 20))
    def reserve(self, prompt: tuple[int, ...], more: int) -> None:
        lease = self.rig.engine.reserve(prompt, len(prompt) + more)
        if lease is not None:
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule()
    def give_back(self) -> None:
        self.leases.pop(0).release()

    @rule(prompt=prompts, sampling=samplings, priority=priorities)
    def adopt(self, prompt: tuple[int, ...], sampling: SamplingParams, priority: int) -> None:
        """Hand over from a second engine, which computes the prompt just for this."""
        if sampling.max_tokens == 1:
            return
        lease = self.rig.engine.reserve(prompt, len(prompt) + 1)
        if lease is None:
            return
        peer, asked = Rig(), work(f"r{len(self.works)}", prompt, sampling, handoff=True)
        peer.engine.submit(asked)
        peer.run()
        source = peer.progress[-1].blocks[: len(lease.blocks)]
        target = lease.blocks[: len(source)]
        self.rig.arena.bytes[:, target[lease.cached :]] = peer.arena.bytes[:, list(source[lease.cached :])]
        asked = work(asked.request, prompt, sampling, generated=peer.tokens(asked.request), priority=priority)
        self.works[Key(asked.request, asked.attempt)] = asked
        self.rig.engine.adopt(asked, lease)

    @rule(prompt=prompts, start=st.integers(0, 5), count=st.integers(1, 5))
    def load(self, prompt: tuple[int, ...], start: int, count: int) -> None:
        """Some blocks come from elsewhere, be they of a prompt's beginning, middle or end."""
        self.bring(prompt, start, count)

    @precondition(lambda self: self.works)
    @rule(data=st.data(), start=st.integers(0, 5), count=st.integers(1, 5))
    def load_for(self, data: st.DataObject, start: int, count: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.works)))
        asked = self.works[key]
        self.bring((*asked.prompt, *expected(asked.prompt, asked.sampling)), start, count)

    def bring(self, tokens: tuple[int, ...], start: int, count: int) -> None:
        if places := range(len(tokens) // BLOCK)[start : start + count]:
            bring(self.rig, tokens, places)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.rig.step()

    @rule()
    def work_means_progress(self) -> None:
        """`has_work` may promise in vain once, after which it says so."""
        if self.rig.engine.has_work() and not self.rig.step().executed:
            assert not self.rig.engine.has_work()

    @invariant()
    def clean(self) -> None:
        assert self.rig.engine.check_integrity() == []

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        for lease in self.leases:
            lease.release()
        for key in self.works:
            self.rig.engine.keep(*key)
            self.rig.engine.go(*key)
        self.rig.run()
        self.rig.assert_idle()
        assert self.rig.failed == []
        for key, asked in self.works.items():
            tokens = [*asked.generated, *self.rig.tokens(key.request)]
            whole = expected(asked.prompt, asked.sampling)
            assert tokens == whole[: len(tokens)]
            if key not in self.cancelled | self.released:
                assert tokens == whole


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRandomSchedules = EngineMachine.TestCase


def first_in_rank(rig: Rig) -> Key | None:
    """Of the sequences that run: the oldest of the best priority."""
    running = [one for one in rig.engine._scheduler.sequences.values() if one.phase is Phase.RUNNING]
    return min(running, key=lambda one: (one.work.priority, one.arrival)).key if running else None


@given(asked=st.lists(st.tuples(prompts, samplings, priorities, st.integers(0, 6)), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_who_is_first_in_rank_never_gives_way_and_all_come_to_their_end(
    asked: list[tuple[tuple[int, ...], SamplingParams, int, int]],
) -> None:
    rig = Rig(blocks=BLOCKS)

    def step() -> None:
        first = first_in_rank(rig)
        rig.step()
        sequences = rig.engine._scheduler.sequences
        assert first not in sequences or sequences[first].phase is Phase.RUNNING

    for number, (prompt, sampling, priority, steps) in enumerate(asked):
        rig.engine.submit(work(f"r{number}", prompt, sampling, priority=priority))
        for _ in range(steps):
            step()
    while rig.engine.has_work():
        assert rig.steps < MAX_STEPS
        step()
    for number, (prompt, sampling, _, _) in enumerate(asked):
        assert rig.tokens(f"r{number}") == expected(prompt, sampling)
    rig.assert_idle()
