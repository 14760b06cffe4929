"""The kernels of a step on a GPU, in Triton; `launch.py` says what each is given, in torch's words.

Sums are float32. Exponents are of base 2: whoever launches gives the scale of the scores times log2(e). Memory
behind the last token of a sequence is never read, whatever lies there: not even as a zero times not-a-number.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(
    hidden,
    delta,
    weight,
    rows,
    out,
    eps,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ADDS: tl.constexpr,
    PICKS: tl.constexpr,
):
    """One row: `hidden` float32 [tokens, WIDTH] plus `delta` where it ADDS; its RMS norm times `weight` to `out`.

    With PICKS row i of `out` is that of row `rows[i]`, and the sum is not kept; else it is, in `hidden`.
    """
    row = tl.program_id(0).to(tl.int64)
    source = row
    if PICKS:
        source = tl.load(rows + row).to(tl.int64)
    column = tl.arange(0, PAD)
    inside = column < WIDTH
    x = tl.load(hidden + source * WIDTH + column, mask=inside, other=0.0)
    if ADDS:
        x += tl.load(delta + source * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if not PICKS:
            tl.store(hidden + source * WIDTH + column, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    normed = x * scale * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def turn(
    qkv,
    cos,
    sin,
    norm,
    slots,
    keys,
    values,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE heads of one token: queries and keys normed (with NORMS) and turned, keys and values stored in their slot.

    `qkv` is [tokens, HEADS + 2 * KV_HEADS, 2 * HALF]; queries stay there, turned in place. `norm` is float32 [HEADS +
    KV_HEADS, 2 * HALF]; `cos` and `sin` are float32 [tokens, HALF]. A token whose slot is negative is stored nowhere.
    """
    DIM: tl.constexpr = 2 * HALF
    EVERY: tl.constexpr = HEADS + 2 * KV_HEADS
    TURNED: tl.constexpr = HEADS + KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    pair = tl.arange(0, HALF)
    place = head[:, None] * DIM + pair[None, :]
    there = (head < EVERY)[:, None]
    turns = (head < TURNED)[:, None]
    at = qkv + row * (EVERY * DIM) + place
    low = tl.load(at, mask=there, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / DIM + eps)[:, None]
        low = tl.where(turns, low * scale * tl.load(norm + place, mask=turns, other=0.0), low)
        high = tl.where(turns, high * scale * tl.load(norm + place + HALF, mask=turns, other=0.0), high)
    c = tl.load(cos + row * HALF + pair)[None, :]
    s = tl.load(sin + row * HALF + pair)[None, :]
    first = tl.where(turns, low * c - high * s, low).to(qkv.dtype.element_ty)
    second = tl.where(turns, high * c + low * s, high).to(qkv.dtype.element_ty)
    queries = (head < HEADS)[:, None]
    tl.store(at, first, mask=queries)
    tl.store(at + HALF, second, mask=queries)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        start = slot * (KV_HEADS * DIM)
        is_key = (head >= HEADS)[:, None] & turns
        key_at = keys + start + place - HEADS * DIM
        tl.store(key_at, first, mask=is_key)
        tl.store(key_at + HALF, second, mask=is_key)
        is_value = (head >= TURNED)[:, None] & there
        value_at = values + start + place - TURNED * DIM
        tl.store(value_at, first, mask=is_value)
        tl.store(value_at + HALF, second, mask=is_value)


@triton.jit
def gate(gate_up, out, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """TILE numbers of one row: `silu(gate) * up` of `gate_up` [tokens, 2 * WIDTH], gates first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < WIDTH
    at = gate_up + row * (2 * WIDTH) + column
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (x / (1.0 + tl.exp(-x)) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def attend_one(
    query,
    keys,
    values,
    table,
    rows,
    lengths,
    parts,
    weights,
    out,
    width,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ALONE: tl.constexpr,
):
    """One part of a sequence's context, of as many as there are programs, for the GROUP queries that share a key head.

    `query` is [tokens, HEADS + 2 * KV_HEADS, DIM], of which the first HEADS are read; `table` is [sequences, width],
    ids of blocks of BLOCK slots; sequence i has row `rows[i]` of `query` and sees `lengths[i]` positions, which its
    parts share in whole tiles. Each part leaves its mean of the values and the logarithm of its weight; with ALONE it
    goes straight to `out` [tokens, HEADS, DIM]. A sequence of no positions gets zeros.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lengths + sequence)
    row = tl.load(rows + sequence).to(tl.int64)
    member = tl.arange(0, PAD)
    dim = tl.arange(0, DIM)
    real = (member < GROUP)[:, None]
    head = kv_head * GROUP + member
    q = tl.load(query + row * ((HEADS + 2 * KV_HEADS) * DIM) + head[:, None] * DIM + dim[None, :], mask=real, other=0.0)
    share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE
    begin = split * share
    end = tl.minimum(begin + share, length)
    best = tl.full([PAD], float("-inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    sums = tl.zeros([PAD, DIM], tl.float32)
    blocks = table + sequence.to(tl.int64) * width
    for first in range(begin, end, TILE):
        position = first + tl.arange(0, TILE)
        inside = position < end
        block = tl.load(blocks + position // BLOCK, mask=inside, other=0).to(tl.int64)
        at = ((block * BLOCK + position % BLOCK) * KV_HEADS + kv_head) * DIM
        k = tl.load(keys + at[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        above = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(best - above)
        total = total * shrink + tl.sum(shares, 1)
        v = tl.load(values + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
        sums = tl.dot(shares.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        best = above
    # A part of no positions has the weight zero; its mean must be a number all the same.
    divisor = tl.where(total == 0.0, 1.0, total)
    mean = sums / divisor[:, None]
    if ALONE:
        target = out + row * (HEADS * DIM) + head[:, None] * DIM + dim[None, :]
        tl.store(target, mean.to(out.dtype.element_ty), mask=real)
    else:
        part = (sequence.to(tl.int64) * HEADS + head) * splits + split
        tl.store(parts + part[:, None] * DIM + dim[None, :], mean, mask=real)
        tl.store(weights + part, best + tl.log2(divisor), mask=member < GROUP)


@triton.jit(do_not_specialize=["splits"])
def join(parts, weights, rows, out, splits, HEADS: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr):
    """One head of one sequence: the parts' means, by their weights, to its row of `out` [tokens, HEADS, DIM].

    There are `splits` parts, at most MOST.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(rows + sequence).to(tl.int64)
    split = tl.arange(0, MOST)
    part = (sequence * HEADS + head) * splits + split
    dim = tl.arange(0, DIM)
    there = split < splits
    weight = tl.load(weights + part, mask=there, other=float("-inf"))
    means = tl.load(parts + part[:, None] * DIM + dim[None, :], mask=there[:, None], other=0.0)
    best = tl.max(weight, 0)
    share = tl.exp2(weight - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(share, 0)
    mean = tl.sum(means * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * HEADS + head) * DIM + dim, mean.to(out.dtype.element_ty))


@triton.jit
def _over(
    q,
    keys,
    values,
    blocks,
    rows_at,
    best,
    total,
    sums,
    begin,
    end,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Go on with the softmax of `q` over the positions `begin` to `end`; with MASKED each row sees those up to its own.

    Without MASKED the positions are whole tiles that all rows see.
    """
    dim = tl.arange(0, DIM)
    for first in range(begin, end, TILE):
        position = first + tl.arange(0, TILE)
        if MASKED:
            inside = position < end
            block = tl.load(blocks + position // BLOCK, mask=inside, other=0).to(tl.int64)
        else:
            block = tl.load(blocks + position // BLOCK).to(tl.int64)
        at = ((block * BLOCK + position % BLOCK) * KV_HEADS + kv_head) * DIM
        if MASKED:
            k = tl.load(keys + at[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
        else:
            k = tl.load(keys + at[None, :] + dim[:, None])
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(inside[None, :] & (position[None, :] <= rows_at[:, None]), scores, float("-inf"))
        above = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(best - above)
        total = total * shrink + tl.sum(shares, 1)
        if MASKED:
            v = tl.load(values + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
        else:
            v = tl.load(values + at[:, None] + dim[None, :])
        sums = tl.dot(shares.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        best = above
    return best, total, sums


@triton.jit
def attend_chunk(
    query,
    keys,
    values,
    table,
    tiles,
    out,
    width,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head of one tile of at most ROWS tokens of a sequence, which see what is before them and themselves.

    `tiles` is [n, 4]: the first row of `query` (as in `attend_one`), the number of rows, the position of the first, and
    the row of `table`.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    first = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    start = tl.load(tile + 2)
    blocks = table + tl.load(tile + 3).to(tl.int64) * width
    kv_head = head // GROUP
    offset = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    real = (offset < count)[:, None]
    row = first + offset
    at = row[:, None] * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM + dim[None, :]
    q = tl.load(query + at, mask=real, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    seen, end = start + offset, start + count
    # Tiles of keys that end at the first token or before it are seen by all rows.
    whole = (start + 1) // TILE * TILE
    best, total, sums = _over(
        q, keys, values, blocks, seen, best, total, sums, 0, whole, kv_head, scale, KV_HEADS, DIM, BLOCK, TILE, False
    )
    best, total, sums = _over(
        q, keys, values, blocks, seen, best, total, sums, whole, end, kv_head, scale, KV_HEADS, DIM, BLOCK, TILE, True
    )
    mean = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * (HEADS * DIM) + head * DIM + dim[None, :], mean, mask=real)
