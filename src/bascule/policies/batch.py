"""Which tokens a worker computes in its next step: a pure function over how far each sequence has come.

There is no prefill phase and no decode phase, only tokens that are known and whose KV is not computed yet. A sequence
that is one token behind is a stream that somebody reads, so these come first, one token each; what is left of the step
goes to those further behind, in the order in which they are given. `chunk_tokens` and `step_tokens` bound every step.
Beside streams, prompts also get no more than lets the step, as the cost model predicts it, end in time for each stream:

- its gap: `since + T <= GAP_MARGIN * gap`;
- its TPOT, over all its gaps and not over each. With k gaps behind it that took t seconds, a step of T seconds and h
  steps of f seconds after it leave the mean of the k + 1 + h within the bound if

      t + T + h * f <= TPOT_MARGIN * tpot * (k + 1 + h)

  So a stream that was fast has saved time that a prompt may spend, and one that has just begun lends what it will save.
  f is a step with the least that prompts may be cut to, not one of streams alone: prompts may never cease, and such a
  loan can be repaid all the same. (Where even f is more than the TPOT, nothing is lent.) It is bounded, by
  LOOKAHEAD_TOKENS and by what the output has left, because outputs end unforeseen; what TPOT_MARGIN keeps back covers
  it after some hundred tokens. A stream that misses its TPOT even if no prompt runs beside it any more is no reason to
  hold prompts up: its gap alone counts.

However tight the bounds, prompts get LEAST_CHUNK tokens a step: they must not starve where streams alone are too slow.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from msgspec import Struct

from bascule.policies.cost import PrefillPart, decode_seconds, part_seconds, step_seconds
from bascule.types import CostModel

LEAST_CHUNK = 32
"""Prompt tokens that a step takes on beside streams, however tight their bounds are."""
GAP_MARGIN = 0.8
"""Share of the gap bound that steps are planned for; the rest is for what a prediction misses."""
TPOT_MARGIN = 0.9
"""Share of the TPOT that steps are planned for."""
LOOKAHEAD_TOKENS = 16
"""Tokens still to come whose savings a stream lends."""
ASSUMED_COST = CostModel(step_s=0.02, token_s=0.002)
"""What a worker reckons with until it knows better: slow, so that its first steps keep gaps too."""
_GRAIN = 16
"""Chunks that do not end a prompt are multiples of this."""


class Stream(Struct, frozen=True, kw_only=True):
    """What the reader of a sequence is promised, and has had so far."""

    gap_s: float = math.inf
    tpot_s: float = math.inf
    gaps: int = 0
    """Tokens that came after the first."""
    elapsed_s: float = 0.0
    """Since the first token."""
    since_s: float = 0.0
    """Since the last."""
    left: int = 1
    """Tokens that may still come, the next included."""


class Row(Struct, frozen=True):
    """One sequence as the batch policy sees it: tokens whose KV is computed, tokens known, and who reads it."""

    computed: int
    known: int
    stream: Stream | None = None
    """None until the first token is out."""

    @property
    def behind(self) -> int:
        """Tokens that are known and not computed."""
        return self.known - self.computed


class BatchLimits(Struct, frozen=True, kw_only=True):
    """Bounds of one step, in tokens: of one sequence, and of all sequences together."""

    chunk_tokens: int
    step_tokens: int


def grant_tokens(rows: Sequence[Row], limits: BatchLimits, cost: CostModel = ASSUMED_COST) -> tuple[int, ...]:
    """Tokens granted to each of `rows`, given in order of precedence, in the next step; 0 leaves a row out."""
    grants = [0] * len(rows)
    streams = [index for index, row in enumerate(rows) if row.behind == 1][: limits.step_tokens]
    for index in streams:
        grants[index] = 1
    left = limits.step_tokens - len(streams)
    prompts = [(index, row) for index, row in enumerate(rows) if row.behind > 1]
    if not prompts or not left:
        return tuple(grants)
    spare_s = _spare_seconds([rows[index] for index in streams], prompts[0][1].computed, cost)
    due = LEAST_CHUNK
    for index, row in prompts:
        wanted = min(row.behind, limits.chunk_tokens, left)
        granted = max(_fitting(row.computed, wanted, spare_s, cost), min(wanted, due))
        grants[index] = granted
        left -= granted
        due = max(due - granted, 0)
        spare_s -= part_seconds(cost, PrefillPart(granted, row.computed))
        if left == 0 or (granted < wanted and due == 0):
            break
    return tuple(grants)


def allowed_seconds(stream: Stream, alone_s: float, least_s: float) -> float:
    """How long the next step may take for `stream`, if steps of streams alone take `alone_s`, and `least_s` those with
    the least that prompts get."""
    return min(GAP_MARGIN * stream.gap_s - stream.since_s, _kept_seconds(stream, alone_s, least_s))


def _kept_seconds(stream: Stream, alone_s: float, least_s: float) -> float:
    """The same for its TPOT alone; infinite where that is no reason to hold prompts up."""
    if math.isinf(stream.tpot_s):
        return math.inf
    if stream.elapsed_s + stream.left * alone_s > stream.tpot_s * (stream.gaps + stream.left):
        return math.inf
    planned_s = TPOT_MARGIN * stream.tpot_s
    lent_s = min(stream.left - 1, LOOKAHEAD_TOKENS) * max(planned_s - least_s, 0.0)
    return planned_s * (stream.gaps + 1) - stream.elapsed_s + lent_s


def slack_seconds(streams: Sequence[Stream], context: int, cost: CostModel) -> float | None:
    """How long steps may be, all together, beyond steps that just keep the TPOT of each of `streams`, which have so
    many tokens of context: what prompts may take at once. None where no TPOT bounds them.

    Streams that miss theirs anyway do not hold prompts up; but where all do, nothing may be taken: a worker must not
    look the better for having fallen behind.
    """
    if all(math.isinf(stream.tpot_s) for stream in streams):
        return None
    alone_s, _, least_s = _step_seconds(len(streams), context, 0, cost)
    slack = [
        allowed - TPOT_MARGIN * stream.tpot_s
        for stream in streams
        if stream.tpot_s < math.inf and (allowed := _kept_seconds(stream, alone_s, least_s)) < math.inf
    ]
    return max(min(slack, default=0.0), 0.0)


def _step_seconds(streams: int, context: int, behind: int, cost: CostModel) -> tuple[float, float, float]:
    """A step of streams alone, one with a prompt in it but for the prompt's own tokens, and one with the least that a
    prompt of `behind` computed tokens gets."""
    beside_s = step_seconds(cost, [PrefillPart(0, 0)], streams, context)
    least_s = beside_s + part_seconds(cost, PrefillPart(LEAST_CHUNK, behind))
    return decode_seconds(cost, streams, context), beside_s, least_s


def _spare_seconds(streams: Sequence[Row], behind: int, cost: CostModel) -> float:
    """Seconds that prompts, the first of them with `behind` tokens computed, may add to a step of `streams`; negative
    where these alone take too long."""
    readers = [row.stream for row in streams if row.stream is not None]
    if not readers:
        return math.inf
    context = sum(row.computed for row in streams)
    alone_s, beside_s, least_s = _step_seconds(len(streams), context, behind, cost)
    return min(allowed_seconds(stream, alone_s, least_s) for stream in readers) - beside_s


def _fitting(computed: int, wanted: int, spare_s: float, cost: CostModel) -> int:
    """The most of the `wanted` tokens behind `computed` that take no longer than `spare_s`."""

    def seconds(tokens: int) -> float:
        return part_seconds(cost, PrefillPart(tokens, computed))

    if seconds(wanted) <= spare_s:
        return wanted
    return _GRAIN * max(bisect_right(range(0, wanted, _GRAIN), spare_s, key=seconds) - 1, 0)
