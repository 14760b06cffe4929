"""What the predictor as shipped answers: positive, never falling with more clients, and honest about what it knows."""

from __future__ import annotations

import math

import pytest
from analytic_rig import CALIBRATION_TABLE, CATALOGUE, deployment, load

from bascule.analytic.deployment import Deployment, Spread
from bascule.analytic.predictor import Basis, Predictor
from bascule.analytic.table import read_rows

DEPLOYMENTS = [
    deployment(),
    deployment("Qwen/Qwen3-32B", "h100_sxm", weights="bf16", kv_bytes=2.0, framework="trtllm", decode=Spread(tp=2)),
    deployment("deepseek-ai/DeepSeek-V3", "b200_sxm", framework="sglang", decode=Spread(tp=8, moe_tp=8)),
    deployment("openai/gpt-oss-120b", "h200_sxm", weights="nvfp4", decode=Spread(tp=1)),
    deployment("MiniMaxAI/MiniMax-M2.5", "mi300x", decode=Spread(tp=8, ep=8)),
    deployment(prefill=Spread(tp=4, workers=2), decode=Spread(tp=4, workers=1)),
    deployment("moonshotai/Kimi-K2.5", "gb200", weights="nvfp4", decode=Spread(dp=16, ep=16)),
    deployment(decode=Spread(tp=4, workers=3)),
]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


@pytest.mark.parametrize("each", DEPLOYMENTS, ids=lambda each: f"{each.model} {each.system}")
def test_more_clients_never_make_anything_faster(predictor: Predictor, each: Deployment) -> None:
    clients = sorted({*range(1, 40, 3), *(round(1.3**power) for power in range(30))})
    answers = predictor.predict([each] * len(clients), [load(2048, 512, count) for count in clients])
    for name in ("ttft_s", "tpot_s"):
        times = [getattr(answer, name) for answer in answers]
        assert all(math.isfinite(time) and time > 0 for time in times)
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("each", "basis"),
    [
        (deployment(), Basis.SEEN),
        (deployment(system="mi300x"), Basis.NEW_GPU),
        (deployment(framework="another"), Basis.NEW_FRAMEWORK),
    ],
)
def test_an_answer_says_what_was_measured(predictor: Predictor, each: Deployment, basis: Basis) -> None:
    (answer,) = predictor.predict([each], [load()])
    assert answer.basis is basis
    seen = predictor.calibration.expected[Basis.SEEN]
    assert answer.expected.tpot >= seen.tpot and answer.expected.ttft >= seen.ttft


def test_nothing_asked_nothing_answered(predictor: Predictor) -> None:
    assert predictor.predict([], []) == []


def test_an_answer_does_not_depend_on_what_else_is_asked(predictor: Predictor) -> None:
    loads = [load(concurrency=count) for count in range(1, 1 + len(DEPLOYMENTS))]
    together = predictor.predict(DEPLOYMENTS, loads)
    alone = [predictor.predict([each], [own])[0] for each, own in zip(DEPLOYMENTS, loads, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert (one.ttft_s, one.tpot_s) == pytest.approx((other.ttft_s, other.tpot_s), rel=1e-9)


def test_replicas_share_the_clients(predictor: Predictor) -> None:
    one, three = deployment(), deployment(decode=Spread(tp=4, moe_tp=4, workers=3))
    assert predictor.predict([three], [load(concurrency=48)]) == predictor.predict([one], [load(concurrency=16)])


@pytest.mark.skipif(not CALIBRATION_TABLE.exists(), reason="the calibration table is not beside this checkout")
def test_the_shipped_calibration_is_that_of_the_table(predictor: Predictor) -> None:
    rows, _ = read_rows(CALIBRATION_TABLE, CATALOGUE)
    some = [row for row in rows if row.deployment and row.load and row.tpot_ms][::7]
    answers = predictor.predict([row.deployment for row in some], [row.load for row in some])
    off = [abs(1000 * said.tpot_s / row.tpot_ms - 1) for said, row in zip(answers, some, strict=True) if row.tpot_ms]
    assert predictor.calibration.rows == len(rows)
    assert sum(off) / len(off) < 0.15
