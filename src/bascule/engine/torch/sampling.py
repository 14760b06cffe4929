"""From logits to tokens: truncation, the draw itself, and the log probabilities that are reported.

A draw depends on the row's logits, its parameters and its tokens only: never on the rest of the batch, on a generator's
state or on the order of calls. So a request that moves to another worker continues the same random stream.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import isfinite

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bascule.engine.protocol import Sampled
from bascule.engine.torch.penalties import Draw, adjust
from bascule.errors import ModelError
from bascule.types import TokenLogprobs

_GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy (as in vLLM): dividing by them would overflow."""
_NUCLEUS_WIDTH = 256
"""How many of the most likely tokens are sorted before all are; a nucleus seldom has more."""
_SEED_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but `seed` (modulo 2**64) and `position`, with 53 random bits."""
    digest = xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed & _SEED_MASK, position))
    return float(digest >> 11) * 2.0**-53


def sample(logits: Tensor, draws: Sequence[Draw], stop_tokens: frozenset[int]) -> list[Sampled]:
    """Draw one token a row from float32 `logits` [len(draws), vocab], which are left as they are.

    Raises ModelError where a row is not finite, or where nothing is left to draw.
    """
    adjusted = logits.clone() if any(draw.adjusts for draw in draws) else logits
    for row, draw in zip(adjusted, draws, strict=True):
        if draw.adjusts:
            adjust(row, draw, stop_tokens)
    tokens = _most_likely(logits, adjusted)
    random = [row for row, draw in enumerate(draws) if draw.params.temperature >= _GREEDY_BELOW]
    # On a CPU one by one: what is drawn from fits the cache, and memory is not given back and asked for again.
    most = 1 if logits.device.type == "cpu" else len(random)
    for rows in (random[first : first + most] for first in range(0, len(random), max(most, 1))):
        drawn = _draw(adjusted[rows], [draws[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    reports = _log_probabilities(logits, draws, tokens)
    return [Sampled(token, reports.get(row)) for row, token in enumerate(tokens)]


def _most_likely(logits: Tensor, adjusted: Tensor) -> list[int]:
    """The most likely token of each row of `adjusted`, which may be `logits` itself; errors as in `sample`."""
    tokens, are_finite, are_left = (_best_here if logits.device.type == "cpu" else _best)(logits, adjusted)
    if not all(are_finite):
        rows = [row for row, is_finite in enumerate(are_finite) if not is_finite]
        raise ModelError(
            f"the model's logits are not finite in rows {rows} of {len(logits)}: its weights or KV are damaged, or its"
            " numbers overflow; check the model's files, or serve it in float32"
        )
    if not all(are_left):
        raise ModelError("logit_bias and min_tokens leave no token of the vocabulary to draw")
    return tokens


_Best = tuple[list[int], list[bool], list[bool]]
"""Of each row: where it is highest, first of all; whether all logits are finite; whether any token is left."""


def _best(logits: Tensor, adjusted: Tensor) -> _Best:
    """All of it comes from the device in one piece: it is waited for once."""
    best = adjusted.max(dim=-1)
    highest = best.values if adjusted is logits else logits.amax(dim=-1)
    finite = logits.amin(dim=-1).isfinite() & highest.isfinite()
    tokens, are_finite, are_left = torch.stack((best.indices, finite.long(), best.values.isfinite().long())).tolist()
    return tokens, are_finite, are_left


def _best_here(logits: Tensor, adjusted: Tensor) -> _Best:
    """The same on a CPU, where torch looks at number after number, and numpy at many at once, with less ado."""
    plain, numbers = logits.numpy(), adjusted.numpy()
    tokens: list[int] = numbers.argmax(axis=-1).tolist()  # NaN is higher than anything
    values = [numbers.item(row, token) for row, token in enumerate(tokens)]
    highest = values if adjusted is logits else plain.max(axis=-1).tolist()
    are_finite = [isfinite(low) and isfinite(high) for low, high in zip(plain.min(axis=-1), highest, strict=True)]
    return tokens, are_finite, [isfinite(value) for value in values]


def _draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw from the softmax of each row after temperature, min_p, top_k and top_p, in vLLM's order.

    The inverse of the cumulative distribution in vocabulary order: where two workers' logits differ in the last bits,
    the same random number lands on another token only if it lies within those bits of a boundary.
    """
    scaled = logits / _column(logits, [draw.params.temperature for draw in draws])
    _keep_min_p(scaled, draws)
    _keep_top_k(scaled, draws)
    probabilities = scaled.softmax(dim=-1)
    _keep_top_p(probabilities, draws)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    points = torch.tensor(
        [[uniform(draw.params.seed, draw.position)] for draw in draws], dtype=torch.float64, device=logits.device
    )
    # Rounding must not carry the point up to the total, beyond which there is no token.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    chosen = torch.searchsorted(cumulative, torch.minimum(points * total, below_total), right=True)
    return [int(token) for token in chosen.flatten().tolist()]


def _keep_min_p(scaled: Tensor, draws: Sequence[Draw]) -> None:
    """Drop tokens less likely than `min_p` times the most likely one."""
    if any(draw.params.min_p > 0 for draw in draws):
        floor = scaled.amax(dim=-1, keepdim=True) + _column(scaled, [draw.params.min_p for draw in draws]).log()
        scaled.masked_fill_(scaled < floor, float("-inf"))


def _keep_top_k(scaled: Tensor, draws: Sequence[Draw]) -> None:
    """Drop tokens less likely than the `top_k`-th; those that tie with it stay."""
    vocab = scaled.shape[-1]
    rows = [row for row, draw in enumerate(draws) if 0 < draw.params.top_k < vocab]
    if rows:
        counts = torch.tensor([[draws[row].params.top_k] for row in rows], device=scaled.device)
        chosen = _some(scaled, rows)
        least = chosen.topk(int(counts.max()), dim=-1).values.gather(-1, counts - 1)
        _drop(scaled, rows, chosen, least, float("-inf"))


def _keep_top_p(probabilities: Tensor, draws: Sequence[Draw]) -> None:
    """Drop what is not in the smallest set of most likely tokens that holds `top_p`; ties with its last member stay."""
    rows = [row for row, draw in enumerate(draws) if draw.params.top_p < 1.0]
    if rows:
        chosen = _some(probabilities, rows)
        least = _nucleus_floor(chosen, _column(chosen, [draws[row].params.top_p for row in rows]))
        _drop(probabilities, rows, chosen, least, 0.0)


def _some(values: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows, ascending: a copy, unless they are all of them."""
    return values if len(rows) == len(values) else values[rows]


def _drop(values: Tensor, rows: Sequence[int], chosen: Tensor, least: Tensor, instead: float) -> None:
    """Put `instead` for whatever is below the `least` of its row, in those rows that are `chosen`."""
    chosen.masked_fill_(chosen < least, instead)
    if chosen is not values:
        values[rows] = chosen


def _nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The least probability in each row's nucleus, [rows, 1]. A token is in it if less than `top_p` comes before it."""
    vocab = probabilities.shape[-1]
    best = probabilities.topk(min(_NUCLEUS_WIDTH, vocab), dim=-1).values
    through = best.cumsum(dim=-1, dtype=torch.float64)
    members = (through - best < top_p).sum(dim=-1, keepdim=True)
    floors = best.gather(-1, (members - 1).clamp(min=0))
    for row in (through[:, -1:] < top_p).flatten().nonzero().flatten().tolist() if vocab > _NUCLEUS_WIDTH else ():
        floors[row] = _wide_nucleus_floor(probabilities[row].cpu().numpy(), float(top_p[row]))
    return floors


def _wide_nucleus_floor(probabilities: NDArray[np.float32], top_p: float) -> float:
    """The same for one row and a nucleus of any width, without sorting all of it.

    The upper half of a positive float's bits orders it coarsely: tokens are counted out by it, and only those that
    share it with the last member are sorted.
    """
    coarse = probabilities.view(np.uint32) >> 16
    mass = np.bincount(coarse, weights=probabilities)
    reached = np.flatnonzero(mass[::-1].cumsum() >= top_p)
    last = len(mass) - 1 - int(reached[0]) if len(reached) else int(np.flatnonzero(mass)[0])
    among = np.sort(probabilities[coarse == last])[::-1]
    before = mass[last + 1 :].sum() + among.cumsum(dtype=np.float64) - among
    return float(among[max(int(np.count_nonzero(before < top_p)) - 1, 0)])


def _log_probabilities(logits: Tensor, draws: Sequence[Draw], tokens: Sequence[int]) -> dict[int, TokenLogprobs]:
    """What the rows that ask for it report, of the model's own distribution, by row."""
    rows = {row: draw.params.logprobs for row, draw in enumerate(draws) if draw.params.logprobs is not None}
    if not rows:
        return {}
    scores = logits[list(rows)].log_softmax(dim=-1)
    chosen = torch.tensor([[tokens[row]] for row in rows], device=logits.device)
    own = scores.gather(-1, chosen).flatten().tolist()
    best = scores.topk(min(max(rows.values()), logits.shape[-1]), dim=-1)
    found: dict[int, TokenLogprobs] = {}
    for (row, count), score, values, ids in zip(
        rows.items(), own, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        found[row] = TokenLogprobs(score, tuple(zip(ids[:count], values[:count], strict=True)))
    return found


def _column(like: Tensor, numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(-1)
