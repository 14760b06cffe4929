"""The cost model's terms, and its form as a file."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.policies.cost import CostColumns, PrefillPart, decode_seconds, step_seconds
from bascule.types import CostModel

MODEL = CostModel(step_s=0.004, token_s=0.0002, pair_s=1e-8, context_s=1e-6, draw_s=0.0001)


def test_the_default_engine_takes_no_time() -> None:
    assert step_seconds(CostModel(), [PrefillPart(512, 1000)], streams=8, context=9000) == 0.0


def test_a_decode_step_pays_for_its_streams_and_the_context_they_read() -> None:
    assert step_seconds(MODEL, [], streams=8, context=4000) == pytest.approx(0.004 + 8 * 0.0002 + 4000 * 1e-6)


def test_a_prefill_part_pays_for_its_tokens_and_the_pairs_they_attend_to() -> None:
    own = 100 * 0.0002 + 100 * (400 + 50) * 1e-8 + 400 * 1e-6
    assert step_seconds(MODEL, [PrefillPart(100, 400)], 0, 0) == pytest.approx(0.004 + own)


def test_a_stream_beside_a_prompt_pays_for_its_token_for_drawing_it_and_for_its_context() -> None:
    alone = step_seconds(MODEL, [PrefillPart(100, 400)], 0, 0)
    both = step_seconds(MODEL, [PrefillPart(100, 400)], 3, 900)
    assert both - alone == pytest.approx(3 * (0.0002 + 0.0001) + 900 * 1e-6)


def test_cutting_a_prompt_into_chunks_costs_the_further_steps_and_reading_what_is_there() -> None:
    whole = step_seconds(MODEL, [PrefillPart(512, 0)], 0, 0)
    chunks = sum(step_seconds(MODEL, [PrefillPart(128, start)], 0, 0) for start in range(0, 512, 128))
    assert chunks == pytest.approx(whole + 3 * MODEL.step_s + (128 + 256 + 384) * MODEL.context_s)


def test_parts_may_come_from_a_generator() -> None:
    parts = [PrefillPart(3, 0), PrefillPart(5, 7)]
    assert step_seconds(MODEL, (part for part in parts), 2, 9) == step_seconds(MODEL, parts, 2, 9)


def test_a_file_of_the_first_four_coefficients_is_a_cost_model() -> None:
    text = b'{"step_s": 0.004, "token_s": 0.0002, "pair_s": 1e-8, "context_s": 1e-6}'
    assert msgspec.json.decode(text, type=CostModel).draw_s == 0


def test_it_survives_a_round_through_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(MODEL), type=CostModel) == MODEL


TABLE = CostModel(step_s=0.03, token_s=0.001, context_s=1e-6, stream_s=(0.005, 0.006, 0.008, 0.016, 0.03))


def test_streams_alone_follow_their_table_and_the_line_through_its_end() -> None:
    assert decode_seconds(TABLE, 4, 1000) == pytest.approx(0.008 + 0.001)
    assert decode_seconds(TABLE, 6, 0) == pytest.approx(0.012)
    assert decode_seconds(TABLE, 24, 0) == pytest.approx(0.03 + 0.014)
    assert decode_seconds(TABLE, 0, 0) == 0.0
    assert step_seconds(TABLE, [PrefillPart(10, 0)], 4, 0) == pytest.approx(0.03 + 14 * 0.001)


CONVEX = CostModel(step_s=0.03, token_s=0.001, context_s=1e-6, stream_s=(0.005, 0.006, 0.008, 0.014, 0.03))


def column(model: CostModel, streams: int, context: float) -> float:
    """What columns say of a worker with this model, beside one without."""
    columns = CostColumns.empty(2)
    columns.put(1, model)
    both = columns.steps(np.array([0.0, streams]), np.array([0.0, context]))[0]
    assert both[0] == 0.0
    return float(both[1])


@pytest.mark.parametrize("model", [MODEL, CONVEX, CostModel(), CostModel(stream_s=(0.02,)), CostModel(step_s=0.1)])
@pytest.mark.parametrize("streams", [0, 1, 2, 3, 5, 8, 13, 16, 31, 128, 200, 1000])
def test_columns_say_the_same_as_the_model(model: CostModel, streams: int) -> None:
    assert column(model, streams, 77.0 * streams) == pytest.approx(decode_seconds(model, streams, 77 * streams))


def test_columns_take_in_several_rows_of_streams_at_once() -> None:
    columns = CostColumns.empty(2)
    columns.put(1, CONVEX)
    streams = np.array([[0.0, 3.0], [7.0, 9.0]])
    alone, beside, more = columns.steps(streams, 10 * streams)
    assert alone[1].tolist() == columns.steps(streams[1], 10 * streams[1])[0].tolist()
    assert beside[0, 1] == pytest.approx(step_seconds(CONVEX, [PrefillPart(0, 0)], 3, 30))
    assert more[0, 1] == pytest.approx(0.001)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.001, 0.1), min_size=1, max_size=10))
def test_in_columns_a_stream_more_never_costs_less_than_the_one_before(table: list[float]) -> None:
    model = CostModel(stream_s=tuple(table))
    seconds = [column(model, streams, 0.0) for streams in range(1, 200)]
    more = np.diff(seconds)
    assert np.all(more >= -1e-12)
    assert np.all(np.diff(more) >= -1e-12)
    assert seconds[0] == pytest.approx(table[0])


def test_a_table_that_is_not_convex_is_bent_no_more_than_it_takes() -> None:
    assert column(TABLE, 4, 0) == pytest.approx(0.008)
    assert column(TABLE, 8, 0) == pytest.approx(0.008 + 4 / 12 * 0.022)
    assert column(TABLE, 16, 0) == pytest.approx(0.03)


@pytest.mark.parametrize(
    "text", [b'{"stream_s": [0.1, -1]}', b'{"step_s": -0.1}', b'{"step_seconds": 0.1}', b'{"step_s": "slow"}']
)
def test_a_file_with_a_wrong_coefficient_is_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=CostModel)
