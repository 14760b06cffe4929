"""The batch scheduler: which sequences hold blocks, which give theirs up, and what the next step computes.

The idea: every sequence just has known tokens, and computed ones that must catch up. A plan gives each running sequence
the blocks for what it knows (taking them from the youngest if none are left), admits waiting ones as long as the
running ones keep room to grow, and leaves the sharing out of tokens to `policies.batch`. Nothing here is thread-safe;
the engine calls it under its lock.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from msgspec import Struct

from bascule.engine.sequence import Key, Phase, Sequence
from bascule.errors import ConfigError
from bascule.kv.books import Books, Lease
from bascule.policies.batch import BatchLimits, Pace, Row, grant_tokens
from bascule.types import BlockHash, CostModel


class EngineLimits(Struct, frozen=True, kw_only=True):
    """How much an engine takes on at once. Raises ConfigError if the limits contradict each other."""

    max_sequences: int
    """Sequences that compute at the same time; adopted and kept ones may come on top."""
    chunk_tokens: int
    """Most tokens of one sequence in one step."""
    step_tokens: int
    """Most tokens in one step; at least `max_sequences`, so that prefill goes on however many streams decode."""
    prefix_cache: bool = True
    gap_s: float = 0.0
    """Seconds that a step should take at most while streams run, for the sake of their gaps; 0 for any."""

    def __post_init__(self) -> None:
        if min(self.max_sequences, self.chunk_tokens) < 1:
            raise ConfigError(f"max-sequences ({self.max_sequences}) and chunk-tokens ({self.chunk_tokens}) start at 1")
        if self.step_tokens < self.max_sequences:
            raise ConfigError(
                f"step-tokens is {self.step_tokens}, but must be at least max-sequences ({self.max_sequences}): "
                "each running stream computes a token in every step"
            )


class Grant(NamedTuple):
    """A sequence's part in a step."""

    sequence: Sequence
    tokens: int


class Scheduler:
    """The sequences of one engine by phase, and the plan for its next step."""

    def __init__(self, books: Books, limits: EngineLimits) -> None:
        self.sequences: dict[Key, Sequence] = {}
        self.waiting: deque[Sequence] = deque()
        self.hit_tokens = 0
        """Prompt tokens found in the prefix cache, each request's counted once."""
        self.cost = CostModel()
        """What a step is expected to take, as last fitted."""
        self._books = books
        self._max_sequences = limits.max_sequences
        self._batch = BatchLimits(chunk_tokens=limits.chunk_tokens, step_tokens=limits.step_tokens, gap_s=limits.gap_s)
        self._pace = Pace()
        self._running: list[Sequence] = []
        """In order of arrival."""
        self._stuck_at: int | None = None
        """Available blocks when a plan came out empty; planning again makes no sense before there are others."""

    @property
    def full(self) -> bool:
        """As many sequences compute as may."""
        return len(self._running) >= self._max_sequences

    @property
    def runnable(self) -> bool:
        """A plan could have something in it."""
        return bool(self._running or self.waiting) and self._stuck_at != self._available()

    def enqueue(self, sequence: Sequence) -> None:
        self.sequences[sequence.key] = sequence
        self.waiting.append(sequence)
        self._stuck_at = None

    def adopt(self, sequence: Sequence) -> None:
        """Take in a sequence that has its blocks already."""
        self.sequences[sequence.key] = sequence
        self._run(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence of any phase and release its blocks."""
        del self.sequences[sequence.key]
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
        sequence.give_up_blocks()
        self._stuck_at = None

    def rest(self, sequence: Sequence, phase: Phase) -> None:
        """Take a running handoff out of the batch: PAUSED or PARKED. It keeps its blocks."""
        self._running.remove(sequence)
        sequence.phase = phase

    def resume(self, sequence: Sequence) -> None:
        """Put a paused or parked sequence back into the batch; others go on as they are."""
        if sequence.phase in (Phase.PAUSED, Phase.PARKED):
            sequence.phase = Phase.RUNNING
            self._run(sequence)

    def plan(self) -> list[Grant]:
        """The next step: at most one grant a sequence; empty if nothing can run before memory is freed."""
        ready = [sequence for sequence in tuple(self._running) if self._make_room(sequence)]
        ready = sorted([*ready, *self._admit()], key=_by_arrival)
        rows = [Row(sequence.computed, len(sequence.tokens)) for sequence in ready]
        tokens = grant_tokens(rows, self._batch, self._pace)
        plan = [Grant(sequence, count) for sequence, count in zip(ready, tokens, strict=True) if count]
        self._stuck_at = None if plan else self._available()
        return plan

    def took(self, plan: Tokens[Grant], seconds: float) -> None:
        """A planned step is over; plans to come go by how long it took."""
        streams = sum(grant.tokens == 1 for grant in plan)
        prompt_tokens = sum(grant.tokens for grant in plan) - streams
        self._pace = self._pace.after(prompt_tokens, streams, seconds)

    def acquire(self, hashes: Tokens[BlockHash], tokens: Tokens[int], blocks: int, room: int) -> Lease | None:
        """Lease `blocks` blocks, but leave one for every running sequence that may need it next; None if too few."""
        lease = self._books.acquire(hashes, tokens, blocks, room)
        if lease is not None and self._available() < len(self._preemptible()):
            lease.release()
            return None
        return lease

    def check_integrity(self) -> list[str]:
        """Every line names a sequence that is not where its phase says, or a block that two may write."""
        wrong = [line for sequence in self.sequences.values() for line in sequence.check_integrity()]
        listed = {
            Phase.WAITING: Counter(sequence.key for sequence in self.waiting),
            Phase.RUNNING: Counter(sequence.key for sequence in self._running),
        }
        for phase, keys in listed.items():
            if keys != Counter(key for key, sequence in self.sequences.items() if sequence.phase is phase):
                wrong.append(f"the {phase.name.lower()} sequences are not those listed: {sorted(keys)}")
        owners = Counter(block for sequence in self.sequences.values() for block in sequence.private_blocks())
        wrong += [f"block {block} is private to {count} sequences" for block, count in owners.items() if count > 1]
        return wrong

    def _run(self, sequence: Sequence) -> None:
        insort(self._running, sequence, key=_by_arrival)
        self._stuck_at = None

    def _available(self) -> int:
        counts = self._books.counts
        return counts.free + counts.cached

    def _preemptible(self) -> list[Sequence]:
        """Running sequences that grow here, oldest first. A handoff's blocks are being read by a peer."""
        return [sequence for sequence in self._running if not sequence.handoff]

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all it knows; False if it has to sit this step out.

        The youngest gives its blocks up first, which may be this one. The only one that could give up waits with what
        it has: starting over would not bring it further.
        """
        if sequence.phase is not Phase.RUNNING:
            return False
        while sequence.blocks_missing and not sequence.lease.extend(sequence.blocks_missing):
            candidates = self._preemptible()
            if len(candidates) < 2:
                return False
            youngest = candidates[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it is next to be admitted, and recomputes what is not found in the cache then."""
        self._running.remove(sequence)
        sequence.give_up_blocks()
        self.waiting.appendleft(sequence)

    def _admit(self) -> list[Sequence]:
        """Start waiting sequences, first come first served, while there are blocks for all they know."""
        admitted: list[Sequence] = []
        while self.waiting and not self.full:
            head = self.waiting[0]
            lease = self.acquire(head.findable, head.tokens, head.blocks_known, head.blocks_foreseen)
            if lease is None:
                break
            self.waiting.popleft()
            self.hit_tokens += head.admit(lease)
            self._run(head)
            admitted.append(head)
        return admitted


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival
