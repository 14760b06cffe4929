"""The router's door: who is turned away is told so when he comes, and who has been let in is served."""

from __future__ import annotations

import pytest
from test_router_service import Bench, item, scenario, settle

from bascule.errors import Overloaded
from bascule.types import CostModel, FinishReason, Role, Slo, WorkerId, WorkerLoad


def slow_bench(**routing: object) -> Bench:
    """One worker with 4 slots, where a prompt of 10 tokens takes 0.1 s."""
    bench = Bench({"a": Role.MIXED}, policy="single", **routing)
    view, clock = bench.service.view, bench.clock
    view.heartbeat(view.members[WorkerId("a")], WorkerLoad(cost=CostModel(token_s=0.01)), clock.now())
    return bench


async def end_one(bench: Bench, name: str, after_s: float) -> None:
    bench.clock.advance(after_s)
    bench.tokens("a", item(0, 1, name=name, finish=FinishReason.STOP))
    await settle()


async def busy(bench: Bench, seconds_each: float) -> None:
    """Twelve requests one after the other, each begun when another has ended, while others wait."""
    for number in range(16):
        bench.start(f"r{number}", timeout=10_000.0)
    await settle()
    for number in range(12):
        await end_one(bench, f"r{number}", seconds_each)


@scenario
async def test_who_has_been_let_in_is_placed_even_if_it_is_late_by_then() -> None:
    bench = slow_bench(admission="slo")
    bench.service._queries.slo = Slo(ttft_s=2.0)
    started = [bench.start(f"r{number}") for number in range(5)]
    await settle()
    assert bench.service.state().queued == 1
    await end_one(bench, "r0", after_s=30.0)
    assert bench.clients["a"].submitted[-1].request == "r4"
    for task in started:
        task.cancel()


@scenario
async def test_who_would_wait_beyond_its_limit_is_turned_away_at_once_and_told_when_to_come_again() -> None:
    bench = slow_bench()
    await busy(bench, seconds_each=5.0)
    waiting = [bench.start(f"w{number}", timeout=10_000.0) for number in range(6)]
    await settle()
    patient = bench.start("patient", timeout=100.0)
    with pytest.raises(Overloaded, match="X-Request-Timeout") as refused:
        await bench.start("hurried", timeout=20.0)
    assert refused.value.retry_after > 1.0
    await settle()
    assert not patient.done() and bench.service.state().queued == 7
    for task in (*waiting, patient):
        task.cancel()


@scenario
async def test_the_slo_is_judged_by_the_pace_at_which_those_ahead_were_placed() -> None:
    bench = slow_bench(admission="slo")
    bench.service._queries.slo = Slo(ttft_s=1e9)
    await busy(bench, seconds_each=1.0)
    tasks = [bench.start(f"w{number}") for number in range(4)]
    await settle()
    bench.service._queries.slo = Slo(ttft_s=3.0)
    with pytest.raises(Overloaded, match="TTFT"):
        await bench.start("late")
    bench.service._queries.slo = Slo(ttft_s=30.0)
    tasks.append(bench.start("in time"))
    await settle()
    assert not tasks[-1].done()
    for task in tasks:
        task.cancel()
