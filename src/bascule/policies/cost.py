"""What a step costs on one class of worker: a few coefficients that a fit sets and everybody else reads.

    step = step_s + token_s * (sum n_i + B) + pair_s * sum(n_i * (c_i + n_i / 2)) + context_s * S

over the prefill parts i (n_i new tokens behind c_i tokens of context) and B decoding streams with S tokens of context
in all. A new token's matrix products cost the same wherever it stands; attention costs a prefill part its pairs of
(new token, token it sees), and a decoding stream the KV it has to read.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct


class PrefillPart(Struct, frozen=True):
    """A run of tokens of one sequence computed in one step."""

    new: int
    """Tokens computed."""
    context: int
    """Tokens before them whose KV is read."""


class CostModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coefficients of one worker class. All are non-negative; the default is an engine that takes no time."""

    step_s: float = 0.0
    """Seconds that any step takes, however small."""
    token_s: float = 0.0
    """Seconds for each token computed, prefill or decode."""
    pair_s: float = 0.0
    """Seconds for each (new token, token it attends to) pair of a prefill part."""
    context_s: float = 0.0
    """Seconds for each token of context that a decoding stream reads."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"cost model: {name} is {getattr(self, name)}; coefficients cannot be negative")

    def step_seconds(self, prefill: Iterable[PrefillPart], streams: int, context: int) -> float:
        """Predicted seconds of a step over `prefill` parts and `streams` decoding ones with `context` tokens in all."""
        parts = tuple(prefill)
        new = sum(part.new for part in parts)
        pairs = sum(part.new * (part.context + part.new / 2) for part in parts)
        return self.step_s + self.token_s * (new + streams) + self.pair_s * pairs + self.context_s * context
