"""The narrow waist: what an engine needs of a model runner. Token ids in, token ids out, KV in an arena.

There is no prefill phase and no decode phase here: a sequence has tokens, some of their KV is computed, and each step
computes some more of it. A token is drawn where a step reaches the end of what is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from bascule.kv.arena import Arena
from bascule.types import ModelCard, SamplingParams, TokenLogprobs


class Sampled(Struct, frozen=True):
    """One drawn token, with its log probabilities where asked for."""

    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class Slice:
    """The part of one sequence that a step computes.

    `tokens` are at positions `start .. start + len(tokens)`; the KV of the positions before `start` is in the arena.
    `blocks` is the block table from position 0 on and covers at least `start + len(tokens)` positions. With `sampling`
    a token is drawn after the last position; `history` is then prompt and output so far (through that position), of
    which the first `prompt_tokens` are the prompt: penalties and the random counter follow from it.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sampling: SamplingParams | None = None
    history: Sequence[int] = ()
    prompt_tokens: int = 0


class Runner(Protocol):
    """A model on a device. One thread calls it; it keeps no state of a request between calls."""

    card: ModelCard
    stop_tokens: frozenset[int]
    """The model's own end tokens."""

    def bind(self, arena: Arena) -> None:
        """Use `arena` (of `card.layout`) for KV from now on; allocates what steps need."""
        ...

    def execute(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        """Compute one step: write the KV of every slice's tokens; one entry a slice, None where no token was wanted."""
        ...

    def publish(self, blocks: Sequence[int]) -> None:
        """Make the arena's bytes of `blocks` hold what the device holds (nothing to do if the arena is the device)."""
        ...

    def absorb(self, blocks: Sequence[int]) -> None:
        """Make the device hold what the arena's bytes of `blocks` hold (the other way of `publish`)."""
        ...
