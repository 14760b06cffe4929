"""The engine: a runner, the books of its KV memory and a scheduler, stepped by one thread and steered by any."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from itertools import count
from threading import Lock

from msgspec.structs import replace

from bascule.engine.protocol import Runner, Sampled, Slice
from bascule.engine.scheduler import EngineLimits, Grant, Scheduler
from bascule.engine.sequence import Found, Key, Output, Phase, Progress, Sequence, Work, blocks_for
from bascule.engine.work import EngineLoad, Failure, StepResult, UnderWay, check_fits
from bascule.kv.arena import Arena
from bascule.kv.books import Books, Lease
from bascule.kv.hashing import BlockHasher
from bascule.policies.cost_fit import StepSample, predicted, step_sample
from bascule.types import BlockHash, CostModel, RequestId, Salt

__all__ = ["Engine", "EngineLimits", "EngineLoad", "Failure", "Found", "Output", "Progress", "StepResult", "Work"]

logger = logging.getLogger(__name__)

_SAMPLES = 256
"""Latest steps that are remembered for whoever fits a cost model."""


class Engine:
    """Continuous batching over one runner. One thread calls `step`; everything else may be called from any thread.

    No call waits for a running step: the lock is held for bookkeeping only, and the runner executes outside it.
    `take_found`, `hold`, `go`, `permit`, `keep`, `release` and `cancel` do nothing for a sequence that is not (or no
    longer) here.
    """

    def __init__(
        self,
        runner: Runner,
        arena: Arena,
        books: Books,
        hasher: BlockHasher,
        limits: EngineLimits,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Binds `runner` to `arena`, of whose blocks `books` keeps account; `now` (s) tells how long streams wait."""
        self.publishes = False
        """All computed blocks are to be read in the arena, those of handoffs in any case. Set before the first step."""
        self._now = now
        runner.bind(arena)
        self._runner = runner
        self._arena = arena
        self._books = books
        self._hasher = hasher if limits.prefix_cache else None
        self._scheduler = Scheduler(books, limits)
        self._lock = Lock()
        self._arrivals = count()
        self._adopted_blocks: list[int] = []
        """Written into the arena by a peer, and not yet on the device."""
        self._samples: deque[StepSample] = deque(maxlen=_SAMPLES)
        self._steps = 0
        """Begun so far."""
        self._batch: list[Slice] = []
        """Of the step that is being computed."""

    @property
    def cost(self) -> CostModel:
        """What steps are expected to take: beside streams, prompts are cut by it."""
        return self._scheduler.cost

    @cost.setter
    def cost(self, cost: CostModel) -> None:
        with self._lock:
            self._scheduler.cost = cost

    def submit(self, work: Work) -> None:
        """Queue a request.

        Raises InvalidRequest if it can never fit, ValueError if the same attempt is already here.
        """
        check_fits(work, self._runner.card, self._books.num_blocks * self._books.block_size)
        sequence = self._sequence(work)
        with self._lock:
            self._check_new(sequence.key)
            self._scheduler.enqueue(sequence)

    @property
    def most_tokens(self) -> int:
        """Of one request, prompt and output together."""
        return min(self._runner.card.context, self._books.num_blocks * self._books.block_size)

    def has(self, request: RequestId, attempt: int) -> bool:
        """Whether that attempt is here."""
        with self._lock:
            return Key(request, attempt) in self._scheduler.sequences

    def adopt(self, work: Work, lease: Lease) -> None:
        """Decode on from handed-over KV.

        The blocks of `lease` hold the verified KV of prompt and generated tokens but the last of these, which is still
        to be computed. The lease is the engine's from here on, unless adopt raises: InvalidRequest if the request can
        never fit, ValueError if the blocks are too few or the same attempt is already here.
        """
        check_fits(work, self._runner.card, self._books.num_blocks * self._books.block_size)
        sequence = self._sequence(work)
        held = blocks_for(len(sequence.tokens) - 1, self._books.block_size)
        if not work.generated or len(lease.blocks) < held:
            raise ValueError(
                f"a handoff brings its first token and {held} blocks, not "
                f"{len(work.generated)} tokens and {len(lease.blocks)} blocks"
            )
        with self._lock:
            self._check_new(sequence.key)
            self._adopted_blocks += lease.blocks[lease.cached : held]
            sequence.take_over(lease)
            self._scheduler.adopt(sequence)

    def reserve(
        self, prompt: tuple[int, ...], total_tokens: int, room_tokens: int = 0, *, coming: int = 0, salt: Salt = b""
    ) -> Lease | None:
        """Blocks for a handoff to this engine: of `total_tokens`, with room foreseen for `room_tokens` more.

        The lease starts with the blocks of `prompt` under `salt` that are here already (`lease.cached` of them). None
        if there are not enough now, keeping a block for each running sequence, or if as many sequences run as may, with
        the `coming` ones that have such a lease already. Release the lease, or give it to `adopt`.
        """
        hashes = self._hasher.chain(prompt, salt) if self._hasher else []
        size = self._books.block_size
        with self._lock:
            if self._scheduler.is_full(coming):
                return None
            lease = self._scheduler.acquire(
                hashes, prompt, blocks_for(total_tokens, size), blocks_for(room_tokens, size)
            )
        self._arena.prepare(self._books.high_water)
        return lease

    def borrow(self, hashes: Tokens[BlockHash], tokens: Tokens[int], blocks: int, room_blocks: int = 0) -> Lease | None:
        """`blocks` blocks for whoever has a prompt's KV from elsewhere, with room foreseen for `room_blocks` more.

        The lease starts with those of `hashes` (full blocks of `tokens`) that are cached here: `lease.cached` of them.
        None if there are not enough now, keeping a block for each running sequence. What is written to the others is
        told to `take_in`, then sealed.
        """
        with self._lock:
            lease = self._scheduler.acquire(hashes, tokens, blocks, room_blocks)
        self._arena.prepare(self._books.high_water)
        return lease

    def widen(self, lease: Lease, blocks: int) -> bool:
        """`blocks` more for a lease that was borrowed; False (nothing changed) if there are not enough now."""
        with self._lock:
            done = self._scheduler.widen(lease, blocks)
        self._arena.prepare(self._books.high_water)
        return done

    def take_in(self, blocks: Tokens[int]) -> None:
        """The arena's bytes of `blocks` are new: the device gets them before the next step."""
        with self._lock:
            self._adopted_blocks += blocks

    def take_found(self, request: RequestId, attempt: int, end: int | None = None) -> bool:
        """Let a prompt that is computed hold what has just been sealed of it, in place of blocks of its own; where that
        comes from the back, `end` is the place behind the first of them.

        It does so before each step, too; but then those may have been evicted. False if no more of it is of use.
        """
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            if sequence is None or sequence.phase is Phase.WAITING:
                return True
            return sequence.behind > 1 and sequence.take_found(end)

    def hold(self, request: RequestId, attempt: int, blocks: int) -> None:
        """A sequence that waits for memory is not computed before `go` if it finds fewer than its first `blocks` in
        the cache when it gets some; `StepResult.admitted` says so. Does nothing for one that has memory."""
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            if sequence is not None and sequence.phase is Phase.WAITING:
                sequence.awaited = blocks

    def go(self, request: RequestId, attempt: int) -> None:
        """Compute what has not been found of a sequence."""
        with self._lock:
            if (sequence := self._scheduler.sequences.get(Key(request, attempt))) is not None:
                self._scheduler.go(sequence)

    def secure(self, request: RequestId, attempt: int) -> bool:
        """Whether a handoff has memory here, or is about to get some whatever else happens: only then may it keep
        blocks of the decode side. True for one that is not here."""
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            return sequence is None or self._scheduler.secure(sequence)

    def permit(self, request: RequestId, attempt: int) -> None:
        """The decode side has reserved its blocks: a handoff may compute beyond its first chunk."""
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            if sequence is None:
                return
            sequence.permitted = True
            if sequence.phase is Phase.PAUSED:
                self._scheduler.resume(sequence)

    def keep(self, request: RequestId, attempt: int) -> None:
        """Decode here after all: a handoff becomes an ordinary sequence, whose blocks no peer may read any more."""
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            if sequence is not None and sequence.handoff:
                sequence.handoff = False
                self._scheduler.resume(sequence)

    def release(self, request: RequestId, attempt: int) -> None:
        """The decode side has taken a parked handoff over: its blocks are let go (full ones remain cached)."""
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            if sequence is not None and sequence.phase is Phase.PARKED:
                self._scheduler.remove(sequence)

    def cancel(self, request: RequestId, attempt: int) -> None:
        """Drop a sequence without further output: now, or at the end of the running step if it is part of that."""
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            if sequence is None:
                return
            sequence.cancelled = True
            if not sequence.in_step:
                self._scheduler.remove(sequence)

    def keys(self) -> list[Key]:
        """Of all sequences that are here, in whatever phase."""
        with self._lock:
            return list(self._scheduler.sequences)

    def step(self) -> StepResult:
        """Compute one step over all sequences that can run, and say what came of it.

        If the runner raises, the sequences of this step fail, and the others go on.
        """
        woken = self._now()
        with self._lock:
            plan = self._scheduler.plan(woken)
            batch = [sequence.slice(tokens) for sequence, tokens in plan]
            handed_in = tuple(self._adopted_blocks)
            handed_out = [
                block
                for sequence, tokens in plan
                if sequence.handoff or self.publishes
                for block in sequence.unpublished(tokens, cached=not self.publishes)
            ]
            for sequence, tokens in plan:
                sequence.granted = tokens
            news = self._news(executed=bool(plan))
            if not plan:
                return news
            self._steps, self._batch = self._steps + 1, batch
        self._arena.prepare(self._books.high_water)
        try:
            sampled = self._execute(batch, handed_in, handed_out)
        except Exception as error:
            logger.exception("a step over %d sequences failed", len(plan))
            with self._lock:
                self._batch = []
                return self._fail(plan, f"the engine step failed: {type(error).__name__}: {error}", news)
        with self._lock:
            self._batch = []
            del self._adopted_blocks[: len(handed_in)]
            result = self._apply(plan, sampled, self._now(), news)
            # A token takes planning and bookkeeping too: a tenth of a small model's step.
            seconds = self._now() - woken
            self._samples.append(step_sample(((part.start, len(part.tokens)) for part in batch), seconds))
            return result

    def under_way(self) -> UnderWay | None:
        """The step that is being computed; None between steps."""
        with self._lock:
            steps, batch = self._steps - 1, self._batch
        if not batch:
            return None
        sample = step_sample(((part.start, len(part.tokens)) for part in batch), 0.0)
        return UnderWay(steps, len(batch), float(predicted(self.cost, [sample])[0]))

    def take_samples(self) -> list[StepSample]:
        """The latest steps since the last call, in order, with their seconds from planning to tokens."""
        with self._lock:
            taken = list(self._samples)
            self._samples.clear()
            return taken

    def load(self) -> EngineLoad:
        with self._lock:
            waiting, every = len(self._scheduler.waiting), self._scheduler.sequences.values()
            behind = [sequence.to_compute for sequence in every if sequence.behind > 1]
            streams = [sequence for sequence in every if sequence.decodes]
            context = sum(len(sequence.tokens) for sequence in streams)
            return EngineLoad(
                len(every) - waiting,
                waiting,
                len(behind),
                sum(behind),
                len(streams),
                context,
                self._scheduler.slack(streams, context, self._now()),
            )

    def has_work(self) -> bool:
        """Something is runnable now; False while all that is here waits for memory, a permission or a release."""
        with self._lock:
            return self._scheduler.runnable

    def is_starved(self, request: RequestId, attempt: int, taken: int = 0) -> bool:
        """Whether a sequence waits, and for nothing but memory, or would if `taken` blocks of that were held."""
        with self._lock:
            sequence = self._scheduler.sequences.get(Key(request, attempt))
            return sequence is not None and self._scheduler.is_starved(sequence, taken)

    def check_integrity(self) -> list[str]:
        """Every line names a lie in the books or in a sequence's state. Empty means clean."""
        with self._lock:
            return [*self._books.check_integrity(), *self._scheduler.check_integrity()]

    def _sequence(self, work: Work) -> Sequence:
        return Sequence(work, next(self._arrivals), self._now(), self._books.block_size, self._hasher)

    def _check_new(self, key: Key) -> None:
        if key in self._scheduler.sequences:
            raise ValueError(f"request {key.request}, attempt {key.attempt} is already in this engine")

    def _execute(self, batch: list[Slice], handed_in: Tokens[int], handed_out: Tokens[int]) -> list[Sampled | None]:
        if handed_in:
            self._runner.absorb(handed_in)
        sampled = self._runner.execute(batch)
        if [token is not None for token in sampled] != [part.sampling is not None for part in batch]:
            raise RuntimeError("the runner did not draw a token for each slice that wants one, and for no other")
        if handed_out:
            self._runner.publish(handed_out)
        return sampled

    def _fail(self, plan: list[Grant], message: str, news: StepResult) -> StepResult:
        failed = []
        for sequence, _ in plan:
            self._scheduler.remove(sequence)
            if not sequence.cancelled:
                key = sequence.key
                failed.append(Failure(request=key.request, attempt=key.attempt, message=message))
        return replace(news, failed=failed)

    def _news(self, *, executed: bool = True) -> StepResult:
        """What the plan just made has brought about already."""
        news = StepResult(found=self._scheduler.found, admitted=self._scheduler.admitted, executed=executed)
        self._scheduler.found, self._scheduler.admitted = [], []
        return news

    def _apply(self, plan: list[Grant], sampled: list[Sampled | None], now: float, news: StepResult) -> StepResult:
        outputs: list[Output] = []
        progress: list[Progress] = []
        computed = sum(sequence.of_prompt(tokens) for sequence, tokens in plan)
        for (sequence, tokens), drawn in zip(plan, sampled, strict=True):
            sequence.granted = 0
            if sequence.cancelled:
                self._scheduler.remove(sequence)
                continue
            sequence.advance(tokens)
            output = sequence.append(drawn, self._runner.stop_tokens, now) if drawn is not None else None
            if output is not None:
                outputs.append(output)
            if output is not None and output.finish is not None:
                self._scheduler.remove(sequence)
            elif sequence.handoff:
                progress.append(sequence.progress())
                self._rest(sequence)
        return replace(news, outputs=outputs, progress=progress, computed_tokens=computed)

    def _rest(self, sequence: Sequence) -> None:
        """Take a handoff out of the batch after a chunk, unless it may go on with the next."""
        if sequence.drawn > len(sequence.work.generated):
            self._scheduler.rest(sequence, Phase.PARKED)
        elif not sequence.permitted:
            self._scheduler.rest(sequence, Phase.PAUSED)
