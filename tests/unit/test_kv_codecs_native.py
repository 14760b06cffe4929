"""Compiled codecs give the very bytes that numpy gives, both ways, wherever blocks and records lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from bascule.kv.codecs import codec_named, native
from bascule.kv.codecs.base import CannotDecode, CannotEncode, Codec
from bascule.kv.codecs.floats import FORMS
from bascule.kv.codecs.grouped import Grouping, Int4Planes, Int8Planes
from bascule.kv.codecs.lossy import PlaneCoder
from bascule.native import DISABLE, cpu_flags
from bascule.types import KVLayout

FORM = FORMS["bfloat16"]
KINDS = {"int8": Int8Planes, "int4": Int4Planes}
GROUPINGS = [
    Grouping(rows, columns, down)
    for rows, columns in ((16, 192), (48, 64), (8, 2), (1, 32), (17, 10), (4, 33))
    for down in (True, False)
    if rows * columns % 2 == 0
]
needed = pytest.mark.skipif(bool(native._NEEDED - cpu_flags()), reason="this CPU has no AVX-512")
pytestmark = needed

Numbers = NDArray[np.uint16]


def coders(kind: str, grouping: Grouping) -> tuple[PlaneCoder, PlaneCoder]:
    plain = KINDS[kind](FORM, grouping)
    compiled = native.compiled(plain, grouping)
    assert isinstance(compiled, native.NativePlanes)
    return plain, compiled


def compare(kind: str, grouping: Grouping, bits: Numbers) -> None:
    """Encode [planes, n, numbers] by both, and decode by both what numpy has made of them."""
    records, flags, back = [], [], []
    for coder in coders(kind, grouping):
        made = np.full((*bits.shape[:2], coder.record_bytes), 0xEE, np.uint8)
        flags.append(coder.encode(bits, made))
        made[flags[-1]] = 0  # such a record means nothing
        records.append(made)
    assert np.array_equal(*flags)
    assert np.array_equal(*records)
    for coder in coders(kind, grouping):
        out = np.full(bits.shape, 0xEEEE, np.uint16)
        assert not coder.decode(records[0], out).any()
        back.append(out)
    assert np.array_equal(*back)


def drawn(shape: tuple[int, ...], seed: int) -> Numbers:
    """Numbers as KV has them, with zeros of both signs, groups of one value, and some very small and large ones."""
    draw = np.random.default_rng(seed)
    numbers = (draw.standard_normal(shape) * 10.0 ** draw.integers(-3, 3, shape)).astype(np.float32)
    numbers[draw.random(shape) < 0.05] = 0.0
    numbers[draw.random(shape) < 0.05] = -0.0
    numbers[draw.random(shape) < 0.01] *= np.float32(2.0**-90)
    numbers[draw.random(shape) < 0.01] *= np.float32(2.0**100)
    numbers[:, : shape[1] // 3] = np.float32(-1.25)
    bits = np.empty(shape, np.uint16)
    FORM.store(numbers, bits)
    return bits


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_the_same(kind: str, grouping: Grouping) -> None:
    for seed in range(6):
        compare(kind, grouping, drawn((3, 5, grouping.rows * grouping.columns), seed))


@settings(max_examples=300)
@given(st.data(), st.sampled_from(sorted(KINDS)), st.sampled_from([each for each in GROUPINGS if each.columns < 40]))
def test_any_bits_at_all_are_treated_alike(data: st.DataObject, kind: str, grouping: Grouping) -> None:
    """Infinities, numbers that are none, subnormal ones: flagged by both, or coded by both."""
    shape = (1, 2, grouping.rows * grouping.columns)
    compare(kind, grouping, data.draw(arrays.arrays(np.uint16, shape, elements=st.integers(0, 2**16 - 1))))


@settings(max_examples=300)
@given(st.data(), st.sampled_from(sorted(KINDS)), st.sampled_from([each for each in GROUPINGS if each.columns < 40]))
def test_garbage_is_flagged_alike_and_what_is_written_differs_in_no_number(
    data: st.DataObject, kind: str, grouping: Grouping
) -> None:
    flags, back = [], []
    size = coders(kind, grouping)[0].record_bytes
    records = data.draw(arrays.arrays(np.uint8, (2, 2, size)))
    for coder in coders(kind, grouping):
        out = np.full((2, 2, grouping.rows * grouping.columns), 0xEEEE, np.uint16)
        flags.append(coder.decode(records, out))
        numbers = np.empty(out.shape, np.float32)
        FORM.load(out, numbers)
        back.append(numbers)
    assert np.array_equal(*flags)
    good = ~flags[0]
    assert np.isfinite(back[1]).all()
    assert np.array_equal(back[0][good], back[1][good])  # of zeros, whatever sign


@pytest.fixture(params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Codec, Codec]]:
    """A codec for blocks of an arena, by numpy and compiled."""
    layout = KVLayout("bfloat16", 3, 3, 64, 16, 6, 3 * 64 * 2)
    compiled = codec_named(request.param, layout)
    monkeypatch.setenv(DISABLE, "1")
    native.load.cache_clear()
    plain = codec_named(request.param, layout)
    native.load.cache_clear()
    yield plain, compiled


def test_a_codec_uses_compiled_code_where_it_can_and_gives_the_same_records(pair: tuple[Codec, Codec]) -> None:
    plain, _ = pair
    assert [type(codec._keys).__name__ for codec in pair] == [KINDS[plain.name].__name__, "NativePlanes"]  # type: ignore[attr-defined]
    arena = drawn((6, 40, 16 * 192), 7).view(np.uint8)
    blocks = arena[:, 5:30]  # as a lease has them: not in one piece
    records = [codec.encode(blocks) for codec in pair]
    assert np.array_equal(*records)
    outs = [np.zeros_like(arena) for _ in pair]
    for codec, out in zip(pair, outs, strict=True):
        codec.decode(records[0], out[:, 5:30])
    assert np.array_equal(*outs)
    assert not outs[1][:, :5].any() and not outs[1][:, 30:].any(), "nothing beside the blocks is written"


def test_both_refuse_and_name_the_same_block(pair: tuple[Codec, Codec]) -> None:
    blocks = drawn((6, 9, 16 * 192), 3)
    blocks[4, 7, 100] = 0x7F80  # infinity
    said = []
    for codec in pair:
        with pytest.raises(CannotEncode) as caught:
            codec.encode(blocks.view(np.uint8))
        said.append(str(caught.value))
    assert said[0] == said[1] and "keys of layer 2 in block 7" in said[0]
    records = pair[0].encode(drawn((6, 9, 16 * 192), 3).view(np.uint8))
    records[5, :2] = 0xFF
    for codec in pair:
        with pytest.raises(CannotDecode, match="keys of layer 0 in block 5"):
            codec.decode(records, np.zeros((6, 9, 2 * 16 * 192), np.uint8))


def test_shapes_that_would_lead_out_of_the_arrays_are_refused() -> None:
    grouping = Grouping(16, 192, down=True)
    _, compiled = coders("int8", grouping)
    bits, records = np.zeros((1, 2, 16 * 192), np.uint16), np.zeros((1, 2, compiled.record_bytes), np.uint8)
    for wrong in (bits[..., 1:], bits.astype(np.uint32), bits[:, :1], bits[..., ::2]):
        with pytest.raises(ValueError):
            compiled.encode(wrong, records)
    for wrong in (records[..., 1:], records[:, :1]):
        with pytest.raises(ValueError):
            compiled.decode(wrong, bits)


def test_blocks_with_more_groups_than_there_is_room_for_are_left_to_numpy() -> None:
    wide = Grouping(2, 5000, down=True)
    assert isinstance(native.compiled(Int8Planes(FORM, wide), wide), Int8Planes)
