"""The GPU's decoder and its graphs against the plain one, in Triton's interpreter (or on the device that is named)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'bascule[dev]'")

from cuda_support import BLOCK, DTYPE, GREEDY, MODELS, by_kernels, logits, memory, plain, saved

from bascule.engine.protocol import Slice
from bascule.engine.torch.cuda.graphs import BATCHES, Bucket, bucket_of
from bascule.engine.torch.cuda.inputs import fill, numbers_in, shape_of
from bascule.engine.torch.plan import plan_step

STEPS = ([5], [1], [1, 3, 17], [9, 1, 1], [1, 1, 1], [70, 8], [1, 1, 1, 1])
"""Chunks below, at and above a block, behind cached context and not, beside single tokens and alone."""


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Log probabilities agree within float32's rounding; in bfloat16 within what that leaves of small random models."""
    got, expected = got.float().log_softmax(-1), expected.float().log_softmax(-1)
    bound = 2e-4 if DTYPE is torch.float32 else 0.25
    torch.testing.assert_close(got, expected, atol=bound, rtol=bound)


class Doubles:
    """In place of CUDA graphs: what was recorded is called again, in the memory that it was recorded over."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        run()

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


@pytest.mark.parametrize("name", MODELS)
def test_kernels_compute_what_the_plain_decoder_does(name: str, tmp_path: Path) -> None:
    spec = saved(name, tmp_path)
    kv, expected_kv = memory(spec), memory(spec)
    expected = list(logits(plain(spec, tmp_path), spec, expected_kv, STEPS))
    for got, wanted in zip(logits(by_kernels(spec, tmp_path), spec, kv, STEPS), expected, strict=True):
        assert_same(got, wanted)
    assert torch.equal(kv.isnan(), expected_kv.isnan())


def test_steps_that_draw_nothing_write_their_kv(tmp_path: Path) -> None:
    spec = saved("llama3-untied", tmp_path)
    kv = memory(spec)
    for got in logits(by_kernels(spec, tmp_path), spec, kv, ([9, 1], [1, 5]), draws=False):
        assert got.shape == (0, spec.vocab)
    assert int(kv.isfinite().all(-1).all(-1).all(0).sum()) == 16


def test_only_some_rows_are_drawn(tmp_path: Path) -> None:
    spec = saved("qwen3-normed-heads", tmp_path)
    batch = [Slice([3, 4, 5], 0, [7]), Slice([6], 0, [1], GREEDY), Slice([8, 9], 0, [2], GREEDY)]
    found = [decoder(spec, tmp_path).forward(plan_step(batch, BLOCK), memory(spec)) for decoder in (by_kernels, plain)]
    assert found[0].shape == (2, spec.vocab)
    assert_same(*found)


@pytest.mark.parametrize("name", ["llama3-untied", "qwen3-normed-heads"])
def test_recorded_steps_compute_what_launched_ones_do(name: str, tmp_path: Path) -> None:
    spec = saved(name, tmp_path)
    steps = ([20, 6, 3], *([1, 1, 1],) * 3, [0, 1], [1, 0, 1], [1, 1, 1, 4], *([1, 1, 1, 1],) * 2)
    kv, expected_kv, doubles = memory(spec), memory(spec), Doubles()
    expected = list(logits(by_kernels(spec, tmp_path), spec, expected_kv, steps))
    for got, wanted in zip(logits(by_kernels(spec, tmp_path, capture=doubles), spec, kv, steps), expected, strict=True):
        assert_same(got, wanted)
    # Three and four sequences share a graph, one and two have theirs; steps with chunks have none.
    assert (doubles.recorded, doubles.replayed) == (3, 7)
    assert torch.equal(kv.isnan(), expected_kv.isnan())


def test_padding_touches_no_slot(tmp_path: Path) -> None:
    """A canary in every slot of KV memory but those that the step's own tokens have."""
    spec = saved("llama3-untied", tmp_path)
    decoder = by_kernels(spec, tmp_path, capture=Doubles())
    kv = torch.full_like(memory(spec), 7.0)
    for count in (3, 9):
        kv.fill_(7.0)
        batch = [Slice([row + 1], 4, [3 * row + 2], GREEDY) for row in range(count)]
        found = decoder.forward(plan_step(batch, BLOCK), kv)
        assert found.shape == (count, spec.vocab) and found.isfinite().all()
        written = [(3 * row + 2) * BLOCK + 4 for row in range(count)]
        others = [slot for slot in range(kv.shape[1]) if slot not in written]
        assert (kv[:, others] == 7.0).all()
        assert (kv[:, written] != 7.0).any(-1).all()


def test_another_kv_memory_is_recorded_anew(tmp_path: Path) -> None:
    spec = saved("llama3-untied", tmp_path)
    doubles = Doubles()
    decoder = by_kernels(spec, tmp_path, capture=doubles)
    kvs = [memory(spec), memory(spec)]
    first, second = (decoder.forward(plan_step([Slice([5], 0, [1], GREEDY)], BLOCK), kv).clone() for kv in kvs)
    assert torch.equal(first, second) and doubles.recorded == 2
    assert all(torch.isfinite(kv[:, BLOCK]).all() for kv in kvs)


def test_a_device_that_cannot_record_computes_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        calls.append(run)
        raise RuntimeError("no graphs here")

    spec = saved("llama3-untied", tmp_path)
    decoder = by_kernels(spec, tmp_path, capture=refuse)
    plan = plan_step([Slice([5], 0, [1], GREEDY)], BLOCK)
    found = [decoder.forward(plan, memory(spec)) for _ in range(2)]
    assert_same(found[0], plain(spec, tmp_path).forward(plan, memory(spec)))
    assert torch.equal(*found) and len(calls) == 1
    assert "cannot be recorded" in caplog.text


def test_what_is_out_of_bounds_is_refused(tmp_path: Path) -> None:
    spec = saved("llama3-untied", tmp_path)
    for capture in (None, Doubles()):
        decoder, kv = by_kernels(spec, tmp_path, capture=capture), memory(spec, blocks=4)
        with pytest.raises(IndexError, match="vocabulary"):
            decoder.forward(plan_step([Slice([spec.vocab], 0, [1], GREEDY)], BLOCK), kv)
        for blocks in ([4], [-1]):
            with pytest.raises(IndexError, match="slots"):
                decoder.forward(plan_step([Slice([1], 0, blocks, GREEDY)], BLOCK), kv)
        with pytest.raises(IndexError, match="slots"):
            decoder.forward(plan_step([Slice([1], BLOCK, [9, 1], GREEDY)], BLOCK), kv)
        assert kv.isnan().all()


def test_a_step_goes_to_the_least_graph_that_it_fits() -> None:
    def bucket(count: int, end: int) -> Bucket | None:
        blocks = range(-(-end // BLOCK))
        return bucket_of(plan_step([Slice([1], end - 1, blocks, GREEDY)] * count, BLOCK))

    assert bucket(1, 1) == Bucket(1, 1024)
    assert bucket(9, 1024) == Bucket(12, 1024)
    assert bucket(64, 1025) == Bucket(64, 4096)
    assert bucket(65, 16_385) == Bucket(80, 65_536)
    assert bucket(BATCHES[-1] + 1, 5) is None
    assert bucket_of(plan_step([Slice([1, 2], 0, [1], GREEDY)], BLOCK)) is None
    assert bucket_of(plan_step([Slice([1], 0, [1])], BLOCK)) is None


def test_a_steps_numbers_lie_aligned_and_where_they_are_looked_for() -> None:
    batch = [
        Slice([11], 20, [5, 3, 9], GREEDY),
        Slice(list(range(70)), 3, range(20, 30)),
        Slice([12], 0, [4], GREEDY),
        Slice([13, 14], 8, [6, 7], GREEDY),
    ]
    plan = plan_step(batch, BLOCK)
    shape = shape_of(plan, rows=32)
    memory = torch.full((shape.size,), 99, dtype=torch.int32)
    fill(memory, plan, shape, rows=32)
    numbers = numbers_in(memory, shape)
    assert all(part.storage_offset() % 16 == 0 for part in numbers)
    assert numbers.tokens.tolist() == plan.tokens.tolist()
    assert numbers.slots.tolist() == [9 * 8 + 4, *range(20 * 8 + 3, 20 * 8 + 73), 4 * 8, 7 * 8, 7 * 8 + 1]
    assert numbers.drawn.tolist() == [0, 71, 73]
    assert numbers.rows.tolist() == [0, 71] and numbers.lengths.tolist() == [21, 1]
    assert numbers.table[0, :3].tolist() == [5, 3, 9] and numbers.table[3, :2].tolist() == [6, 7]
    tiles = {tuple(tile) for tile in numbers.tiles.tolist()}
    assert tiles == {(1, 32, 3, 2), (33, 32, 35, 2), (65, 6, 67, 2), (72, 2, 8, 3)}
    assert np.array_equal(plan.positions, numbers.positions.numpy())
