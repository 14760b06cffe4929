"""Which codec a link gets: the quickest one, and none worse than what a faster link gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bascule.policies.codec import Crossing, crossing_seconds, fastest_codec
from bascule.types import CodecCost

NONE = CodecCost(name="none")
INT8 = CodecCost(name="int8", ratio=1.86, encode_bytes_per_s=1.2e9, decode_bytes_per_s=1.6e9)
INT4 = CodecCost(name="int4", ratio=3.05, encode_bytes_per_s=0.6e9, decode_bytes_per_s=0.9e9)
MEASURED = (NONE, INT8, INT4)

rates = st.integers(1, 4000).map(lambda step: step * 1e6)
costs = st.builds(
    CodecCost,
    name=st.sampled_from(["fp8", "int8", "int4", "other"]),
    ratio=st.integers(1, 64).map(lambda step: step / 8),
    encode_bytes_per_s=rates,
    decode_bytes_per_s=rates,
)
codecs = st.lists(costs, max_size=5).map(lambda found: [NONE, *found])
crossings = st.builds(Crossing, size=st.integers(1, 1 << 30), chunk=st.integers(1 << 10, 1 << 26))


def test_a_crossing_is_the_slowest_stage_and_the_first_chunk_through_the_others() -> None:
    cost = CodecCost(name="int8", ratio=2, encode_bytes_per_s=100, decode_bytes_per_s=200)
    assert crossing_seconds(cost, Crossing(1000, 1000), 10) == pytest.approx(10 + 50 + 5)
    assert crossing_seconds(cost, Crossing(1000, 100), 10) == pytest.approx(50 + 1 + 0.5)
    assert crossing_seconds(cost, Crossing(0, 100), 10) == 0


@pytest.mark.parametrize(
    ("bits_per_s", "name"), [(100e9, "none"), (10e9, "none"), (5e9, "int8"), (1e9, "int4"), (1e8, "int4")]
)
def test_links_of_this_world_get_what_one_would_expect(bits_per_s: float, name: str) -> None:
    assert fastest_codec(MEASURED, Crossing(64 << 20, 1 << 20), bits_per_s / 8).name == name


def test_ties_go_to_none() -> None:
    twin = CodecCost(name="other")
    for order in ((NONE, twin), (twin, NONE)):
        assert fastest_codec(order, Crossing(1000, 100), 1e9).name == "none"
    assert fastest_codec((INT4, INT8, NONE), Crossing(1000, 100), math.inf).name == "none"
    assert fastest_codec((INT4, INT8, NONE), Crossing(0, 100), 1e6).name == "none"


@given(codecs, crossings, rates, rates)
def test_a_slower_link_never_gets_a_worse_ratio(
    found: Sequence[CodecCost], crossing: Crossing, one: float, other: float
) -> None:
    slow, fast = (fastest_codec(found, crossing, rate) for rate in sorted((one, other)))
    # Rounding may decide a tie either way.
    tied = [crossing_seconds(slow, crossing, rate) - crossing_seconds(fast, crossing, rate) for rate in (one, other)]
    assert slow.ratio >= fast.ratio or max(map(abs, tied)) <= 1e-9 * crossing_seconds(NONE, crossing, min(one, other))


@given(codecs, crossings, rates)
def test_what_is_given_up_is_at_most_the_coding_of_one_chunk(
    found: Sequence[CodecCost], crossing: Crossing, rate: float
) -> None:
    chosen = crossing_seconds(fastest_codec(found, crossing, rate), crossing, rate)
    for cost in found:
        chunk = min(crossing.chunk, crossing.size)
        fill = max(chunk / other.encode_bytes_per_s + chunk / other.decode_bytes_per_s for other in found)
        assert chosen <= (crossing_seconds(cost, crossing, rate) + fill) * (1 + 1e-9)
    assert chosen <= crossing_seconds(NONE, crossing, rate)


@given(codecs, crossings, rates)
def test_nothing_is_given_up_where_better_ratios_cost_more_time(
    found: Sequence[CodecCost], crossing: Crossing, rate: float
) -> None:
    paces = sorted(
        {min(cost.encode_bytes_per_s, cost.decode_bytes_per_s): cost for cost in found}.items(), reverse=True
    )
    ordered = [cost for place, (_, cost) in enumerate(paces) if all(cost.ratio > one.ratio for _, one in paces[:place])]
    chosen = fastest_codec(ordered, crossing, rate)
    times = [crossing_seconds(cost, crossing, rate) for cost in ordered]
    assert crossing_seconds(chosen, crossing, rate) == min(times)


EVEN = CodecCost(name="fp8", ratio=1.875, encode_bytes_per_s=62e6, decode_bytes_per_s=62e6)
ONE_WAY = CodecCost(name="fp8", ratio=1.875, encode_bytes_per_s=62e6, decode_bytes_per_s=67e6)
FEW = CodecCost(name="fp8", ratio=0.125, encode_bytes_per_s=1e6, decode_bytes_per_s=1e6)


@given(codecs.flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))), crossings, rates)
@example(([NONE, FEW, EVEN, ONE_WAY], [ONE_WAY, FEW, EVEN, NONE]), Crossing(1, 1024), 15e6)
def test_the_order_of_the_codecs_does_not_matter(
    orders: tuple[list[CodecCost], ...], crossing: Crossing, rate: float
) -> None:
    one, other = (fastest_codec(order, crossing, rate) for order in orders)
    assert one.ratio == other.ratio


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no codecs"):
        fastest_codec([], Crossing(1, 1), 1e9)
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bytes/s"):
            fastest_codec(MEASURED, Crossing(1, 1), rate)
    for field in ("ratio", "encode_bytes_per_s", "decode_bytes_per_s"):
        with pytest.raises(ValueError, match=field):
            CodecCost(**{"name": "int8", field: 0.0})
