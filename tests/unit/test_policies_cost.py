"""The cost model's terms, and its form as a file."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

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


@pytest.mark.parametrize("model", [MODEL, TABLE])
def test_columns_say_the_same_as_the_model(model: CostModel) -> None:
    columns = CostColumns.empty(2)
    columns.put(1, model)
    for streams in (0, 1, 2, 3, 5, 8, 13, 16, 31, 128, 200):
        context = np.array([0.0, 77.0 * streams])
        assert columns.decode(np.array([0.0, streams]), context)[1] == pytest.approx(
            decode_seconds(model, streams, 77 * streams)
        )
    parts = [PrefillPart(100, 50)]
    mixed = columns.mixed(np.full(2, 100.0), np.full(2, 50.0), np.full(2, 3.0), np.full(2, 900.0))
    assert mixed[1] == pytest.approx(step_seconds(model, parts, 3, 900))
    assert mixed[0] == 0.0


@pytest.mark.parametrize(
    "text", [b'{"stream_s": [0.1, -1]}', b'{"step_s": -0.1}', b'{"step_seconds": 0.1}', b'{"step_s": "slow"}']
)
def test_a_file_with_a_wrong_coefficient_is_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=CostModel)
