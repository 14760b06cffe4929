"""The kernels as functions of tensors: shapes in, grid and tile sizes chosen, results out.

Matrices, queries and KV are of one dtype. It is bfloat16 on a GPU, for which the tiles are cut. Triton's interpreter,
which has no products of bfloat16, computes in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bascule.engine.torch.cuda import kernels

_PART = 128
"""Fewest positions of a context that are worth a part of their own."""
MOST_PARTS = 64
_PROGRAMS = 4
"""At a time on a multiprocessor: their tiles fit its memory together, and one reads while another computes."""
_HEADS_AT_ONCE = 8
_NUMBERS_AT_ONCE = 1024


class Heads(NamedTuple):
    """The attention's shape: `query` heads share `kv` heads of `dim` numbers each."""

    query: int
    kv: int
    dim: int


class Chunks(NamedTuple):
    """Tiles of the attention of chunks: `rows` tokens of a sequence at once, over `keys` positions at a time."""

    rows: int
    keys: int


def chunks_of(dim: int) -> Chunks:
    """What fits the memory of a multiprocessor: 96 KiB with heads of 128 numbers."""
    return Chunks(64, 32) if dim > 128 else Chunks(128, 64)


def warps_of(chunks: Chunks, dim: int) -> int:
    """Of a program for such a tile."""
    return 8 if chunks.rows * dim > 64 * 128 else 4


def keys_of(dim: int) -> int:
    """Positions at a time of the attention of single tokens."""
    return 32 if dim > 128 else 64


def parts_of(sequences: int, kv_heads: int, context: int, processors: int) -> int:
    """Into how many parts a context of at most `context` positions is cut.

    Enough that each of the device's `processors` has `_PROGRAMS` to run; no part is smaller than is worth it.
    """
    wanted = min(_PROGRAMS * processors // (sequences * kv_heads), context // _PART, MOST_PARTS)
    return max(1, wanted)


def add_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    """Add `delta` to `hidden` in place, and return the RMS norm of the sum times `weight`, in `dtype`.

    `hidden` is float32 [tokens, width], `delta` of any dtype has the same shape, `weight` is float32 [width]. With
    `rows` (int32) only these rows of the sum are computed and returned, and `hidden` stays as it is.
    """
    tokens, width = hidden.shape
    count = tokens if rows is None else len(rows)
    out = torch.empty(count, width, dtype=dtype, device=hidden.device)
    kernels.add_norm[(count,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        hidden if rows is None else rows,
        out,
        eps,
        WIDTH=width,
        PAD=_power(width),
        ADDS=delta is not None,
        PICKS=rows is not None,
        num_warps=8 if width > 2048 else 4,
    )
    return out


def turn(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    head_norm: Tensor | None,
    eps: float,
    slots: Tensor,
    kv: Tensor,
    heads: Heads,
) -> None:
    """Norm and turn the queries of `qkv` in place, and write its keys and values to their slots of `kv`.

    `qkv` is [tokens, (query + 2 * kv) * dim], `angles` cosines and sines, float32 [tokens, dim / 2],
    `head_norm` float32 [query + kv, dim] or None, `slots` int32 [tokens] (negative: not stored), `kv` one layer's keys
    and values [2, slots, kv, dim].
    """
    every = heads.query + 2 * heads.kv
    kernels.turn[(len(qkv), _blocks(every, _HEADS_AT_ONCE))](
        qkv,
        *angles,
        qkv if head_norm is None else head_norm,
        slots,
        kv[0],
        kv[1],
        eps,
        HEADS=heads.query,
        KV_HEADS=heads.kv,
        HALF=heads.dim // 2,
        NORMS=head_norm is not None,
        TILE=_HEADS_AT_ONCE,
        num_warps=4,
    )


def gate(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `gate_up` [tokens, 2 * width], gates first; of its dtype, [tokens, width]."""
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    tile = min(_NUMBERS_AT_ONCE, _power(width))
    kernels.gate[(tokens, _blocks(width, tile))](gate_up, out, WIDTH=width, TILE=tile, num_warps=4)
    return out


def attend_one(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    heads: Heads,
    block_size: int,
    parts: int,
    keys: int = 0,
) -> None:
    """Attention of sequences with one token each, into their rows of `out` [tokens, query * dim].

    `query` is what `turn` leaves in `qkv`; `table` int32 [sequences, width] are block ids, `rows` and `lengths` int32
    [sequences] each sequence's row and the positions that it sees (0: its row becomes zeros). The context is cut into
    `parts`, at most MOST_PARTS; `keys` positions at a time (0: what suits the heads).
    """
    sequences, group = len(rows), heads.query // heads.kv
    several = parts > 1
    means = torch.empty(
        (sequences, heads.query, parts, heads.dim) if several else 0, dtype=torch.float32, device=query.device
    )
    weights = torch.empty(means.shape[:3] if several else 0, dtype=torch.float32, device=query.device)
    kernels.attend_one[(sequences, heads.kv, parts)](
        query,
        kv[0],
        kv[1],
        table,
        rows,
        lengths,
        means if several else out,
        weights if several else out,
        out,
        table.shape[1],
        _scale(heads),
        KV_HEADS=heads.kv,
        GROUP=group,
        PAD=max(16, _power(group)),
        DIM=heads.dim,
        BLOCK=block_size,
        TILE=keys or keys_of(heads.dim),
        ALONE=not several,
        num_warps=4,
        num_stages=2,
    )
    if several:
        kernels.join[(sequences, heads.query)](
            means, weights, rows, out, parts, HEADS=heads.query, DIM=heads.dim, MOST=MOST_PARTS, num_warps=4
        )


def attend_chunks(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    heads: Heads,
    block_size: int,
    chunks: Chunks,
) -> None:
    """Attention of chunks of several tokens, into their rows of `out`; the rest as in `attend_one`.

    `tiles` is int32 [n, 4]: of at most `chunks.rows` tokens of one sequence the first row, their number, the position
    of the first, and the sequence's row of `table`.
    """
    kernels.attend_chunk[(heads.query, len(tiles))](
        query,
        kv[0],
        kv[1],
        table,
        tiles,
        out,
        table.shape[1],
        _scale(heads),
        KV_HEADS=heads.kv,
        GROUP=heads.query // heads.kv,
        DIM=heads.dim,
        BLOCK=block_size,
        ROWS=chunks.rows,
        TILE=chunks.keys,
        num_warps=warps_of(chunks, heads.dim),
        num_stages=2,
    )


def _scale(heads: Heads) -> float:
    """Of scores whose exponents are of base 2."""
    return math.log2(math.e) / math.sqrt(heads.dim)


def _power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


def _blocks(number: int, size: int) -> int:
    return -(-number // size)
