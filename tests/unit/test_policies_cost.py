"""The cost model's terms, and its form as a file."""

from __future__ import annotations

import msgspec
import pytest

from bascule.policies.cost import CostModel, PrefillPart

MODEL = CostModel(step_s=0.004, token_s=0.0002, pair_s=1e-8, context_s=1e-6)


def test_the_default_engine_takes_no_time() -> None:
    assert CostModel().step_seconds([PrefillPart(512, 1000)], streams=8, context=9000) == 0.0


def test_a_decode_step_pays_for_its_streams_and_the_context_they_read() -> None:
    assert MODEL.step_seconds([], streams=8, context=4000) == pytest.approx(0.004 + 8 * 0.0002 + 4000 * 1e-6)


def test_a_prefill_part_pays_for_its_tokens_and_the_pairs_they_attend_to() -> None:
    pairs = 100 * (400 + 50)
    assert MODEL.step_seconds([PrefillPart(100, 400)], 0, 0) == pytest.approx(0.004 + 100 * 0.0002 + pairs * 1e-8)


def test_cutting_a_prompt_into_chunks_costs_only_the_further_steps() -> None:
    whole = MODEL.step_seconds([PrefillPart(512, 0)], 0, 0)
    chunks = sum(MODEL.step_seconds([PrefillPart(128, start)], 0, 0) for start in range(0, 512, 128))
    assert chunks == pytest.approx(whole + 3 * MODEL.step_s)


def test_parts_may_come_from_a_generator() -> None:
    parts = [PrefillPart(3, 0), PrefillPart(5, 7)]
    assert MODEL.step_seconds((part for part in parts), 2, 9) == MODEL.step_seconds(parts, 2, 9)


def test_it_survives_a_round_through_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(MODEL), type=CostModel) == MODEL


@pytest.mark.parametrize("text", [b'{"step_s": -0.1}', b'{"step_seconds": 0.1}', b'{"step_s": "slow"}'])
def test_a_file_with_a_wrong_coefficient_is_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=CostModel)
