"""What the physics must say whatever is fitted: known shapes, limits, and which way things go."""

from __future__ import annotations

import numpy as np
import pytest
from analytic_rig import CATALOGUE, deployment, load

from bascule.analytic.correction import physical
from bascule.analytic.deployment import Deployment, Load, Spread
from bascule.analytic.efficiencies import efficiency_columns
from bascule.analytic.physics import LIMITS, Efficiency
from bascule.analytic.predictor import Predictor
from bascule.analytic.questions import Questions
from bascule.analytic.shapes import ModelShape
from bascule.models.spec import spec_from_config
from bascule.policies.cost import PrefillPart, step_seconds


@pytest.mark.parametrize(
    ("model", "billions", "active", "kv_kib"),
    [
        ("meta-llama/Llama-3.1-8B", 8.0, 7.5, 128),
        ("meta-llama/Llama-3.1-70B", 70.6, 69.5, 320),
        ("meta-llama/Llama-3.1-405B", 405.9, 403.7, 504),
        ("Qwen/Qwen3-30B-A3B", 30.5, 3.0, 96),
        ("openai/gpt-oss-20b", 20.9, 3.6, 48),
        ("mistralai/Mixtral-8x7B", 46.7, 12.8, 128),
        ("Qwen/Qwen3-32B", 32.8, 32.0, 256),
        ("Qwen/Qwen3-235B-A22B", 235, 21.5, 188),
        ("openai/gpt-oss-120b", 117, 5.1, 72),
        ("deepseek-ai/DeepSeek-R1", 671, 36.5, 68.6),
        ("moonshotai/Kimi-K2.5", 1026, 31.5, 68.6),
    ],
)
def test_shapes_weigh_what_their_makers_say(model: str, billions: float, active: float, kv_kib: float) -> None:
    shape = CATALOGUE.find_model(model)
    passed = shape.attention_parameters + shape.dense_parameters + shape.head_parameters
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert (passed + shape.expert_parameters * shape.routed_share) / 1e9 == pytest.approx(active, rel=0.02)
    assert 2 * shape.kv_numbers * shape.attention_layers / 1024 == pytest.approx(kv_kib, rel=0.01)


def test_a_model_whose_files_are_here_needs_no_catalogue() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
    assert ModelShape.from_spec(spec_from_config(config, {}, "here")) == CATALOGUE.find_model("meta-llama/Llama-3.1-8B")


def limits_of(each: Deployment, question: Load) -> np.ndarray:
    """TTFT and TPOT in seconds if every limit were reached."""
    efficiency = Efficiency(**{name: np.array([value]) for name, value in LIMITS.items()})
    return np.exp(physical(Questions.of([each], [question]), efficiency)[0])


def test_at_the_limits_one_stream_reads_the_weights_once() -> None:
    alone = deployment(weights="bf16", decode=Spread(tp=1), system="b200_sxm")
    _, tpot = limits_of(alone, load(prompt=16, output=16, concurrency=1))
    shape = alone.shape
    read = 2 * (shape.attention_parameters + shape.dense_parameters + shape.head_parameters) / 7.7e12
    assert tpot == pytest.approx(read, rel=0.01)


def test_at_the_limits_a_long_prompt_takes_its_operations() -> None:
    alone = deployment(weights="bf16", decode=Spread(tp=1), system="b200_sxm")
    ttft, _ = limits_of(alone, load(prompt=4096, output=16, concurrency=1))
    shape = alone.shape
    operations = 2 * 4096 * (shape.attention_parameters + shape.dense_parameters)
    pairs = 4096**2 / 2 * shape.pair_flops * shape.layers
    assert ttft == pytest.approx((operations + pairs) / 2.25e15, rel=0.1)


def physics(each: Deployment, question: Load) -> np.ndarray:
    return np.exp(physical(Questions.of([each], [question]), efficiency_columns([each], {}))[0])


def test_more_work_takes_longer_and_faster_hardware_shorter() -> None:
    ttft, tpot = physics(deployment(), load())
    longer_ttft, longer_tpot = physics(deployment(), load(prompt=8192))
    assert longer_ttft > 2 * ttft and longer_tpot > tpot
    assert (physics(deployment(weights="bf16"), load()) > (ttft, tpot)).all()
    assert (physics(deployment(system="b200_sxm"), load()) < (ttft, tpot)).all()
    assert (physics(deployment(decode=Spread(tp=1)), load()) > (ttft, tpot)).all()


def test_few_streams_touch_few_experts() -> None:
    model = "deepseek-ai/DeepSeek-V3"
    spread = Spread(tp=8, moe_tp=8)
    _, one = physics(deployment(model, "b200_sxm", decode=spread), load(concurrency=1))
    _, many = physics(deployment(model, "b200_sxm", decode=spread), load(concurrency=64))
    assert many > 1.5 * one


def test_who_does_not_fit_into_memory_waits() -> None:
    crowded = deployment(system="h200_sxm", decode=Spread(tp=1))
    fits, _ = physics(crowded, load(concurrency=32, prompt=1024, output=8192))
    waits, _ = physics(crowded, load(concurrency=256, prompt=1024, output=8192))
    assert waits > 30 * fits


def test_too_few_prefill_workers_hold_requests_back() -> None:
    def apart(prefillers: int) -> np.ndarray:
        split = deployment(prefill=Spread(tp=4, workers=prefillers), decode=Spread(tp=4, workers=4))
        return physics(split, load(prompt=8192, output=256, concurrency=256))

    few, many = apart(1), apart(16)
    assert few[0] > 2 * many[0]
    assert few[1] < many[1], "what waits for prefill does not decode"


def test_stages_hold_more_and_are_no_faster_for_one_stream() -> None:
    one, staged = (physics(deployment(decode=Spread(tp=1, pp=pp)), load(concurrency=1)) for pp in (1, 4))
    assert staged == pytest.approx(one)
    one, staged = (physics(deployment(decode=Spread(tp=1, pp=pp)), load(concurrency=512)) for pp in (1, 4))
    assert (staged < one).all()


def test_the_cost_model_for_a_simulator_says_what_steps_take() -> None:
    each, predictor = deployment(), Predictor()
    model = predictor.cost_model(each)
    for new, cached in ((512, 0), (2048, 0), (2048, 4096), (8192, 0)):
        pairs = new * (cached + new / 2)
        said = predictor.step_seconds(each, tokens=new, streams=1, context=cached + new, pairs=pairs)
        assert step_seconds(model, [PrefillPart(new, cached)], 0, 0) == pytest.approx(said, rel=0.25)
    for streams, context in ((1, 1000), (8, 4000), (64, 1000), (256, 2000)):
        said = predictor.step_seconds(each, tokens=streams, streams=streams, context=context, pairs=streams * context)
        assert step_seconds(model, [], streams, streams * context) == pytest.approx(said, rel=0.25)
