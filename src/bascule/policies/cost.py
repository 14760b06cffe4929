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

from collections.abc import Iterable, Sequence

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
    new = sum(part.new for part in parts)
    pairs = sum(part.new * (part.context + part.new / 2) for part in parts)
    read = context + sum(part.context for part in parts)
    own = model.step_s + model.token_s * (new + streams) + model.draw_s * streams
    return own + model.pair_s * pairs + model.context_s * read


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
    """The cost models of many workers side by side, one row each; arrays of shape [rows], `stream_s` [rows, KNOTS]."""

    step_s: Floats
    token_s: Floats
    pair_s: Floats
    context_s: Floats
    draw_s: Floats
    stream_s: Floats

    @staticmethod
    def empty(rows: int) -> CostColumns:
        """Of workers that take no time."""
        return CostColumns(**{name: np.zeros(rows) for name in _SCALARS}, stream_s=np.zeros((rows, KNOTS)))

    def put(self, row: int, model: CostModel) -> None:
        """Write a worker's model into its row."""
        for name in _SCALARS:
            getattr(self, name)[row] = getattr(model, name)
        self.stream_s[row] = [decode_seconds(model, 1 << knot, 0) for knot in range(KNOTS)]

    def take(self, rows: NDArray[np.intp] | Sequence[int]) -> CostColumns:
        """The models of some rows (copies)."""
        return CostColumns(*(getattr(self, name)[rows] for name in self.__struct_fields__))

    def decode(self, streams: Floats, context: Floats) -> Floats:
        """`decode_seconds`, row by row."""
        _, exponent = np.frexp(np.maximum(streams, 1.0))
        knot = np.minimum(exponent - 1, KNOTS - 2)
        rows = np.arange(len(knot))
        low = self.stream_s[rows, knot]
        high = self.stream_s[rows, knot + 1]
        own = low + (high - low) * (np.ldexp(streams, -knot) - 1)
        return np.where(streams < 1, 0.0, own + self.context_s * context)

    def mixed(self, new: Floats, behind: Floats, streams: Floats, context: Floats) -> Floats:
        """Seconds of a step of one prefill part (`new` tokens behind `behind`) beside streams, row by row."""
        own = self.step_s + self.token_s * (new + streams) + self.draw_s * streams
        return own + self.pair_s * new * (behind + new / 2) + self.context_s * (context + behind)


_SCALARS = CostColumns.__struct_fields__[:-1]
