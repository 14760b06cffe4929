"""The engine in virtual time: the real one's books, sequences and scheduler; a step is begun, and ended later.

Where nothing but streams can run until something new comes, many steps go at once: a span. It ends with the step in
which the first of its streams ends, or with the one that runs when something new comes, and leaves everything as if its
steps had been made one by one.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import cast

from msgspec import Struct

from bascule.engine.core import Engine, EngineLimits, StepResult
from bascule.engine.protocol import Sampled, Slice
from bascule.engine.scheduler import Grant
from bascule.engine.sequence import Key, Sequence, Work
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.policies.cost import PrefillPart, decode_seconds, step_seconds
from bascule.sim.spans import Span
from bascule.sim.text import Text
from bascule.types import BlockHash, CostModel, ModelCard

_DRAWN = Sampled(0)
LONGEST_SPAN = 256
"""Steps: blocks for all of them have to be there when a span begins."""


class Streamed(Struct, frozen=True):
    """Tokens that came to a stream in a span: the first at `first_at`, the last `last_s` after the one before it."""

    key: Key
    tokens: int
    first_at: float
    last_at: float
    last_s: float


class SimSequence(Sequence):
    """A sequence that can take many steps at once, and whose tokens may be a `Text`."""

    told = False
    """Its first token here has been sent."""

    def leap(self, steps: int, now: float) -> None:
        """So many steps of one token each have ended, the last of them now."""
        size = self._block_size
        missing = -(-(len(self.tokens) + steps) // size) - len(self.lease.blocks)
        if missing > 0 and not self.lease.extend(missing):
            raise RuntimeError(f"{self.key} has no blocks for {steps} steps that were planned")
        self.tokens.extend((0,) * steps)
        self._gaps += steps
        self._last_s = now
        self.advance(steps)

    def _known(self, work: Work) -> list[int]:
        prompt = cast(Tokens[int], work.prompt)
        if isinstance(prompt, Text):
            return cast(list[int], prompt + work.generated)
        return super()._known(work)


class SimEngine(Engine):
    """An engine whose steps take the time that a cost model says, and compute nothing."""

    def __init__(
        self, card: ModelCard, books: Books, hasher: BlockHasher, limits: EngineLimits, cost: CostModel
    ) -> None:
        super().__init__(_NoRunner(card), cast(Arena, _NoArena()), books, hasher, limits, lambda: self.moment)
        self.moment = 0.0
        """Now; whoever calls anything sets it first."""
        self.span: Span | None = None
        """The span that runs now, if it has more than a step."""
        self.cost = cost
        self._plan: list[Grant] = []
        self._planned = StepResult()

    def begin(self) -> float | None:
        """Begin a step or a span; returns the seconds until it ends, or None where there is nothing to run."""
        self._adopted_blocks.clear()
        plan = self._plan = self._scheduler.plan(self.moment)
        if not plan:
            return None
        self._planned = self._news()
        prefill: list[PrefillPart] = []
        streams = context = 0
        for sequence, tokens in plan:
            sequence.granted = tokens
            if tokens == 1 and sequence.computed:
                streams += 1
                context += sequence.computed
            else:
                prefill.append(PrefillPart(tokens, sequence.computed))
        if prefill:
            return step_seconds(self.cost, prefill, streams, context)
        first_s = decode_seconds(self.cost, streams, context)
        steps = self._span_of(plan)
        if steps < 2:
            return first_s
        self.span = Span(self.moment, first_s, self.cost.context_s * streams, steps)
        return self.span.seconds(steps)

    def end(self) -> tuple[StepResult, list[Streamed]]:
        """The step or span ends now; returns what its last step brought, and what came before that."""
        before: list[Streamed] = []
        if self.span is not None:
            before = self._settle(self.span, self.span.steps - 1)
            self.span = None
        sampled = [_DRAWN if tokens == sequence.behind else None for sequence, tokens in self._plan]
        result = self._apply(self._plan, sampled, self.moment, self._planned)
        self._plan = []
        return result, before

    def interrupt(self) -> tuple[float, list[Streamed]] | None:
        """Something new comes: the span ends with the step that runs now. Returns when, and what came until now; None
        where no span runs."""
        span = self.span
        if span is None:
            return None
        done = span.done(self.moment)
        before = self._settle(span, done)
        self.span = None
        return span.begun + span.seconds(done + 1), before

    def sequence(self, key: Key) -> SimSequence | None:
        """One that is here."""
        return cast(SimSequence | None, self._scheduler.sequences.get(key))

    def cached_blocks(self, names: Tokens[BlockHash]) -> int:
        """How many leading ones of these are in the prefix cache."""
        return self._books.count_cached(names)

    def _span_of(self, plan: list[Grant]) -> int:
        """Steps until something ends, if nothing but these streams can run until then."""
        scheduler = self._scheduler
        if len(plan) < scheduler.running or (scheduler.waiting and not scheduler.is_full()):
            return 1
        steps = LONGEST_SPAN
        for sequence, _ in plan:
            if sequence.behind != 1 or not cast(SimSequence, sequence).told or sequence.handoff:
                return 1
            steps = min(steps, sequence.work.sampling.max_tokens - sequence.drawn)
        size, counts = self._books.block_size, self._books.counts
        blocks = sum(-(-(len(each.tokens) + steps) // size) - len(each.lease.blocks) for each, _ in plan)
        return steps if blocks <= counts.free + counts.cached else 1

    def _settle(self, span: Span, steps: int) -> list[Streamed]:
        """Make the span's first steps true."""
        if not steps:
            return []
        first_at, last_at = span.begun + span.first_s, span.begun + span.seconds(steps)
        last_s = span.first_s + span.more_s * (steps - 1)
        told = []
        for sequence, _ in self._plan:
            cast(SimSequence, sequence).leap(steps, last_at)
            told.append(Streamed(sequence.key, steps, first_at, last_at, last_s))
        return told

    def _sequence(self, work: Work) -> Sequence:
        return SimSequence(work, next(self._arrivals), self.moment, self._books.block_size, self._hasher)

    def _check_known(self, prompt: Tokens[int]) -> None:
        """Any token will do."""


class _NoRunner:
    """Says what model it would be."""

    stop_tokens: frozenset[int] = frozenset()

    def __init__(self, card: ModelCard) -> None:
        self.card = card

    def bind(self, arena: Arena) -> None: ...

    def execute(self, batch: Tokens[Slice]) -> list[Sampled | None]:
        raise RuntimeError("a simulated engine has no model: its steps are made by `begin` and `end`")

    def publish(self, blocks: Tokens[int]) -> None: ...

    def absorb(self, blocks: Tokens[int]) -> None: ...


class _NoArena:
    """Where no KV is."""

    def prepare(self, blocks: int) -> None: ...
