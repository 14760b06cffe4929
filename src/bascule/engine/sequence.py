"""One request inside an engine: what is asked, how far its KV has come, and which phase it is in.

    WAITING ---admit---> RUNNING ---ends---> (gone)
       ^                 |  ^  ^
       +----preempt------+  |  +-------------- keep -----------+
                         |  | permit, keep                     |
             first chunk v  |                                  |
                        PAUSED      RUNNING --prompt done--> PARKED ---release---> (gone)

PAUSED and PARKED are for handoffs only: a paused one waits for the decode side's reservation, a parked one holds its
blocks until the decode side has taken them over.
"""

from __future__ import annotations

from enum import Enum, auto

from bascule.engine.protocol import Sampled, Slice
from bascule.engine.work import Admitted, Found, Key, Output, Progress, Work
from bascule.kv.books import Lease
from bascule.kv.hashing import BlockHasher
from bascule.policies.batch import Stream
from bascule.types import BlockHash, FinishReason, Slo

__all__ = ["FORESEEN_TOKENS", "Found", "Key", "Output", "Phase", "Progress", "Sequence", "Work", "blocks_for"]

FORESEEN_TOKENS = 256
"""Output for which blocks are kept free behind a new sequence; most outputs are shorter than what was asked for."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


class Phase(Enum):
    WAITING = auto()
    RUNNING = auto()
    PAUSED = auto()
    PARKED = auto()


class Sequence:
    """The mutable state of one request: known tokens, the prefix of them whose KV is computed, and the lease on it.

    `arrival` orders the sequences of one engine, `arrived_s` is when it came on the engine's clock. `hasher` is None
    where nothing is looked up in or put into the cache.
    """

    def __init__(self, work: Work, arrival: int, arrived_s: float, block_size: int, hasher: BlockHasher | None) -> None:
        self.work = work
        self.key = Key(work.request, work.attempt)
        self.arrival = arrival
        self.arrived_s = arrived_s
        self.place = (work.priority, 0, arrived_s)
        """What it waits by, for blocks and for tokens of a step: `policies.order`; the scheduler's."""
        self.tokens = self._known(work)
        self.computed = 0
        self.phase = Phase.WAITING
        self.handoff = work.handoff
        """Still to be handed off; `keep` ends that."""
        self.permitted = False
        self.granted = 0
        """Tokens that the running step computes of it."""
        self.awaited = 0
        """Leading blocks that it is to have found before it is computed, or `go` after that."""
        self.held = False
        """It has blocks, but not all that are awaited: no step computes it before `go`."""
        self.secured = False
        """It waits, but blocks elsewhere may be kept for it: there are enough here for it and all others that wait."""
        self.cancelled = False
        """Cancelled while in the running step: to be dropped when that ends."""
        self.cached_tokens = 0
        """Prompt tokens found in the cache, until it has given its blocks up for the first time."""
        self._admissions = 0
        self._first_s: float | None = None
        """When its first token was drawn here, or it was taken over."""
        self._last_s = arrived_s
        """When its last token was."""
        self._gaps = 0
        """Tokens drawn since the first."""
        self._block_size = block_size
        self._hasher = hasher
        self._hashes: list[BlockHash] = hasher.chain(self.tokens, work.salt) if hasher else []
        self._lease: Lease | None = None
        self._sealed = 0
        """Leading blocks that are full and computed, and findable if there is a hasher."""
        self._published = 0
        """Leading blocks that are full and in the arena's bytes."""
        self._found_to = 0
        """Where the latest found of the blocks before `computed` end: in the arena's bytes, if all are published."""
        self._ahead: set[int] = set()
        """Places behind `computed` that have blocks from the cache, not to be written."""
        self._end_from = 0
        """From this place on, all that is `findable` is among those."""

    def _known(self, work: Work) -> list[int]:
        """The tokens that it begins with, to be appended to."""
        return [*work.prompt, *work.generated]

    @property
    def in_step(self) -> bool:
        """Part of the running step."""
        return self.granted > 0

    @property
    def behind(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.computed

    @property
    def to_compute(self) -> int:
        """Those of them that have not been found ahead."""
        return self.behind - len(self._ahead) * self._block_size

    @property
    def decodes(self) -> bool:
        """In the batch, with all computed but the token drawn last."""
        return self.phase is Phase.RUNNING and self.behind == 1

    @property
    def has_begun(self) -> bool:
        """Somebody reads its output already, or it has given way to another."""
        return self._admissions > 0 or self.drawn > 0

    @property
    def blocks_known(self) -> int:
        """Blocks that hold all known tokens."""
        return blocks_for(len(self.tokens), self._block_size)

    @property
    def blocks_missing(self) -> int:
        """Blocks wanted beyond the lease's, so that all known tokens can be computed."""
        return max(0, self.blocks_known - len(self.lease.blocks))

    @property
    def blocks_foreseen(self) -> int:
        """Blocks that the output will probably need in addition; a handoff grows elsewhere."""
        if self.handoff:
            return 0
        remaining = self.work.sampling.max_tokens - self.drawn
        return blocks_for(min(remaining, FORESEEN_TOKENS), self._block_size)

    @property
    def drawn(self) -> int:
        """Output tokens so far, given ones included."""
        return len(self.tokens) - len(self.work.prompt)

    @property
    def lease(self) -> Lease:
        """The right to its blocks; only a sequence that is not waiting has it."""
        if self._lease is None:
            raise RuntimeError(f"{self.key} is {self.phase.name.lower()} and holds no blocks")
        return self._lease

    @property
    def first_hash(self) -> BlockHash | None:
        """What its prompt begins with; None where nothing is looked up."""
        return self._hashes[0] if self._hashes else None

    @property
    def findable(self) -> list[BlockHash]:
        """Hashes to look up in the cache; the last known token is left out, for it has to be computed to draw."""
        return self._hashes[: self._places]

    @property
    def _places(self) -> int:
        """How many blocks are findable."""
        return min((len(self.tokens) - 1) // self._block_size, len(self._hashes))

    def admit(self, lease: Lease) -> Found | None:
        """Go on from what `lease` found in the cache, and say what that was."""
        self._lease = lease
        self.phase = Phase.RUNNING
        self._admissions += 1
        self._end_from = self._places
        self.held = lease.cached < self.awaited
        return self._jump(lease.cached)

    @property
    def admitted(self) -> Admitted | None:
        """What it goes on with, if it has just been admitted and lacks KV that it had before, or that is awaited."""
        resumed = self._admissions > 1 and self.computed < self._places * self._block_size
        if not (resumed or self.held):
            return None
        return Admitted(
            request=self.key.request,
            attempt=self.key.attempt,
            tokens=tuple(self.tokens),
            salt=self.work.salt,
            held=self.held,
        )

    def catch_up(self) -> Found | None:
        """Go on behind what has been found next to what is computed, and say what that was. Not while in a step."""
        self.take_found()
        to = first = blocks_for(self.computed, self._block_size)
        if self.computed == first * self._block_size:
            while to in self._ahead:
                self._ahead.discard(to)
                to += 1
        return self._jump(to) if to > first else None

    def take_found(self, end: int | None = None) -> bool:
        """Take what has come into the cache of a prompt that is computed, instead of blocks of its own.

        That is what follows, which a sibling computes, and what ends it, which is loaded from there to the front; with
        `end`, from before that place: nobody has what comes behind. Its own blocks in those places are free at once;
        what the running step writes is left alone. False if there is nothing more to be found.
        """
        if end is not None:
            self._end_from = min(self._end_from, end)
        first, places = blocks_for(self.computed + self.granted, self._block_size), self._places
        if first < places and first not in self._ahead:
            count = self.lease.swap(range(first, places), self._hashes, self.tokens)
            self._ahead.update(range(first, first + count))
        if self._end_from > first:
            count = self.lease.swap(range(self._end_from - 1, first - 1, -1), self._hashes, self.tokens)
            self._ahead.update(range(self._end_from - count, self._end_from))
            self._end_from -= count
        return self._end_from > first

    def _jump(self, to: int) -> Found | None:
        """Go on behind the block before place `to`: all from what is computed on has been found."""
        before, places = self.computed, range(self.computed // self._block_size, to)
        self.computed = to * self._block_size
        self._sealed = self._found_to = to
        if not places or self._admissions > 1:
            return None
        prompt = len(self.work.prompt)
        tokens = min(self.computed, prompt) - min(before, prompt)
        self.cached_tokens += tokens
        return Found(
            request=self.key.request, attempt=self.key.attempt, places=places, tokens=tokens, prompt_tokens=prompt
        )

    def room_for(self, count: int) -> int:
        """How many of the next `count` tokens can be computed before a block that was found."""
        for place in range(
            blocks_for(self.computed, self._block_size), blocks_for(self.computed + count, self._block_size)
        ):
            if place in self._ahead:
                return place * self._block_size - self.computed
        return count

    def of_prompt(self, count: int) -> int:
        """How many of the next `count` tokens to compute are the prompt's."""
        return max(0, min(count, len(self.work.prompt) - self.computed))

    def take_over(self, lease: Lease) -> None:
        """Go on from KV that another engine computed: of all known tokens but the last."""
        self.admit(lease)
        self._first_s = self._last_s = self.arrived_s
        self.computed = len(self.tokens) - 1
        self._seal()

    def give_up_blocks(self) -> None:
        """Release the lease, if there is one, and start over from the known tokens. Sealed blocks remain cached."""
        if self._lease is not None:
            self._lease.release()
        self._lease = None
        self.phase = Phase.WAITING
        self.computed = self._sealed = self._published = self._found_to = 0
        self._ahead.clear()

    def slice(self, count: int) -> Slice:
        """The next `count` tokens to compute; drawing one more if these are the last known."""
        end = self.computed + count
        draws = end == len(self.tokens)
        return Slice(
            tokens=self.tokens[self.computed : end],
            start=self.computed,
            blocks=self.lease.blocks,
            sampling=self.work.sampling if draws else None,
            history=self.tokens if draws else (),
            prompt_tokens=len(self.work.prompt),
        )

    def unpublished(self, count: int, *, cached: bool) -> list[int]:
        """Blocks to publish when the next `count` tokens are computed, where somebody may read them then; with those
        that were found in the cache, if they may be in the device's memory alone (`cached`)."""
        first = self._published if cached else max(self._published, self._found_to)
        # A handoff's last block is sent though it is not full; all else is only looked for in full blocks.
        full, rest = divmod(self.computed + count, self._block_size)
        return self.lease.blocks[first : full + (1 if rest and self.handoff else 0)]

    def advance(self, count: int) -> None:
        """`count` more tokens are computed, and published if anybody reads them."""
        self.computed += count
        self._published = self.computed // self._block_size
        self._seal()

    def stream(self, slo: Slo, now: float) -> Stream | None:
        """What its reader has had at `now`; `slo` is for those that ask for nothing else. None before the first token.

        Where a handoff is taken over, its reader's time counts from then on.
        """
        if self._first_s is None:
            return None
        slo = self.work.slo or slo
        return Stream(
            gap_s=slo.gap_s,
            tpot_s=slo.tpot_s,
            gaps=self._gaps,
            elapsed_s=now - self._first_s,
            since_s=now - self._last_s,
            left=self.work.sampling.max_tokens - self.drawn,
        )

    def append(self, sampled: Sampled, stop_tokens: frozenset[int], now: float) -> Output:
        """Take a token drawn at `now`; `stop_tokens` are the model's own end tokens."""
        position = self.drawn
        self.tokens.append(sampled.token)
        self._last_s = now
        if self._first_s is None:
            self._first_s = now
        else:
            self._gaps += 1
        return Output(
            request=self.key.request,
            attempt=self.key.attempt,
            position=position,
            token=sampled.token,
            logprobs=sampled.logprobs,
            finish=self._finish(sampled.token, stop_tokens),
            cached_tokens=self.cached_tokens,
        )

    def progress(self) -> Progress:
        return Progress(
            request=self.key.request,
            attempt=self.key.attempt,
            blocks=tuple(self.lease.blocks),
            computed=self.computed,
            last=self.drawn > len(self.work.generated),
        )

    def check_integrity(self) -> list[str]:
        """Every line names something that does not agree with the phase. Empty means clean."""
        if self.phase is Phase.WAITING:
            idle = self._lease is None and self.computed == 0 and not self.in_step
            return [] if idle else [f"{self.key} waits, but has a lease or computed tokens"]
        wrong = []
        if not 0 <= self._sealed * self._block_size <= self.computed < len(self.tokens):
            wrong.append(f"{self.key}: {self._sealed} blocks sealed, {self.computed} of {len(self.tokens)} computed")
        if any(place * self._block_size < self.computed for place in self._ahead):
            wrong.append(
                f"{self.key}: {self.computed} tokens computed, but blocks found ahead at {sorted(self._ahead)}"
            )
        if self.computed > len(self.lease.blocks) * self._block_size:
            wrong.append(f"{self.key}: {self.computed} tokens computed in {len(self.lease.blocks)} blocks")
        if self.phase is not Phase.RUNNING and (not self.handoff or self.in_step):
            wrong.append(f"{self.key} is {self.phase.name.lower()}, but is not a handoff at rest")
        if self.phase is Phase.PARKED and self.behind != 1:
            wrong.append(f"{self.key} is parked with {self.behind} tokens not computed")
        return wrong

    def private_blocks(self) -> list[int]:
        """Blocks it may still write: no other sequence may have them."""
        if self._lease is None:
            return []
        return [
            block
            for place, block in enumerate(self._lease.blocks)
            if place >= self._sealed and place not in self._ahead
        ]

    def _finish(self, token: int, stop_tokens: frozenset[int]) -> FinishReason | None:
        sampling = self.work.sampling
        ends = token in sampling.stop_token_ids or (token in stop_tokens and not sampling.ignore_eos)
        if ends and self.drawn > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.drawn >= sampling.max_tokens else None

    def _seal(self) -> None:
        """Put the blocks that have become full into the cache, if there is one."""
        full = self.computed // self._block_size
        if self._hasher and full > self._sealed:
            if full > len(self._hashes):
                tail = self.tokens[len(self._hashes) * self._block_size : full * self._block_size]
                self._hashes += self._hasher.chain(tail, self._hashes[-1] if self._hashes else self.work.salt)
            tokens = self.tokens[self._sealed * self._block_size : full * self._block_size]
            self.lease.seal(self._sealed, self._hashes[self._sealed : full], tokens, self.work.salt)
        self._sealed = full
