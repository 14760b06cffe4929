"""Which codec a push gets, and whose KV a worker with codecs may share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bascule.errors import ConfigError
from bascule.kv.arena import Arena
from bascule.kv.codecs import NAMES, codec_named
from bascule.kv.codecs.choice import AUTO, AUTOMATIC, fingerprint_with
from bascule.kv.transfer.base import Span
from bascule.kv.transfer.coding import Coding, arriving, arriving_checksums, cut
from bascule.types import CodecCost, KVLayout

LAYOUT = KVLayout("bfloat16", 2, 1, 64, 16, 4, 128)
INT8 = codec_named("int8", LAYOUT)
COSTS = (CodecCost(name="none"), CodecCost(name="int8", ratio=2, encode_bytes_per_s=1e9, decode_bytes_per_s=1e9))
SIZE = 1 << 26


def test_without_a_codec_nothing_is_coded() -> None:
    for coding in (Coding(), Coding.of("none", LAYOUT), Coding.of("none", KVLayout("uint8", 1, 1, 5, 3, 3, 5))):
        assert coding.codecs == {}
        assert coding.codec_for(SIZE, 1.0) is None


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_codec_by_name_is_used_over_every_link(name: str) -> None:
    coding = Coding.of(name, LAYOUT)
    assert list(coding.codecs) == [name]
    for rate in (None, 1.0, 1e15):
        chosen = coding.codec_for(SIZE, rate)
        assert chosen is not None and chosen.name == name


def test_auto_codes_where_the_link_is_slower_than_coding() -> None:
    coding = Coding([INT8], COSTS)
    assert coding.codec_for(SIZE, 1e8) is INT8
    assert coding.codec_for(SIZE, 1e10) is None
    assert coding.codec_for(SIZE, None) is None, "nothing is known of the link"
    assert coding.codec_for(0, 1e8) is None


def test_auto_measures_what_it_chooses_from_and_counts_what_the_sender_decodes() -> None:
    coding = Coding.of(AUTO, LAYOUT)
    assert list(coding.codecs) == [name for name in AUTOMATIC if name != "none"]
    exact, *lossy = coding._costs
    assert exact == CodecCost(name="none")
    assert all(cost.encode_bytes_per_s < cost.decode_bytes_per_s for cost in lossy)
    assert coding.codec_for(SIZE, 1.0) is coding.codecs["int4"], "the smallest"
    assert coding.codec_for(SIZE, 1e15) is None


def test_a_codec_that_cannot_represent_the_kv_is_refused_by_the_flag_s_name() -> None:
    with pytest.raises(ConfigError, match=r"--transfer-codec: codec int8 needs .* use none"):
        Coding.of("int8", KVLayout("uint8", 2, 1, 64, 16, 4, 64))


def test_every_combination_of_codecs_is_a_kv_of_its_own() -> None:
    allowed = (*NAMES, AUTO)
    names = {fingerprint_with("m", *pair) for pair in itertools.product(allowed, allowed)}
    assert len(names) == len(allowed) ** 2
    assert fingerprint_with("m", "none", "none") == "m"


def test_spans_are_cut_without_gap_or_overlap() -> None:
    assert list(cut([Span(3, 10, 5), Span(20, 0, 2)], 2)) == [
        Span(3, 10, 2),
        Span(5, 12, 2),
        Span(7, 14, 1),
        Span(20, 0, 2),
    ]


def test_checksums_of_what_arrives_are_those_that_the_receiver_takes() -> None:
    numbers = np.random.default_rng(0).standard_normal((4, 5, 16 * 64), np.float32)
    blocks = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    arrived = arriving(INT8, INT8.encode(blocks))
    assert not np.array_equal(arrived, blocks)
    with Arena.create(LAYOUT, 5) as arena:
        arena.bytes[:] = arrived
        assert arriving_checksums(arrived) == arena.checksums(range(5), LAYOUT.block_size)
