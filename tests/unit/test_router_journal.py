"""What the router records of a request: each decision with its prediction, and what came of it."""

from __future__ import annotations

import asyncio

import pytest
from test_router_service import Bench, item, scenario

from bascule.errors import DeadlineExceeded, Overloaded
from bascule.observe.decisions import Outcome, Record
from bascule.router.policy import PlugIn
from bascule.types import Brought, CostModel, Epoch, FinishReason, Placement, RequestId, Role, Slo, WorkerId
from bascule.wire import Loaded, encode, from_worker

BROUGHT = Brought({"disk": 6, "peer": 2}, 0.1, {"disk": 960, "peer": 256}, 0.5)
COST = CostModel(step_s=0.01, token_s=0.001)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def only(bench: Bench, name: str = "r") -> Record:
    (record,) = bench.service.journal.records.find(name)
    return record


@scenario
async def test_a_completed_request_has_its_prediction_beside_what_happened() -> None:
    bench = Bench(policy="adaptive")
    starting = bench.start()
    await settle()
    assert only(bench).outcome is Outcome.RUNNING
    worker = only(bench).attempts[0].winner.placement.decode  # type: ignore[union-attr]
    for position, wait in enumerate([0.5, 0.1, 0.3, 0.2]):
        bench.clock.advance(wait)
        bench.tokens(worker, item(position, 7, finish=FinishReason.LENGTH if position == 3 else None))
    await starting
    record = only(bench)
    actual = record.actual
    assert record.outcome is Outcome.COMPLETED and actual.finish is FinishReason.LENGTH
    assert (actual.output_tokens, actual.cached_tokens, actual.error) == (4, 0, "")
    got = (actual.ttft_s, actual.tpot_s, actual.gap_s, actual.e2e_s)
    assert got == pytest.approx((0.5, 0.2, 0.3, 1.1))
    (attempt,) = record.attempts
    assert attempt.reason and len(attempt.candidates) > 1 and attempt.candidates[0].placement == attempt.chosen
    assert bench.service.state().routing.errors.keys() == {"ttft", "tpot"}


@scenario
async def test_what_kv_was_brought_for_a_request_is_told_to_its_client_and_recorded() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    for told in (Brought({"disk": 4}, 0.1, {"disk": 640}, 0.3), BROUGHT):
        bench.service.loaded(loaded(told))
    bench.tokens("p", item(0, 7))
    bench.service.loaded(loaded(Brought({"disk": 9})))  # of what computes it again, say
    flight = await starting
    bench.tokens("d", item(1, 8, finish=FinishReason.LENGTH))
    assert [delta.brought async for delta in flight] == [BROUGHT]
    actual = only(bench).actual
    assert (actual.loaded_tokens, actual.load_s) == (BROUGHT.tokens, 0.1)
    assert (actual.loaded_bytes, actual.spared_s) == (BROUGHT.bytes, 0.5)


def loaded(brought: Brought) -> Loaded:
    message = Loaded(worker=WorkerId("p"), epoch=Epoch("p-1"), request=RequestId("r"), attempt=0, brought=brought)
    read = from_worker(encode(message))
    assert isinstance(read, Loaded)
    return read


@scenario
async def test_a_baseline_that_compares_nothing_still_has_its_choice_predicted() -> None:
    bench = Bench(policy="disaggregated")
    bench.service.view.columns.cost.put(0, COST)
    starting = bench.start(tokens=40)
    await settle()
    (attempt,) = only(bench).attempts
    assert [one.placement for one in attempt.candidates] == [Placement(WorkerId("p"), WorkerId("d"))]
    assert attempt.winner is not None and attempt.winner.predicted.ttft_s == pytest.approx(0.05)
    assert bench.service.state().routing.decisions == {"remote": 1}
    starting.cancel()


@scenario
async def test_each_attempt_is_recorded_and_the_gap_between_them_counts() -> None:
    bench = Bench({"a": Role.MIXED, "b": Role.MIXED}, policy="replicated")
    starting = bench.start()
    await settle()
    first = only(bench).attempts[0].chosen
    assert first is not None
    bench.tokens(first.decode, item(0, 7))
    flight = await starting
    bench.clock.advance(4.0)
    bench.lose(first.decode)
    other = "b" if first.decode == "a" else "a"
    bench.tokens(other, item(1, 8, attempt=1, finish=FinishReason.STOP))
    assert [delta.tokens async for delta in flight]
    record = only(bench)
    assert [each.chosen.decode for each in record.attempts if each.chosen] == [first.decode, other]
    assert record.attempts[1].waited_s == 4.0
    assert record.actual.gap_s == 4.0
    assert record.outcome is Outcome.COMPLETED and record.note == ""


@scenario
async def test_a_request_that_waits_says_for_what() -> None:
    bench = Bench({"a": Role.MIXED}, policy="single")
    tasks = [bench.start(f"r{number}") for number in range(5)]
    await settle()
    waiting = only(bench, "r4")
    assert waiting.outcome is Outcome.WAITING and "limit" in waiting.note
    bench.tokens("a", item(0, 7, name="r0", finish=FinishReason.STOP))
    assert waiting.outcome is Outcome.RUNNING and waiting.note == ""
    for task in tasks:
        task.cancel()


@scenario
async def test_rejections_are_recorded_with_their_reason() -> None:
    bench = Bench({"a": Role.MIXED}, policy="single", queue_limit=0)
    tasks = [bench.start(f"r{number}") for number in range(4)]
    await settle()
    with pytest.raises(Overloaded):
        await bench.start("full")
    assert only(bench, "full").outcome is Outcome.REJECTED
    assert "line is full" in only(bench, "full").note
    for task in tasks:
        task.cancel()
    assert bench.service.state().routing.rejected == {"queue": 1}


@scenario
async def test_a_request_turned_away_for_its_slo_keeps_what_was_predicted() -> None:
    bench = Bench({"a": Role.MIXED}, policy="single", admission="slo")
    bench.service._queries.slo = Slo(ttft_s=0.02)
    bench.service.view.columns.cost.put(0, COST)
    with pytest.raises(Overloaded):
        await bench.start(tokens=40)
    record = only(bench)
    assert record.outcome is Outcome.REJECTED and "TTFT 0.05 s over 0.02 s" in record.note
    (attempt,) = record.attempts
    assert attempt.chosen is None and attempt.candidates[0].predicted.ttft_s == pytest.approx(0.05)
    routing = bench.service.state().routing
    assert (routing.rejected, routing.decisions) == ({"slo": 1}, {})


@scenario
async def test_a_deadline_and_a_client_that_leaves_are_told_apart() -> None:
    bench = Bench()
    late = bench.start("late", timeout=5)
    gone = bench.start("gone")
    await settle()
    gone.cancel()
    await settle()
    bench.clock.advance(6.0)
    bench.service.tick()
    with pytest.raises(DeadlineExceeded):
        await late
    assert only(bench, "late").outcome is Outcome.TIMEOUT and "5 s" in only(bench, "late").actual.error
    assert only(bench, "gone").outcome is Outcome.CANCELLED
    assert only(bench, "late").actual.ttft_s is None


@scenario
async def test_an_output_that_its_reader_found_complete_is_completed() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    bench.tokens("p", item(0, 7))
    flight = await starting
    flight.cancel(FinishReason.STOP)
    record = only(bench)
    assert record.outcome is Outcome.COMPLETED and record.actual.finish is FinishReason.STOP
    assert bench.service._queries._lengths[-1] == 1


@scenario
async def test_failures_of_a_plug_in_are_counted() -> None:
    bench = Bench({"a": Role.MIXED})
    bench.service._policy = PlugIn("mine:policy", lambda snapshot, query: None)  # type: ignore[arg-type,return-value]
    starting = bench.start()
    await settle()
    assert bench.service.state().routing.policy_failures == 1
    starting.cancel()


def test_a_record_holds_no_prompt() -> None:
    assert not {"request", "prompt", "tokens"} & set(Record.__slots__)
