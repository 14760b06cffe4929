"""The batch scheduler: which sequences hold blocks, which give theirs up, and what the next step computes.

The idea: every sequence just has known tokens, and computed ones that must catch up. A plan gives each running sequence
the blocks for what it knows (taking them from the last in rank if none are left), admits waiting ones as long as the
running ones keep room to grow, lets prompts jump over what has meanwhile come into the cache, and leaves the sharing
out of tokens to `policies.batch`. Nothing here is thread-safe; the engine calls it under its lock.

Those that wait go by priority, and within one in the order of `policies.order`: first those that have begun, then the
shortest uncached prompt, with ageing; and so do running prompts in the step's tokens. Nobody overtakes the first in
line, even if only the first lacks memory: a large prompt is passed by the shorter ones of the time that it takes
itself, and then memory gathers for it. Only who waits for a sibling to compute what they share lets others by. Who
gives blocks up goes by rank, which is priority and then arrival, so that the oldest of the best priority always comes
to its end.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from msgspec import Struct

from bascule.engine.sequence import Found, Key, Phase, Sequence
from bascule.engine.work import Admitted
from bascule.errors import ConfigError
from bascule.kv.books import Books, Lease
from bascule.policies.batch import ASSUMED_COST, BatchLimits, Row, grant_tokens, slack_seconds
from bascule.policies.cost import PrefillPart, part_seconds
from bascule.policies.order import place_in_line
from bascule.types import BlockHash, CostModel, Slo


class EngineLimits(Struct, frozen=True, kw_only=True):
    """How much an engine takes on at once. Raises ConfigError if the limits contradict each other."""

    max_sequences: int
    """Sequences that compute at the same time; adopted and kept ones may come on top."""
    chunk_tokens: int
    """Most tokens of one sequence in one step."""
    step_tokens: int
    """Most tokens in one step; at least `max_sequences`, so that prefill goes on however many streams decode."""
    prefix_cache: bool = True
    slo: Slo = Slo()
    """Of requests that bring none: beside their streams, prompts are cut to keep gap and TPOT."""

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
        self.waiting: list[Sequence] = []
        """The next to be admitted first."""
        self.cost = CostModel()
        """What steps are expected to take; all zeros while nothing is known."""
        self.found: list[Found] = []
        """What sequences were spared since somebody last took this list."""
        self.admitted: list[Admitted] = []
        """Who got blocks and lacks KV that a store may have, since somebody last took this list."""
        self._books = books
        self._max_sequences = limits.max_sequences
        self._slo = limits.slo
        self._batch = BatchLimits(chunk_tokens=limits.chunk_tokens, step_tokens=limits.step_tokens)
        self._running: list[Sequence] = []
        """By rank: those that keep their blocks longest first."""
        self._stuck_at: int | None = None
        """Available blocks when a plan came out empty; planning again makes no sense before there are others."""

    @property
    def running(self) -> int:
        """Sequences that compute, handoffs at rest left out."""
        return len(self._running)

    def is_full(self, coming: int = 0) -> bool:
        """As many sequences compute as may, with `coming` more that have been promised a place."""
        return len(self._running) + coming >= self._max_sequences

    @property
    def runnable(self) -> bool:
        """A plan could have something in it."""
        return bool(self._running or self.waiting) and self._stuck_at != self._available()

    def is_starved(self, sequence: Sequence, taken: int) -> bool:
        """Whether a sequence waits, and memory is too short for it if `taken` blocks are, and if it shares none."""
        if sequence.phase is not Phase.WAITING or self.is_full():
            return False
        return self._available() - taken < sequence.blocks_known + len(self._preemptible())

    def secure(self, sequence: Sequence) -> bool:
        """Whether a sequence has memory, or will get some without anybody ending first; then it goes before all others.

        Else it and one that has memory might wait for each other, if it had blocks elsewhere that the other needs.
        """
        if sequence.phase is not Phase.WAITING or sequence.secured:
            return True
        wanted = sum(each.blocks_known + 1 for each in self.waiting)
        if len(self._running) + len(self.waiting) > self._max_sequences:
            return False
        if wanted > self._available() - len(self._preemptible()):
            return False
        self.waiting.remove(sequence)
        sequence.secured = True
        self._wait(sequence)
        return True

    def enqueue(self, sequence: Sequence) -> None:
        self.sequences[sequence.key] = sequence
        self._wait(sequence)
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

    def go(self, sequence: Sequence) -> None:
        """Nothing is awaited for a sequence any more."""
        sequence.awaited, sequence.held = 0, False
        self._stuck_at = None

    def plan(self, now: float) -> list[Grant]:
        """A step that begins at `now`: at most one grant a sequence; empty if nothing can run before memory is free."""
        ready = [each for each in tuple(self._running) if not each.held and self._make_room(each)]
        ready = sorted([*ready, *self._admit()], key=_by_place)
        for sequence in ready:
            if sequence.behind > 1:
                self._note(sequence.catch_up())
        rows = [Row(each.computed, len(each.tokens), each.stream(self._slo, now)) for each in ready]
        tokens = grant_tokens(rows, self._batch, self._reckoned)
        plan = [Grant(each, each.room_for(count)) for each, count in zip(ready, tokens, strict=True) if count]
        self._stuck_at = None if plan else self._available()
        return plan

    def slack(self, streams: Tokens[Sequence], context: int, now: float) -> float | None:
        """What prompts may take from `streams`, of `context` tokens together; see `policies.batch.slack_seconds`."""
        readers = [reader for each in streams if (reader := each.stream(self._slo, now)) is not None]
        return slack_seconds(readers, context, self._reckoned)

    def acquire(self, hashes: Tokens[BlockHash], tokens: Tokens[int], blocks: int, room: int) -> Lease | None:
        """Lease `blocks` blocks, but leave one for every running sequence that may need it next; None if too few."""
        lease = self._books.acquire(hashes, tokens, blocks, room)
        if lease is not None and self._available() < len(self._preemptible()):
            lease.release()
            return None
        return lease

    def widen(self, lease: Lease, blocks: int) -> bool:
        """Append `blocks` to a lease, but leave one for every running sequence that may need it next; else False."""
        return self._available() - blocks >= len(self._preemptible()) and lease.extend(blocks)

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

    @property
    def _reckoned(self) -> CostModel:
        """The cost model, or one to begin with where none says what a prompt's tokens cost."""
        return self.cost if self.cost.token_s or self.cost.pair_s else ASSUMED_COST

    def _rank(self, sequence: Sequence, cached: int) -> None:
        """Set a sequence's place in line, if `cached` blocks of what it knows need not be computed."""
        priority = sequence.work.priority
        if sequence.secured:
            sequence.place = (_FIRST, *place_in_line(0, 0.0, sequence.arrived_s))
            return
        if sequence.has_begun:
            sequence.place = (priority, *place_in_line(0, 0.0, sequence.arrived_s))
            return
        context = cached * self._books.block_size
        work_s = part_seconds(self._reckoned, PrefillPart(len(sequence.tokens) - context, context))
        sequence.place = (priority, *place_in_line(1, work_s, sequence.arrived_s))

    def _wait(self, sequence: Sequence) -> None:
        self._rank(sequence, self._books.count_cached(sequence.findable))
        insort(self.waiting, sequence, key=_by_place)

    def _run(self, sequence: Sequence) -> None:
        insort(self._running, sequence, key=_by_rank)
        self._stuck_at = None

    def _available(self) -> int:
        counts = self._books.counts
        return counts.free + counts.cached

    def _preemptible(self) -> list[Sequence]:
        """Running sequences that grow here, by rank. A handoff's blocks are being read by a peer."""
        return [sequence for sequence in self._running if not sequence.handoff]

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all it knows; False if it has to sit this step out.

        The last in rank gives its blocks up first, which may be this one. The only one that could give up waits with
        what it has: starting over would not bring it further.
        """
        if sequence.phase is not Phase.RUNNING:
            return False
        while sequence.blocks_missing and not sequence.lease.extend(sequence.blocks_missing):
            candidates = self._preemptible()
            if len(candidates) < 2:
                return False
            last = candidates[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it is the next of its priority to be admitted, and recomputes what is not found in
        the cache then."""
        self._running.remove(sequence)
        sequence.give_up_blocks()
        self._wait(sequence)

    def _admit(self) -> list[Sequence]:
        """Start waiting sequences in their order while there are blocks for all they know."""
        admitted: list[Sequence] = []
        if self.waiting and not self.is_full():
            self._look_again()
        for head in tuple(self.waiting):
            if self.is_full():
                break
            if self._sibling_computes(head):
                continue
            lease = self.acquire(head.findable, head.tokens, head.blocks_known, head.blocks_foreseen)
            if lease is None:
                break
            self.waiting.remove(head)
            head.secured = False  # it has what it went first for, and is computed in its turn
            self._rank(head, lease.cached)
            self._note(head.admit(lease))
            if (lacking := head.admitted) is not None:
                self.admitted.append(lacking)
            self._run(head)
            if not head.held:
                admitted.append(head)
        return admitted

    def _note(self, found: Found | None) -> None:
        if found is not None:
            self.found.append(found)

    def _sibling_computes(self, sequence: Sequence) -> bool:
        """Whether one in the batch is about to compute a good part of this one's prompt: it is spared by waiting.

        Hashes are chained, so that equal ones at the same place mean that all before is equal too.
        """
        at, hashes = -1, sequence.findable
        for sibling in self._running:
            if sibling.behind > 1 and len(hashes) >= _WORTH_WAITING and hashes[0] == sibling.first_hash:
                at = self._books.count_cached(hashes) + _WORTH_WAITING - 1 if at < 0 else at
                if at < len(hashes) and hashes[at : at + 1] == sibling.findable[at : at + 1]:
                    return True
        return False

    def _look_again(self) -> None:
        """Rank the first in line by what the cache holds now: others may have computed their prefix meanwhile."""
        for sequence in self.waiting[:_LOOKED_AT]:
            self._rank(sequence, self._books.count_cached(sequence.findable))
        self.waiting.sort(key=_by_place)


_WORTH_WAITING = 4
"""Blocks that a sibling has to compute for another to wait for them."""
_FIRST = -(1 << 62)
_LOOKED_AT = 8
"""Waiting sequences whose prefix is looked up anew before each step that could admit one."""


def _by_rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.work.priority, sequence.arrival


def _by_place(sequence: Sequence) -> tuple[tuple[int, int, float], int]:
    return sequence.place, sequence.arrival
