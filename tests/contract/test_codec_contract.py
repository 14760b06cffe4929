"""What every codec of KV must keep: promised sizes, bounded loss, no loss twice, and no number it cannot hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from bascule.errors import ConfigError
from bascule.kv.codecs import NAMES, codec_named
from bascule.kv.codecs.base import CannotDecode, CannotEncode, Codec
from bascule.kv.codecs.floats import FORMS, loaded, magnitudes
from bascule.kv.codecs.grouped import CHANNEL_TOKENS
from bascule.types import KVLayout

LOSSY = NAMES[1:]
DTYPES = tuple(FORMS)
ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""What storing a result may add, relative to it."""
SMALLEST = 2.0**-100
"""What is smaller may become zero."""

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float64]


def layout(dtype: str, layers: int = 3, heads: int = 2, head_dim: int = 8, block_size: int = 16) -> KVLayout:
    token = heads * head_dim * FORMS[dtype].bits.itemsize
    return KVLayout(dtype, layers, heads, head_dim, block_size, 2 * layers, token)


SHAPES = [
    (layers, heads, head_dim, block_size)
    for layers, (heads, head_dim), block_size in itertools.product(
        (1, 3), ((1, 2), (3, 64), (4, 5), (8, 16)), (1, 4, 16, 17)
    )
]


def kv(shape: KVLayout, blocks: int, seed: int = 0) -> Bytes:
    """Blocks of keys and values as models have them: some channels large or far from zero, some tokens outliers."""
    draw = np.random.default_rng(seed)
    channels = shape.kv_heads * shape.head_dim
    numbers = draw.standard_normal((shape.planes, blocks, shape.block_size, channels))
    numbers *= 10.0 ** draw.uniform(-2, 1, (shape.planes, 1, 1, channels))
    numbers += draw.uniform(-20, 20, (shape.planes, 1, 1, channels)) * (
        draw.random((shape.planes, 1, 1, channels)) < 0.2
    )
    numbers[:, draw.integers(blocks), 0] *= 30
    return stored(shape, numbers)


def stored(shape: KVLayout, numbers: NDArray[np.floating]) -> Bytes:
    """Numbers as the layout's bytes, [planes, n, plane_block_bytes]."""
    form = FORMS[shape.dtype]
    bits = np.empty(numbers.shape, form.bits)
    form.store(numbers.astype(np.float32), bits)
    return bits.view(np.uint8).reshape(*numbers.shape[:2], shape.plane_block_bytes)


def numbers_of(shape: KVLayout, blocks: Bytes) -> Numbers:
    """[layers, keys or values, n, tokens, heads, head_dim]"""
    form = FORMS[shape.dtype]
    flat = loaded(form, blocks.view(form.bits)).astype(np.float64)
    return flat.reshape(shape.layers, 2, -1, shape.block_size, shape.kv_heads, shape.head_dim)


def decoded(codec: Codec, records: Bytes) -> Bytes:
    out = np.full((codec.layout.planes, len(records), codec.layout.plane_block_bytes), 7, np.uint8)
    codec.decode(records, out)
    return out


def allowed(name: str, shape: KVLayout, exact: Numbers) -> Numbers:
    """The largest error that each number may have: half a step of its group, and the rounding of the result.

    `fp8`: 1/16 of the number; what is less than 2**-15 of the plane's largest has steps of 2**-17 of that one.
    `int8`: 1/254 of the group's largest magnitude. `int4`: 1/30 of the group's range.
    """
    rounding = np.abs(exact) * ROUNDING[shape.dtype] + SMALLEST + (2.0**-25 if shape.dtype == "float16" else 0)
    if name == "none":
        return np.zeros_like(exact)
    if name == "fp8":
        return np.abs(exact) / 16 + np.abs(exact).max(axis=(3, 4, 5), keepdims=True) * 2.0**-17 + rounding
    bound = np.empty_like(exact)
    for kind, axis in ((0, 2 if shape.block_size >= CHANNEL_TOKENS else 4), (1, 4)):
        part = exact[:, kind]
        if name == "int8":
            bound[:, kind] = np.abs(part).max(axis=axis, keepdims=True) / 254
        else:
            bound[:, kind] = (part.max(axis=axis, keepdims=True) - part.min(axis=axis, keepdims=True)) / 30
    # The result may lie half a step further out than the number, and is rounded there.
    return bound * (1 + ROUNDING[shape.dtype] + 1e-5) + rounding


def check(codec: Codec, blocks: Bytes) -> None:
    """The loss is within bounds, and the second passage loses nothing more."""
    records = codec.encode(blocks)
    back = decoded(codec, records)
    exact, got = numbers_of(codec.layout, blocks), numbers_of(codec.layout, back)
    assert np.isfinite(got).all()
    excess = np.abs(got - exact) - allowed(codec.name, codec.layout, exact)
    assert excess.max() <= 0, (codec.name, exact.flat[excess.argmax()], got.flat[excess.argmax()])
    again = codec.encode(back)
    assert np.array_equal(again, records)
    assert np.array_equal(decoded(codec, again), back)


@pytest.fixture(params=[(name, dtype) for name in NAMES for dtype in DTYPES], ids="-".join)
def codec(request: pytest.FixtureRequest) -> Iterator[Codec]:
    name, dtype = request.param
    yield codec_named(name, layout(dtype))


# ---------------------------------------------------------------- what is lost


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_is_bounded_and_does_not_grow(name: str, dtype: str, shape: tuple[int, int, int, int]) -> None:
    check(codec := codec_named(name, layout(dtype, *shape)), kv(codec.layout, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_none_gives_back_every_bit(dtype: str) -> None:
    exact = codec_named("none", layout(dtype))
    anything = np.random.default_rng(1).integers(0, 256, (6, 5, exact.layout.plane_block_bytes), np.uint8)
    assert np.array_equal(decoded(exact, exact.encode(anything)), anything)


def test_none_takes_kv_that_is_no_float_and_has_planes_of_its_own() -> None:
    shape = KVLayout("uint8", 1, 1, 5, 3, 3, 5)
    blocks = np.random.default_rng(2).integers(0, 256, (3, 4, 15), np.uint8)
    exact = codec_named("none", shape)
    assert np.array_equal(decoded(exact, exact.encode(blocks)), blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_finite_bits_are_kept_within_bounds(name: str, dtype: str, data: st.DataObject) -> None:
    """Subnormals, zeros of both signs, constants and numbers of all sizes, as hypothesis likes to mix them."""
    form = FORMS[dtype]
    small = codec_named(name, layout(dtype, 1, 2, 2, data.draw(st.sampled_from([1, 8, 9]))))
    shape = (2, 1, small.layout.plane_block_bytes // form.bits.itemsize)
    # fp8 rounds the last 1/32 below 2**126 up to it, and refuses it.
    sizes = st.integers(0, form.limit - 1 - (0 if dtype == "float16" else (form.limit & -form.limit) >> 4))
    patterns = st.tuples(sizes, st.booleans()).map(lambda drawn: drawn[0] | drawn[1] * form.sign)
    check(small, data.draw(arrays.arrays(form.bits, shape, elements=patterns)).view(np.uint8))


@pytest.mark.parametrize("width", [2, 4, 9, 16, 30, 100, 5000])
def test_numbers_that_differ_in_their_last_bits_do_not_lose_twice(codec: Codec, width: int) -> None:
    form, shape = FORMS[codec.layout.dtype], codec.layout
    draw = np.random.default_rng(width)
    for base in draw.integers(form.tiny, form.limit // 2, 20):
        bits = base + draw.integers(0, width, (shape.planes, 2, shape.block_size * 16))
        check(codec, bits.astype(form.bits).view(np.uint8))


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -3.75, 1e-39, 6e4])
def test_a_constant_block_comes_back_as_it_was(codec: Codec, number: float) -> None:
    shape = codec.layout
    blocks = stored(shape, np.full((shape.planes, 2, shape.block_size, 16), number))
    got, exact = numbers_of(shape, decoded(codec, codec.encode(blocks))), numbers_of(shape, blocks)
    assert np.abs(got - exact).max() <= SMALLEST + (np.abs(exact).max() / 16 if codec.name == "fp8" else 0)


def test_the_ends_of_a_float16_stay_finite() -> None:
    for name in LOSSY:
        shape = layout("float16")
        check(codec_named(name, shape), stored(shape, np.linspace(-65504, 65504, 6 * 2 * 256).reshape(6, 2, 16, 16)))


# ---------------------------------------------------------------- records


def test_records_have_the_promised_size_and_small_codecs_make_kv_small(codec: Codec) -> None:
    records = codec.encode(kv(codec.layout, 5))
    assert records.shape == (5, codec.record_bytes)
    assert records.dtype == np.uint8
    assert records.flags.c_contiguous


@pytest.mark.parametrize(("name", "ratio"), [("none", 1.0), ("fp8", 1.99), ("int8", 1.82), ("int4", 3.0)])
def test_the_ratios_of_a_model_of_bfloat16(name: str, ratio: float) -> None:
    shape = layout("bfloat16", 30, 3, 64)
    assert shape.block_bytes / codec_named(name, shape).record_bytes >= ratio


def test_keys_of_short_blocks_are_not_made_larger() -> None:
    for name, size in itertools.product(LOSSY, range(1, 9)):
        shape = layout("bfloat16", 2, 2, 64, size)
        assert codec_named(name, shape).record_bytes < 0.65 * shape.block_bytes


def test_many_blocks_are_encoded_as_each_alone(codec: Codec) -> None:
    blocks = kv(codec.layout, 9)
    records = codec.encode(blocks)
    for block in range(9):
        assert np.array_equal(codec.encode(blocks[:, block : block + 1])[0], records[block])
        assert np.array_equal(decoded(codec, records[block : block + 1])[:, 0], decoded(codec, records)[:, block])


@pytest.mark.parametrize("name", NAMES)
def test_it_makes_no_difference_where_pieces_begin(name: str) -> None:
    """More numbers than are coded at a time, in one plane and over many."""
    big = codec_named(name, layout("bfloat16", 5, 3, 64, 17))
    blocks = kv(big.layout, 43)
    records = big.encode(blocks)
    picked = [0, 20, 21, 42]
    assert np.array_equal(big.encode(blocks[:, picked]), records[picked])
    assert np.array_equal(decoded(big, records[picked]), decoded(big, records)[:, picked])


def test_blocks_in_the_midst_of_an_arena_are_read_and_written_in_place(codec: Codec) -> None:
    arena, other = kv(codec.layout, 8), kv(codec.layout, 8, seed=1)
    before = other.copy()
    records = codec.encode(arena[:, 2:5])
    assert np.array_equal(records, codec.encode(arena[:, 2:5].copy()))
    codec.decode(records, other[:, 4:7])
    assert np.array_equal(other[:, 4:7], decoded(codec, records))
    assert np.array_equal(np.delete(other, [4, 5, 6], 1), np.delete(before, [4, 5, 6], 1))


def test_records_may_come_as_read_only_bytes_from_anywhere_in_a_message(codec: Codec) -> None:
    records = codec.encode(kv(codec.layout, 2))
    message = np.frombuffer(b"odd" + records.tobytes(), np.uint8)[3:].reshape(records.shape)
    assert np.array_equal(decoded(codec, message), decoded(codec, records))


def test_no_blocks_make_no_records(codec: Codec) -> None:
    records = codec.encode(kv(codec.layout, 1)[:, :0])
    assert records.shape == (0, codec.record_bytes)
    assert decoded(codec, records).shape == (6, 0, codec.layout.plane_block_bytes)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("plane", [0, 3])
@pytest.mark.filterwarnings("error")
def test_numbers_without_a_code_are_refused_and_located(name: str, dtype: str, plane: int) -> None:
    form = FORMS[dtype]
    codec = codec_named(name, layout(dtype))
    nan, infinity = np.float32("nan"), np.float32("inf")
    patterns = [form.limit, form.limit | form.sign, form.sign - 1, 2 * form.sign - 1]
    if dtype == "float32":
        patterns += [int(value.view(np.uint32)) for value in (nan, infinity, -infinity)]
    for pattern in patterns:
        blocks = kv(codec.layout, 4)
        blocks.view(form.bits)[plane, 2, 77] = pattern
        place = f"{'values' if plane % 2 else 'keys'} of layer {plane // 2} in block 2"
        with pytest.raises(CannotEncode, match=place):
            codec.encode(blocks)


@pytest.mark.parametrize("shape", [(6, 2), (5, 2, 512), (6, 2, 511), (6, 1024)], ids=str)
def test_blocks_and_records_of_another_size_are_refused(codec: Codec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="blocks are"):
        codec.encode(np.zeros(shape, np.uint8))
    records = codec.encode(kv(codec.layout, 2))
    with pytest.raises(ValueError, match="blocks are"):
        codec.decode(records, np.zeros(shape, np.uint8))
    out = np.zeros((6, 2, codec.layout.plane_block_bytes), np.uint8)
    for wrong in (records[:1], records[:, :-1], records.view(np.int8), records.reshape(-1)):
        with pytest.raises(ValueError, match="records are"):
            codec.decode(wrong, out)
    assert not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.filterwarnings("error")
def test_garbage_is_refused_or_finite(name: str, dtype: str) -> None:
    codec = codec_named(name, layout(dtype, 1, 2, 4, 8))
    form, draw = FORMS[dtype], np.random.default_rng(3)
    good = codec.encode(kv(codec.layout, 1))
    refused = 0
    for attempt in range(300):
        records = good.copy()
        if attempt % 3:
            records[0, draw.integers(0, codec.record_bytes, 1 + attempt % 5)] = draw.integers(0, 256, 1 + attempt % 5)
        else:
            records[:] = draw.choice([0, 255, 127, 128, draw.integers(256)], records.shape)
        out = np.zeros((2, 1, codec.layout.plane_block_bytes), np.uint8)
        try:
            codec.decode(records, out)
        except CannotDecode as error:
            assert name in str(error)
            refused += 1
        assert np.isfinite(loaded(form, out.view(form.bits))).all()
        assert (magnitudes(form, out.view(form.bits)) < 2 * form.limit).all()
    assert refused > 0


def test_kv_that_is_no_float_is_refused_with_the_reason() -> None:
    mock = KVLayout("uint8", 2, 1, 8, 16, 4, 8)
    for name in LOSSY:
        with pytest.raises(ConfigError, match=f"{name} needs KV of .*bfloat16.* is uint8"):
            codec_named(name, mock)


def test_planes_that_are_not_keys_and_values_are_refused() -> None:
    for name in LOSSY:
        for wrong in (KVLayout("bfloat16", 2, 1, 8, 16, 3, 16), KVLayout("bfloat16", 2, 1, 8, 16, 4, 32)):
            with pytest.raises(ConfigError, match="a plane of keys and one of values"):
                codec_named(name, wrong)


def test_an_odd_count_of_numbers_is_refused_by_int4_alone() -> None:
    odd = layout("float16", 1, 3, 5, 17)
    with pytest.raises(ConfigError, match=r"255 numbers .* are odd; use int8"):
        codec_named("int4", odd)
    for name in ("none", "fp8", "int8"):
        check(codec_named(name, odd), kv(odd, 2))


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'int5'; use one of none, fp8, int8, int4"):
        codec_named("int5", layout("float32"))
