"""Which tokens a worker computes in its next step: a pure function over how far each sequence has come.

There is no prefill phase and no decode phase, only tokens that are known and whose KV is not computed yet. A sequence
that is one token behind is a stream that somebody reads, so these come first, one token each; what is left of the
step goes to the sequences that are further behind, in order of arrival, a chunk each. `chunk_tokens` bounds the gap
that one long prompt puts into the running streams, `step_tokens` bounds the step as a whole.
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


def grant_tokens(rows: Sequence[Row], limits: BatchLimits) -> tuple[int, ...]:
    """Tokens granted to each of `rows` (in order of arrival) in the next step; 0 leaves a row out."""
    left = limits.step_tokens
    grants = [0] * len(rows)
    for index, row in enumerate(rows):
        if row.behind == 1 and left > 0:
            grants[index] = 1
            left -= 1
    for index, row in enumerate(rows):
        if row.behind > 1:
            grants[index] = min(row.behind, limits.chunk_tokens, left)
            left -= grants[index]
    return tuple(grants)
