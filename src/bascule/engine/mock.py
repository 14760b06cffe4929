"""A runner without a model, whose KV is nevertheless real: a wrong, lost or late block changes the tokens it draws.

The KV of a token is a hash of the KV before it, as the arena has it, and of the token; a token is drawn from a hash of
the KV of the whole context, as attention reads it. So the output is a function of the prompt (and of the seed, where
sampling is not greedy), and equal outputs mean that every byte was where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from bascule.engine.protocol import Sampled, Slice
from bascule.kv.arena import Arena
from bascule.policies.cost import PrefillPart, step_seconds
from bascule.types import CostModel, KVLayout, ModelCard, SamplingParams, TokenLogprobs

_NAT = 0.5
"""Step between the log probabilities that the mock makes up."""


def mock_card(*, context: int = 8192, vocab: int = 32000, block_size: int = 16, layers: int = 2) -> ModelCard:
    """A model card for the mock: 16 bytes of KV a token and layer. Equal arguments give equal cards."""
    layout = KVLayout(
        dtype="uint8", layers=layers, kv_heads=1, head_dim=8, block_size=block_size, planes=2 * layers, token_bytes=8
    )
    fingerprint = xxhash.xxh3_128_hexdigest(f"mock {context} {vocab} {layout}".encode())
    return ModelCard(name="mock", fingerprint=fingerprint, context=context, vocab=vocab, layout=layout)


class MockRunner:
    """The in-memory twin of a model on a device; see the module's docstring for what it computes.

    `sleep` takes the seconds that `cost` gives for a step. `stop_tokens` are drawn only at output position `stop_at`
    (the smallest of them, not before the request's `min_tokens`). With `own_memory` KV lies outside the arena until
    it is published, as on a device. Of the sampling parameters, penalties, biases and truncation have no effect.
    """

    def __init__(
        self,
        card: ModelCard,
        cost: CostModel,
        sleep: Callable[[float], None],
        *,
        stop_tokens: frozenset[int] = frozenset(),
        stop_at: int | None = None,
        own_memory: bool = False,
    ) -> None:
        self.card = card
        self.stop_tokens = stop_tokens
        self._cost = cost
        self._sleep = sleep
        self._stop_at = stop_at
        self._own_memory = own_memory
        self._arena: Arena | None = None
        self._memory: NDArray[np.uint8] = np.zeros((0, 0, 0), np.uint8)

    def bind(self, arena: Arena) -> None:
        """Use `arena`; raises ValueError if it is not of the card's layout."""
        if arena.layout != self.card.layout:
            raise ValueError(f"the arena has layout {arena.layout}, the model {self.card.layout}")
        self._arena = arena
        self._memory = np.zeros_like(arena.bytes) if self._own_memory else arena.bytes

    def execute(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        """Compute one step; takes the cost model's time for it. Raises ValueError for a slice that breaks the rules."""
        for part in batch:
            self._check(part)
        seconds = self._seconds(batch)
        if seconds > 0:
            self._sleep(seconds)
        for part in batch:
            self._write(part)
        return [self._draw(part, part.sampling) if part.sampling is not None else None for part in batch]

    def publish(self, blocks: Sequence[int]) -> None:
        if self._own_memory and self._arena is not None:
            self._arena.bytes[:, list(blocks)] = self._memory[:, list(blocks)]

    def absorb(self, blocks: Sequence[int]) -> None:
        if self._own_memory and self._arena is not None:
            self._memory[:, list(blocks)] = self._arena.bytes[:, list(blocks)]

    def _check(self, part: Slice) -> None:
        end = part.start + len(part.tokens)
        if not part.tokens or len(part.blocks) * self.card.layout.block_size < end:
            raise ValueError(f"{len(part.tokens)} tokens from {part.start} on do not fit {len(part.blocks)} blocks")
        if part.sampling is not None and list(part.history[part.start :]) != list(part.tokens):
            raise ValueError(f"the history of {len(part.history)} tokens does not end with the slice's")

    def _seconds(self, batch: Sequence[Slice]) -> float:
        prefill = [PrefillPart(len(part.tokens), part.start) for part in batch if not _decodes(part)]
        streams = [part.start for part in batch if _decodes(part)]
        return step_seconds(self._cost, prefill, len(streams), sum(streams))

    def _write(self, part: Slice) -> None:
        """Chain the slice's KV on what the memory holds before it."""
        planes, size, width = self.card.layout.planes, self.card.layout.block_size, self.card.layout.token_bytes
        rows = self._memory.reshape(planes, -1, width)
        block, offset = divmod(part.start - 1, size)
        previous = rows[:, part.blocks[block] * size + offset].tobytes() if part.start else b""
        for position, token in enumerate(part.tokens, part.start):
            state: bytes = xxhash.xxh3_128_digest(previous + token.to_bytes(4, "little"))
            previous = (state * (planes * width // len(state) + 1))[: planes * width]
            block, offset = divmod(position, size)
            rows[:, part.blocks[block] * size + offset] = np.frombuffer(previous, np.uint8).reshape(planes, width)

    def _draw(self, part: Slice, sampling: SamplingParams) -> Sampled:
        layout = self.card.layout
        end = part.start + len(part.tokens)
        used = part.blocks[: -(-end // layout.block_size)]
        context = self._memory.take(used, axis=1).reshape(layout.planes, -1)[:, : end * layout.token_bytes].tobytes()
        random_state = f"{sampling.seed} {end}".encode() if sampling.temperature > 0 else b""
        position = end - part.prompt_tokens
        token = self._token(xxhash.xxh3_64_intdigest(context + random_state), position, sampling)
        if sampling.logprobs is None:
            return Sampled(token)
        top = tuple(((token + rank) % self.card.vocab, -_NAT * (rank + 1)) for rank in range(sampling.logprobs))
        return Sampled(token, TokenLogprobs(-_NAT, top))

    def _token(self, number: int, position: int, sampling: SamplingParams) -> int:
        """Map a hash into the vocabulary, around the end tokens unless it is time for one."""
        if position == self._stop_at and self.stop_tokens and position >= sampling.min_tokens:
            return min(self.stop_tokens)
        avoided = self.stop_tokens
        if position < sampling.min_tokens:
            avoided = avoided | set(sampling.stop_token_ids)
        token = number % self.card.vocab
        while token in avoided:
            token = (token + 1) % self.card.vocab
        return token


def _decodes(part: Slice) -> bool:
    return part.start > 0 and len(part.tokens) == 1
