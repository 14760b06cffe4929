"""Decision records are bounded, found by the id that clients know, and say how far predictions were off."""

from __future__ import annotations

import pytest

from bascule.observe.decision_fields import record_fields
from bascule.observe.decisions import COMPARED, Actual, Attempt, DecisionRecords, Outcome, Record
from bascule.policies.snapshot import Candidate, Prediction
from bascule.types import FinishReason, Placement, RequestId, Slo, WorkerId

LOCAL = Placement(WorkerId("a"), WorkerId("a"))
REMOTE = Placement(WorkerId("a"), WorkerId("b"))


def record(name: str, output: int = 0, public_id: str | None = None) -> Record:
    return Record(
        id=RequestId(name),
        public_id=public_id or name,
        output=output,
        prompt_tokens=7,
        max_tokens=9,
        slo=Slo(),
        session="",
        priority=0,
        policy="adaptive",
        arrived=1e9,
    )


def attempt(placement: Placement | None, ttft_s: float = 1.0, tpot_s: float = 0.1) -> Attempt:
    predicted = Prediction(ttft_s=ttft_s, tpot_s=tpot_s)
    candidates = (Candidate(placement=LOCAL, predicted=predicted), Candidate(placement=REMOTE, predicted=predicted))
    return Attempt(waited_s=0.0, reason="because", candidates=candidates, chosen=placement)


def test_only_the_latest_requests_are_kept() -> None:
    records = DecisionRecords(kept=3)
    for number in range(5):
        records.open(record(f"r{number}"))
    assert len(records) == 3
    assert records.find("r1") == [] and records._by_id.keys() == {"r2", "r3", "r4"}
    assert [one.id for one in records.latest(2)] == ["r4", "r3"]


def test_an_id_that_comes_again_is_forgotten_one_by_one() -> None:
    records = DecisionRecords(kept=2)
    for number in range(3):
        records.open(record(f"same~{number}", public_id="same"))
    assert [one.id for one in records.find("same")] == ["same~1", "same~2"]


def test_errors_are_medians_over_the_latest_completed_requests() -> None:
    records = DecisionRecords()
    for was in [100.0] * COMPARED + [2.0] * (COMPARED // 2) + [4.0] * (COMPARED // 2 + 1):
        one = record("r")
        records.open(one)
        records.decided(one, attempt(LOCAL, ttft_s=1.0, tpot_s=0.1))
        records.ended(one, Outcome.COMPLETED, Actual(ttft_s=was, tpot_s=0.2))
    assert records.figures().errors == {"ttft": 0.75, "tpot": 0.5}


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.TIMEOUT, Outcome.FAILED, Outcome.REJECTED])
def test_what_did_not_complete_says_nothing_of_the_predictions(outcome: Outcome) -> None:
    records = DecisionRecords()
    one = record("r")
    records.decided(one, attempt(LOCAL))
    records.ended(one, outcome, Actual(ttft_s=3.0, tpot_s=0.2))
    assert records.figures().errors == {}


def test_a_request_that_was_placed_twice_says_nothing_of_the_predictions() -> None:
    records = DecisionRecords()
    one = record("r")
    records.decided(one, attempt(LOCAL))
    records.decided(one, attempt(REMOTE))
    records.ended(one, Outcome.COMPLETED, Actual(ttft_s=3.0, tpot_s=0.2))
    assert records.figures().errors == {}


def test_decisions_and_rejections_are_counted_by_kind() -> None:
    records = DecisionRecords()
    for placement in (LOCAL, REMOTE, REMOTE, None):
        records.decided(record("r"), attempt(placement))
    records.rejected(record("r"), "slo", "late")
    figures = records.figures(policy_failures=3, log_lost=4)
    assert figures.decisions == {"local": 1, "remote": 2}
    assert figures.rejected == {"slo": 1}
    assert (figures.policy_failures, figures.log_lost) == (3, 4)


def test_fields_are_the_latest_decisions_and_all_attempts() -> None:
    records = DecisionRecords()
    one = record("r~1", public_id="r")
    records.decided(one, attempt(LOCAL, ttft_s=1.0))
    records.decided(one, attempt(REMOTE, ttft_s=2.0))
    records.ended(one, Outcome.COMPLETED, Actual(ttft_s=3.0, finish=FinishReason.STOP))
    fields = record_fields(one)
    assert (fields["id"], fields["backend_id"], fields["outcome"]) == ("r", "r~1", "completed")
    assert fields["chosen"] == "remote;prefill=a;decode=b"
    assert fields["predicted"]["ttft_s"] == 2.0  # type: ignore[index]
    assert [each["chosen"] for each in fields["attempts"]] == ["local;decode=a", "remote;prefill=a;decode=b"]  # type: ignore[attr-defined]
