"""The GPU's kernels against plain torch in float32: in Triton's interpreter, or on the device that is named.

`BASCULE_TEST_DEVICE=cuda:0` (see `make test-cuda`) runs the same tests compiled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'bascule[dev]'")

from cuda_support import DEVICE, DTYPE

from bascule.engine.torch.cuda import launch
from bascule.engine.torch.cuda.launch import Chunks, Heads
from bascule.engine.torch.model import rms_norm

EPS = 1e-5


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.bfloat16().to(DTYPE).to(DEVICE)


def whole_numbers(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_rounded(got: Tensor, expected: Tensor, sums: float = 1.0) -> None:
    """`got` is `expected` within the rounding of the result, and of `sums` numbers on the way to it."""
    unit = 2.0 ** (-20 if DTYPE is torch.float32 else -8) * sums
    torch.testing.assert_close(got.float(), expected.float(), rtol=unit, atol=unit)


@pytest.mark.parametrize("width", [32, 48, 130])
def test_a_residual_is_added_and_normed(width: int) -> None:
    hidden, delta, weight = numbers(3, width).float(), numbers(3, width, seed=1), numbers(width, seed=2).float()
    expected = hidden + delta.float()
    normed = launch.add_norm(hidden, delta, weight, EPS, DTYPE)
    assert torch.equal(hidden, expected)
    assert_rounded(normed, rms_norm(expected, weight, EPS))


def test_without_a_residual_the_norm_leaves_what_it_reads() -> None:
    hidden, weight = numbers(2, 48).float(), numbers(48, seed=2).float()
    before = hidden.clone()
    assert_rounded(launch.add_norm(hidden, None, weight, EPS, DTYPE), rms_norm(before, weight, EPS))
    assert torch.equal(hidden, before)


def test_only_the_named_rows_are_normed() -> None:
    hidden, delta, weight = numbers(5, 48).float(), numbers(5, 48, seed=1), numbers(48, seed=2).float()
    before = hidden.clone()
    normed = launch.add_norm(hidden, delta, weight, EPS, DTYPE, whole_numbers([4, 1, 4]))
    assert_rounded(normed, rms_norm((before + delta.float())[[4, 1, 4]], weight, EPS))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("width", [16, 80, 1500])
def test_gates_are_multiplied(width: int) -> None:
    both = numbers(3, 2 * width, scale=3.0)
    left, right = both.float().chunk(2, dim=-1)
    assert_rounded(launch.gate(both), torch.nn.functional.silu(left) * right)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", [Heads(2, 2, 16), Heads(9, 3, 32), Heads(8, 1, 64)])
def test_queries_and_keys_are_turned_and_stored(heads: Heads, normed: bool) -> None:
    tokens, slots = 4, 9
    qkv = numbers(tokens, (heads.query + 2 * heads.kv) * heads.dim)
    angle = torch.randn(tokens, heads.dim // 2, generator=torch.Generator().manual_seed(5)).to(DEVICE) * 30
    norm = numbers(heads.query + heads.kv, heads.dim, seed=3).float() if normed else None
    kv = torch.full((2, slots, heads.kv, heads.dim), 7.0, dtype=DTYPE, device=DEVICE)
    split = qkv.view(tokens, -1, heads.dim).float()
    before = split[:, : heads.query + heads.kv]
    if norm is not None:
        before = rms_norm(before, norm, EPS)
    low, high = before.chunk(2, dim=-1)
    c, s = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    turned = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
    values = split[:, heads.query + heads.kv :].clone()
    launch.turn(qkv, (angle.cos(), angle.sin()), norm, EPS, whole_numbers([8, 0, -1, 3]), kv, heads)
    assert_rounded(qkv.view(tokens, -1, heads.dim)[:, : heads.query], turned[:, : heads.query])
    for row, slot in ((0, 8), (1, 0), (3, 3)):
        assert_rounded(kv[0, slot], turned[row, heads.query :])
        assert torch.equal(kv[1, slot].float(), values[row])
    others = [slot for slot in range(slots) if slot not in (8, 0, 3)]
    assert (kv[:, others] == 7.0).all()


def reference(query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Attention of `query` [tokens, heads, dim] at `start` and on over its whole context [positions, kv, dim]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(group, dim=1) for part in (keys, values))
    scores = torch.einsum("thd,phd->htp", query.float(), keys) / query.shape[-1] ** 0.5
    seen = torch.arange(len(keys), device=DEVICE) <= start + torch.arange(len(query), device=DEVICE).unsqueeze(1)
    return torch.einsum("htp,phd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values).flatten(1)


class Memory:
    """Paged KV of several sequences in shuffled blocks, not-a-number wherever none of them has a token."""

    def __init__(self, heads: Heads, lengths: Sequence[int], block: int) -> None:
        self.block, self.lengths = block, lengths
        needed = [-(-length // block) for length in lengths]
        ids = random.Random(4).sample(range(sum(needed) + 3), sum(needed))
        self.kv = torch.full(
            (2, (sum(needed) + 3) * block, heads.kv, heads.dim), float("nan"), dtype=DTYPE, device=DEVICE
        )
        self.table = torch.full((len(lengths), 16), 10**6, dtype=torch.int32)
        self.context = []
        for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            mine, ids = ids[:count], ids[count:]
            self.table[row, :count] = torch.tensor(mine, dtype=torch.int32)
            slots = [mine[at // block] * block + at % block for at in range(length)]
            self.context.append(numbers(2, length, heads.kv, heads.dim, seed=row))
            self.kv[:, slots] = self.context[-1]
        self.table = self.table.to(DEVICE)


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("heads", [Heads(2, 2, 16), Heads(6, 2, 32), Heads(8, 1, 64)], ids=str)
def test_single_tokens_attend_to_their_context(heads: Heads, parts: int) -> None:
    lengths = [1, 16, 17, 63, 131]  # with 7 parts of whole tiles of 16, the last ones of most have nothing
    memory = Memory(heads, lengths, block=16)
    qkv = numbers(7, (heads.query + 2 * heads.kv) * heads.dim, seed=9, scale=2.0)
    rows = [5, 0, 3, 1, 6]
    out = torch.full((7, heads.query * heads.dim), 7.0, dtype=DTYPE, device=DEVICE)
    launch.attend_one(
        qkv,
        memory.kv,
        memory.table,
        whole_numbers(rows),
        whole_numbers(lengths),
        out,
        heads=heads,
        block_size=16,
        parts=parts,
        keys=16,
    )
    query = qkv.view(7, -1, heads.dim)[:, : heads.query]
    for row, (keys, values) in zip(rows, memory.context, strict=True):
        assert_rounded(out[row], reference(query[row : row + 1], keys, values, len(keys) - 1)[0], sums=4)
    assert (out[[2, 4]] == 7.0).all()


@pytest.mark.parametrize("parts", [1, 4])
def test_a_sequence_of_no_positions_gets_zeros(parts: int) -> None:
    heads = Heads(4, 2, 16)
    memory = Memory(heads, [3], block=8)
    table = torch.cat((memory.table, torch.zeros_like(memory.table)))
    out = torch.full((2, 64), 7.0, dtype=DTYPE, device=DEVICE)
    qkv = numbers(2, 8 * 16)
    arguments = (whole_numbers([0, 1]), whole_numbers([3, 0]), out)
    launch.attend_one(qkv, memory.kv, table, *arguments, heads=heads, block_size=8, parts=parts)
    assert out[0].isfinite().all() and (out[1] == 0).all()


@pytest.mark.parametrize("block", [8, 16, 24])
@pytest.mark.parametrize("heads", [Heads(2, 2, 16), Heads(6, 2, 32), Heads(8, 1, 64)], ids=str)
def test_chunks_attend_to_what_is_before_them_and_to_themselves(heads: Heads, block: int) -> None:
    # Behind cached context, from the start, over several tiles of rows, and up to a tile's end.
    starts, counts = [37, 0, 15, 16], [5, 45, 2, 32]
    memory = Memory(heads, [start + count for start, count in zip(starts, counts, strict=True)], block)
    qkv = numbers(2 + sum(counts), (heads.query + 2 * heads.kv) * heads.dim, seed=9, scale=2.0)
    tiles, first = [], 1
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for done in range(0, count, 32):
            tiles.append([first + done, min(32, count - done), start + done, row])
        first += count
    out = torch.full((len(qkv), heads.query * heads.dim), 7.0, dtype=DTYPE, device=DEVICE)
    launch.attend_chunks(
        qkv,
        memory.kv,
        memory.table,
        whole_numbers(tiles),
        out,
        heads=heads,
        block_size=block,
        chunks=Chunks(32, 16),
    )
    query, first = qkv.view(len(qkv), -1, heads.dim)[:, : heads.query], 1
    for (keys, values), start, count in zip(memory.context, starts, counts, strict=True):
        expected = reference(query[first : first + count], keys, values, start)
        assert_rounded(out[first : first + count], expected, sums=4)
        first += count
    assert (out[0] == 7.0).all() and (out[-1] == 7.0).all()


def test_damaged_kv_shows() -> None:
    heads = Heads(4, 2, 16)
    memory = Memory(heads, [40], block=8)
    memory.kv[0, int(memory.table[0, 1]) * 8] = float("nan")
    out = torch.zeros(1, 64, dtype=DTYPE, device=DEVICE)
    arguments = (memory.table, whole_numbers([0]), whole_numbers([40]), out)
    launch.attend_one(numbers(1, 128), memory.kv, *arguments, heads=heads, block_size=8, parts=2, keys=16)
    assert out.isnan().all()


def test_a_context_is_cut_only_where_processors_would_be_idle() -> None:
    assert launch.parts_of(1, 8, 131_072, 132) == 64
    assert launch.parts_of(2, 8, 131_072, 132) == 33
    assert launch.parts_of(1, 8, 1024, 132) == 8
    assert launch.parts_of(64, 8, 131_072, 132) == 1
    assert launch.parts_of(1, 8, 16, 132) == 1
