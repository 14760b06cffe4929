"""Which tokens a worker computes in its next step: a pure function over how far each sequence has come.

There is no prefill phase and no decode phase, only tokens that are known and whose KV is not computed yet. A sequence
that is one token behind is a stream that somebody reads, so these come first, one token each; what is left of the
step goes to the sequences that are further behind, in order of arrival, a chunk each. `chunk_tokens` and `step_tokens`
bound every step; one with streams in it is cut further, so that it takes no longer than the gap that they may have.
How many tokens that is follows from the `Pace` of the steps before.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct


class Row(Struct, frozen=True):
    """One sequence as the batch policy sees it: tokens whose KV is computed, and tokens known."""

    computed: int
    known: int

    @property
    def behind(self) -> int:
        """Tokens that are known and not computed."""
        return self.known - self.computed


class BatchLimits(Struct, frozen=True, kw_only=True):
    """Bounds of one step, in tokens: of one sequence, and of all sequences together."""

    chunk_tokens: int
    step_tokens: int
    gap_s: float = 0.0
    """Seconds that a step with streams in it should take at most; 0 means that any will do."""


class Pace(Struct, frozen=True):
    """How fast a worker has lately been, in seconds; None before the first such step."""

    stream_step_s: float | None = None
    """A step of streams alone."""
    token_s: float | None = None
    """Each prompt token of a step, over what the streams in it cost."""

    def after(self, prompt_tokens: int, streams: int, seconds: float) -> Pace:
        """The pace once a step of so many prompt tokens and streams took `seconds`."""
        if prompt_tokens == 0:
            return Pace(_moved(self.stream_step_s, seconds), self.token_s)
        stream_step_s = self.stream_step_s
        if streams and stream_step_s is not None:
            stream_step_s = min(stream_step_s, seconds)  # streams with a prompt beside them take no less than alone
        own = seconds - (stream_step_s or 0.0) * (streams > 0)
        if prompt_tokens < _TELLING_TOKENS or own <= 0:
            return Pace(stream_step_s, self.token_s)
        return Pace(stream_step_s, _moved(self.token_s, own / prompt_tokens))

    def prompt_tokens(self, limits: BatchLimits) -> int:
        """Prompt tokens that fit into a step beside streams."""
        if not limits.gap_s or not self.token_s:
            return limits.step_tokens
        spare = _MARGIN * limits.gap_s - (self.stream_step_s or 0.0)
        if spare >= limits.step_tokens * self.token_s:
            return limits.step_tokens
        fitting = int(max(spare, 0.0) / self.token_s) // _GRAIN * _GRAIN
        return min(max(fitting, _LEAST_TOKENS), limits.step_tokens)


_TELLING_TOKENS = 32
"""A step of fewer prompt tokens says little of what one costs."""
_MARGIN = 0.8
"""Share of the gap that is planned for; later chunks of a prompt cost more than earlier ones, for their attention."""
_GRAIN = 16
_LEAST_TOKENS = 32
"""Prompts go on, if slowly, where streams alone take longer than the gap."""
_WEIGHT = 0.25
"""Of the latest step in the moving average."""


def _moved(mean: float | None, latest: float) -> float:
    """A moving average that one outlier (a page fault, a stopped process) moves by no more than its weight."""
    if mean is None:
        return latest
    return mean + _WEIGHT * (min(latest, 2 * mean) - mean) if mean else latest


def grant_tokens(rows: Sequence[Row], limits: BatchLimits, pace: Pace = Pace()) -> tuple[int, ...]:
    """Tokens granted to each of `rows` (in order of arrival) in the next step; 0 leaves a row out."""
    left = limits.step_tokens
    grants = [0] * len(rows)
    for index, row in enumerate(rows):
        if row.behind == 1 and left > 0:
            grants[index] = 1
            left -= 1
    if left < limits.step_tokens:
        left = min(left, pace.prompt_tokens(limits))
    for index, row in enumerate(rows):
        if row.behind > 1:
            grants[index] = min(row.behind, limits.chunk_tokens, left)
            left -= grants[index]
    return tuple(grants)
