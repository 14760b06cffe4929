"""What a step costs on one class of worker: a few coefficients that a fit sets and everybody else reads.

A step with prefill in it, over prefill parts i (n_i new tokens behind c_i tokens of context) and B decoding streams
with S tokens of context in all, takes

    step_s + token_s * (sum n_i + B) + draw_s * B + pair_s * sum(n_i * (c_i + n_i / 2)) + context_s * (S + sum c_i)

A new token's matrix products cost the same wherever it stands. Attention costs a prefill part its pairs of (new token,
token it sees), and every part and stream the KV it has to read; a stream has a token drawn besides. A step of streams
alone reads the weights more than it multiplies, and follows a table over B where there is one:

    stream_s(B) + context_s * S
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.types import CostModel

Floats = NDArray[np.float64]

KNOTS = 8
"""Entries of a table of streams in columns: 1, 2, 4 ... 128 streams. More follow the line through the last two."""


class PrefillPart(Struct, frozen=True):
    """A run of tokens of one sequence computed in one step."""

    new: int
    """Tokens computed."""
    context: int
    """Tokens before them whose KV is read."""


def step_seconds(model: CostModel, prefill: Iterable[PrefillPart], streams: int, context: int) -> float:
    """Predicted seconds of a step over `prefill` parts and `streams` decoding ones with `context` tokens in all."""
    parts = tuple(prefill)
    if not parts:
        return decode_seconds(model, streams, context)
    own = sum(part_seconds(model, part) for part in parts)
    return model.step_s + (model.token_s + model.draw_s) * streams + model.context_s * context + own


def part_seconds(model: CostModel, part: PrefillPart) -> float:
    """Predicted seconds that `part` adds to a step."""
    pairs = part.new * (part.context + part.new / 2)
    return model.token_s * part.new + model.pair_s * pairs + model.context_s * part.context


def decode_seconds(model: CostModel, streams: int, context: int) -> float:
    """Predicted seconds of a step of `streams` streams alone (0 if there are none)."""
    if streams < 1:
        return 0.0
    own = model.step_s + model.token_s * streams
    if model.stream_s:
        knot = min(streams.bit_length() - 1, max(len(model.stream_s) - 2, 0))
        own = model.stream_s[knot]
        if len(model.stream_s) > 1:
            own += (model.stream_s[knot + 1] - own) * (streams / (1 << knot) - 1)
    return own + model.context_s * context


class CostColumns(Struct, frozen=True):
    """The cost models of many workers side by side, one row each: arrays of shape [rows].

    A table of streams is kept as lines, [rows, KNOTS]: a step of B streams takes `line_s + slope_s * B`, with line 0
    for none, line 1 from 1, line 2 from 2, line 3 from 4 on. They are bent to be convex, since measurements err: one
    stream more must not seem to cost less where more are.
    """

    step_s: Floats
    token_s: Floats
    pair_s: Floats
    context_s: Floats
    draw_s: Floats
    line_s: Floats
    slope_s: Floats
    one_s: Floats
    """A step of one stream alone: it reads all weights, and no step takes less."""

    @staticmethod
    def empty(rows: int) -> CostColumns:
        """Of workers that take no time."""
        shapes = [(rows,)] * 5 + [(rows, KNOTS)] * 2 + [(rows,)]
        return CostColumns(*(np.zeros(shape) for shape in shapes))

    def put(self, row: int, model: CostModel) -> None:
        """Write a worker's model into its row."""
        self.step_s[row], self.token_s[row] = model.step_s, model.token_s
        self.pair_s[row], self.context_s[row], self.draw_s[row] = model.pair_s, model.context_s, model.draw_s
        self.line_s[row, 0] = self.slope_s[row, 0] = 0.0
        known = min(max(len(model.stream_s), 2), KNOTS)
        slopes = _convex([decode_seconds(model, 1 << knot, 0) for knot in range(known)])
        value = self.one_s[row] = decode_seconds(model, 1, 0)
        for knot in range(KNOTS - 1):
            slope = slopes[min(knot, known - 2)]
            self.slope_s[row, knot + 1] = slope
            self.line_s[row, knot + 1] = value - slope * (1 << knot)
            value += slope * (1 << knot)

    def steps(self, streams: Floats, context: Floats) -> tuple[Floats, Floats, Floats]:
        """Seconds of a step of these streams alone; of a step with a prompt in it, the prompt's own tokens left out,
        which may be less than the former; and what each stream more adds to the former. `context` must be 0 where there
        are no streams. Row by row along the last axis.
        """
        reading = self.context_s * context
        line = np.minimum(np.frexp(streams)[1], KNOTS - 1)
        line += np.arange(0, self.line_s.size, KNOTS)
        slope = self.slope_s.take(line)
        alone: Floats = slope * streams
        alone += self.line_s.take(line)
        alone += reading
        reading += (self.token_s + self.draw_s) * streams
        reading += self.step_s
        return alone, reading, slope

    def steps_of(self, row: int, streams: float, context: float) -> tuple[float, float, float]:
        """The same of a single row."""
        reading = self.context_s.item(row) * context
        line = min(math.frexp(streams)[1], KNOTS - 1)
        slope = self.slope_s.item(row, line)
        alone = slope * streams + self.line_s.item(row, line) + reading
        reading += (self.token_s.item(row) + self.draw_s.item(row)) * streams
        return alone, reading + self.step_s.item(row), slope


def _convex(values: list[float]) -> list[float]:
    """Slopes of the highest convex line, nowhere falling, that goes from the first of the values at 1, 2, 4, 8 ... and
    through or below the others."""
    slopes: list[tuple[float, int]] = []
    """Of runs of segments, and how many segments each has."""
    for knot, (low, high) in enumerate(itertools.pairwise(values)):
        slope, run = (high - low) / (1 << knot), 1
        while slopes and slopes[-1][0] > slope:
            before, segments = slopes.pop()
            share = _width(knot - run + 1 - segments, segments) / _width(knot - run + 1 - segments, segments + run)
            slope, run = share * before + (1 - share) * slope, run + segments
        slopes.append((slope, run))
    return [max(slope, 0.0) for slope, run in slopes for _ in range(run)]


def _width(knot: int, segments: int) -> int:
    """From the value at `1 << knot` over so many segments, in streams."""
    return (1 << (knot + segments)) - (1 << knot)
