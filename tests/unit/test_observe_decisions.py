"""Decision records are bounded, found by the id that clients know, and say how far predictions were off."""

from __future__ import annotations

import gc
import tracemalloc
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import json, structs

from bascule.observe.decision_fields import record_fields
from bascule.observe.decisions import COMPARED, Actual, Attempt, DecisionRecords, Outcome, Record
from bascule.policies.snapshot import Candidate, Prediction
from bascule.types import FinishReason, Placement, RequestId, Slo, StoreHandoff, Tier, WorkerId

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


def end(records: DecisionRecords, one: Record, outcome: Outcome = Outcome.COMPLETED) -> Record:
    """A request comes, is placed and ends."""
    records.open(one)
    records.decided(one, attempt(LOCAL))
    records.ended(one, outcome, Actual(ttft_s=1.0))
    return one


def test_only_the_latest_requests_are_kept() -> None:
    records = DecisionRecords(kept=3)
    for number in range(5):
        end(records, record(f"r{number}"))
    assert len(records) == 3
    assert records.find("r1") == [] and records._by_id.keys() == {"r2", "r3", "r4"}
    assert [one.id for one in records.latest(2)] == ["r4", "r3"]


def test_an_id_that_comes_again_is_forgotten_one_by_one() -> None:
    records = DecisionRecords(kept=2)
    for number in range(3):
        end(records, record(f"same~{number}", public_id="same"))
    assert [one.id for one in records.find("same")] == ["same~1", "same~2"]


def test_refusals_push_out_refusals_and_nothing_that_was_served() -> None:
    records = DecisionRecords(kept=3, refused_kept=2)
    for number in range(4):
        end(records, record(f"served{number}"))
        for which in range(10):
            end(records, record(f"refused{number}{which}"), Outcome.REJECTED)
    newest_first = ["refused39", "refused38", "served3", "served2", "served1"]
    assert [one.id for one in records.latest(100)] == newest_first
    assert [one.outcome for one in records.latest(3)] == [Outcome.REJECTED] * 2 + [Outcome.COMPLETED]
    assert records._by_id.keys() == set(newest_first)


def test_who_is_under_way_is_not_forgotten_and_stands_where_he_came() -> None:
    records = DecisionRecords(kept=2, refused_kept=1)
    waits = record("waits")
    records.open(waits)
    for number in range(5):
        end(records, record(f"r{number}"))
    assert [one.id for one in records.latest(9)] == ["r4", "r3", "waits"]
    assert records.find("waits")[0] is waits
    records.ended(waits, Outcome.TIMEOUT, Actual(error="late"))
    assert [one.id for one in records.latest(9)] == ["r4", "waits"]


def test_a_list_that_is_being_read_is_as_of_its_beginning() -> None:
    records = DecisionRecords(kept=3)
    for number in range(3):
        end(records, record(f"r{number}"))
    listed = records.latest(3)
    seen = [next(listed).id]
    end(records, record("later"))
    assert [*seen, *(one.id for one in listed)] == ["r2", "r1", "r0"]


names = st.text(max_size=30).filter(lambda text: text.isprintable())
workers = st.sampled_from([WorkerId("a"), WorkerId("b"), WorkerId("worker-3")])
placements = st.builds(Placement, workers, workers)
seconds = st.floats(allow_nan=False)
counts = st.integers(0, 2**31)
predictions = st.builds(Prediction, **dict.fromkeys(Prediction.__struct_fields__, seconds))
candidates = st.builds(
    Candidate,
    placement=placements,
    predicted=predictions,
    handed_by=st.none() | st.sampled_from(Tier),
    cached_tokens=counts,
    loaded_tokens=counts,
    fetch_from=st.none() | workers,
    cost_s=seconds,
    feasible=st.booleans(),
    why_not=names,
)
attempts = st.builds(
    Attempt,
    waited_s=seconds,
    reason=names,
    candidates=st.lists(candidates, max_size=6).map(tuple),
    chosen=st.none() | placements,
)
moved = st.dictionaries(st.sampled_from(["host", "disk", "remote"]), counts)
actuals = st.builds(
    Actual,
    **dict.fromkeys(("ttft_s", "tpot_s", "gap_s", "e2e_s"), st.none() | seconds),
    output_tokens=counts,
    cached_tokens=st.none() | counts,
    loaded_tokens=st.dictionaries(st.sampled_from(["host", "disk", "peer"]), counts),
    load_s=seconds,
    loaded_bytes=st.dictionaries(st.sampled_from(["host", "disk", "peer"]), counts),
    spared_s=seconds,
    handoff=st.none() | st.builds(StoreHandoff, moved, moved, moved, seconds, counts),
    finish=st.none() | st.sampled_from(FinishReason),
    error=names,
)


@given(
    made=st.lists(attempts, max_size=3),
    actual=actuals,
    outcome=st.sampled_from([Outcome.COMPLETED, Outcome.REJECTED, Outcome.FAILED]),
    slo=st.builds(Slo, st.just(5.0), st.just(float("inf")), st.just(0.5)),
    note=names,
)
def test_what_is_read_of_an_ended_request_equals_what_was_recorded(
    made: list[Attempt], actual: Actual, outcome: Outcome, slo: Slo, note: str
) -> None:
    records = DecisionRecords()
    one = structs.replace(record("r~1", public_id="r"), slo=slo, session="me", priority=-3)
    records.open(one)
    for each in made:
        records.decided(one, each)
    one.note = note
    records.ended(one, outcome, actual)
    (found,), (listed,) = records.find("r"), records.latest(1)
    assert found == listed == one and found is not one
    assert json.encode(record_fields(found)) == json.encode(record_fields(one))


def test_what_cannot_be_packed_is_kept_as_it_is() -> None:
    class Odd(str):
        """A plug-in's own idea of an id."""

    records = DecisionRecords(kept=1)
    odd = cast(WorkerId, Odd("a"))
    for number in range(2):
        one = record(f"r{number}")
        one.note = Odd("because")
        records.open(one)
        records.decided(one, attempt(Placement(odd, odd)))
        records.ended(one, Outcome.COMPLETED, Actual())
    (found,) = records.latest(9)
    assert found is one and records.find("r0") == []


def test_an_ended_record_takes_few_bytes() -> None:
    """Six candidates took 4,136 as objects."""
    records = DecisionRecords()
    candidate = attempt(LOCAL).candidates[0]

    def bytes_of(count: int) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            one = record(f"{number:032x}")
            records.open(one)
            held = tuple(
                structs.replace(candidate, why_not=f"TTFT {number + place} s over 5 s", cost_s=number + place / 7)
                for place in range(6)
            )
            records.decided(one, structs.replace(attempt(LOCAL), candidates=held, reason=f"{number} s, the least"))
            records.ended(one, Outcome.COMPLETED, Actual(ttft_s=number / 3, e2e_s=number / 2))
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        assert bytes_of(1000) / 1000 < 2000
    finally:
        tracemalloc.stop()


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
