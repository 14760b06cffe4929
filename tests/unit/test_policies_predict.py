"""What a placement is predicted to bring, beside what the batch policy then lets happen."""

from __future__ import annotations

import math

import pytest
from msgspec import structs
from tests.unit.routing_rig import COST, Cluster

from bascule.policies.batch import TPOT_MARGIN, BatchLimits, Row, Stream, grant_tokens, slack_seconds
from bascule.policies.cost import PrefillPart, step_seconds
from bascule.policies.predict import predict
from bascule.types import CostModel, Role, Slo

STANDARD = Slo(2.0, 0.06, 0.2)


def test_a_worker_that_cuts_prompts_smaller_takes_more_steps_and_disturbs_its_streams_less() -> None:
    cluster = Cluster()
    cluster.add("coarse", streams=(100,), chunk_tokens=512)
    cluster.add("fine", streams=(100,), chunk_tokens=64)
    snapshot = cluster.snapshot()
    prefill, _ = predict(snapshot, cluster.query(2000, gap_planned_s=10.0))
    assert prefill.prefill_s[1] > prefill.prefill_s[0]
    assert prefill.step_s[1] < prefill.step_s[0]
    assert prefill.last_tokens[1] == 64


@pytest.mark.parametrize("saved_s", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_prompt_takes_as_long_as_the_streams_beside_it_let_it(saved_s: float, count: int) -> None:
    planned_s = TPOT_MARGIN * STANDARD.tpot_s
    stream = Stream(gap_s=STANDARD.gap_s, tpot_s=STANDARD.tpot_s, gaps=1000, elapsed_s=1000 * planned_s - saved_s)
    slack_s = slack_seconds([stream] * count, 100 * count, COST)
    assert slack_s == pytest.approx(saved_s)
    cluster = Cluster()
    cluster.add("a", streams=(100,) * count, slack_s=slack_s)
    query = cluster.query(1200, gap_planned_s=STANDARD.gap_s, tpot_planned_s=STANDARD.tpot_s)
    expected = predict(cluster.snapshot(), query)[0].prefill_s[0]
    taken, computed = 0.0, 0
    while computed < 1200:
        rows = [*[Row(100, 101, stream)] * count, Row(computed, 1200)]
        grant = grant_tokens(rows, BatchLimits(chunk_tokens=512, step_tokens=512), COST)[-1]
        step_s = step_seconds(COST, [PrefillPart(grant, computed)], count, 100 * count)
        stream = structs.replace(stream, gaps=stream.gaps + 1, elapsed_s=stream.elapsed_s + step_s)
        taken, computed = taken + step_s, computed + grant
    assert expected == pytest.approx(taken, rel=0.1)


def test_what_makes_steps_longer_beside_prompts_is_not_taken_for_something_that_workers_could_cut() -> None:
    cluster = Cluster()
    slow, fine = (cluster.add(name, streams=(100,) * 4) for name in ("slow", "fine"))
    for number in range(400):
        cluster.columns.stepped(slow, 0.01, 0.15 * number)
        cluster.columns.stepped(fine, 0.15, 0.15 * number)
    cluster.now = 60.0
    query = cluster.query(100, slo=STANDARD, tpot_planned_s=STANDARD.tpot_s)
    decode = predict(cluster.snapshot(), query)[1]
    assert decode.tpot_s[slow] > 0.1 > 2 * decode.tpot_s[fine]


def test_prompts_that_wait_slow_a_stream_to_the_pace_that_is_kept_and_no_further() -> None:
    def expected(
        prompts: tuple[int, ...], line_s: float, role: Role = Role.MIXED, tpot_s: float = 0.06, feeders: int = 0
    ) -> float:
        cluster = Cluster()
        cluster.add("a", role, streams=(100,), prompts=prompts)
        for number in range(feeders):
            cluster.add(f"p{number}", Role.PREFILL)
        slo = Slo(2.0, tpot_s, 0.2)
        query = cluster.query(100, slo=slo, tpot_planned_s=0.06, gap_planned_s=0.2, line_s=line_s, output_tokens=100.0)
        return float(predict(cluster.snapshot(), query)[1].tpot_s[0])

    alone = expected((), 0.0)
    assert expected((1000,), 0.0) == pytest.approx(alone + 1000 * COST.token_s / 100, rel=0.2)
    assert expected((), 1.0) == pytest.approx(alone + 0.01)
    assert expected((), 1.0, feeders=3) == pytest.approx(alone + 0.0025)
    assert expected((), 1.0, Role.DECODE) == alone, "they go elsewhere"
    assert expected((3000,), 30.0, tpot_s=0.05) == pytest.approx(TPOT_MARGIN * 0.05), "what it asks for itself"
    assert expected((3000,), 30.0) == pytest.approx(TPOT_MARGIN * 0.06)
    assert TPOT_MARGIN * 0.06 < expected((3000,), 30.0, tpot_s=math.inf) < 0.2, "the gap holds where no TPOT does"


def test_no_step_takes_less_than_that_of_one_stream_which_reads_all_weights() -> None:
    cluster = Cluster()
    cluster.add("a", cost=CostModel(step_s=0.0005, token_s=0.0005, stream_s=(0.004, 0.004, 0.005)))
    assert predict(cluster.snapshot(), cluster.query(4))[0].prefill_s[0] == pytest.approx(0.004)
