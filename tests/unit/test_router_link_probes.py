"""Links measured at an operator's wish: who may be asked, one at a time, and what becomes of each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from membership_rig import CARD, Bench, offer

from bascule.errors import Conflict, NotFound, RequestError, WorkerFailure
from bascule.link_wire import LinkMeasured, MeasureLink
from bascule.router import link_probes
from bascule.router.backend import LinkEnds, LinkReport
from bascule.types import CostModel, Epoch, LinkCost, StepLoad, WorkerId, WorkerLoad
from bascule.wire import Goodbye, Heartbeat

BLOCK = CARD.layout.block_bytes
A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def ask(bench: Bench, source: str = "a", target: str = "b", transport: str = "tcp") -> Coroutine[Any, Any, LinkReport]:
    ends = LinkEnds(WorkerId(source), WorkerId(target), transport)
    return bench.membership.operations.measure_link(ends, 10 * BLOCK, 3)


def asked(bench: Bench) -> list[tuple[str, MeasureLink]]:
    return [(str(epoch), message) for epoch, message in bench.link.sent if isinstance(message, MeasureLink)]


def answered(wish: MeasureLink, **changes: Any) -> LinkMeasured:
    found = {"blocks": 10, "reserve_s": (0.002, 0.001, 0.009), "block_s": (0.001,) * 3, "push_s": (0.5, 0.1, 0.2)}
    return LinkMeasured(worker=A, epoch=Epoch("a-1"), probe=wish.probe, **(found | changes))


def measured(bench: Bench, *events: Any) -> LinkReport:
    """Ask, let happen what each of `events` does with the wish, and await the answer."""

    async def run() -> LinkReport:
        task = asyncio.create_task(ask(bench))
        await asyncio.sleep(0)
        for event in events:
            event(asked(bench)[-1][1])
        return await asyncio.wait_for(task, 5)

    return asyncio.run(run())


def test_the_first_worker_is_asked_and_its_answer_is_made_of_medians() -> None:
    bench = Bench("a", "b")
    report = measured(bench, lambda wish: bench.hear(answered(wish)))
    [(epoch, wish)] = asked(bench)
    assert epoch == "a-1" and wish.target.worker == "b" and (wish.blocks, wish.runs, wish.transport) == (10, 3, "tcp")
    assert (report.source, report.target, report.bytes) == ("a", "b", 10 * BLOCK)
    assert report.latency_s == pytest.approx(0.003)
    assert report.bytes_per_s == pytest.approx(9 * BLOCK / (0.2 - 0.001))
    assert report.kv_token_bytes * 16 == BLOCK and report.model == CARD.name and report.same_machine


def test_what_a_worker_refuses_is_told_with_its_reason() -> None:
    bench = Bench("a", "b")
    for busy, code in ((True, "busy"), (False, "not_measured")):
        refusal = {"blocks": 0, "reserve_s": (), "block_s": (), "push_s": (), "reason": "prompts wait", "busy": busy}
        with pytest.raises(Conflict, match=r"from a to b over tcp was not measured: prompts wait") as told:
            measured(bench, lambda wish, refusal=refusal: bench.hear(answered(wish, **refusal)))
        assert told.value.code == code


def test_one_link_is_measured_at_a_time_and_answers_to_others_do_not_count() -> None:
    bench = Bench("a", "b", "c")

    async def run() -> None:
        first = asyncio.create_task(ask(bench))
        await asyncio.sleep(0)
        with pytest.raises(Conflict) as told:
            await ask(bench, "c", "b")
        assert told.value.code == "busy"
        wish = asked(bench)[0][1]
        bench.hear(answered(msgspec.structs.replace(wish, probe="another")))
        await asyncio.sleep(0)
        assert not first.done()
        bench.hear(answered(wish))
        bench.hear(answered(wish))
        assert (await first).target == "b"
        bench.hear(answered(wish))

    asyncio.run(run())
    assert measured(bench, lambda wish: bench.hear(answered(wish))).source == "a"


def test_links_that_are_none_or_cannot_be_measured_now_are_refused_at_once() -> None:
    bench = Bench("a", "b")
    bench.hear(msgspec.structs.replace(offer("c"), machine="there"))
    busy = WorkerLoad(step=StepLoad(0, 2, 100, 0, 0))
    cases: list[tuple[tuple[str, str, str], type[RequestError], str]] = [
        (("a", "x", "tcp"), NotFound, "unknown_worker"),
        (("x", "a", "tcp"), NotFound, "unknown_worker"),
        (("a", "a", "tcp"), Conflict, "one_worker"),
        (("a", "c", "shm"), Conflict, "apart"),
        (("a", "b", "tcp"), Conflict, "busy"),
    ]
    bench.hear(Heartbeat(B, Epoch("b-1"), busy))
    for ends, kind, code in cases:
        with pytest.raises(kind) as told:
            asyncio.run(ask(bench, *ends))
        assert told.value.code == code
    assert asked(bench) == []


@pytest.mark.parametrize(
    ("worker", "load", "code"),
    [
        (A, WorkerLoad(unreachable={B: "tcp://10.0.0.9:1 (no answer within 2 s)"}), "not_measured"),
        (B, WorkerLoad(promised=1), "busy"),
        (B, WorkerLoad(kv_blocks_leased=10_000), "busy"),
    ],
    ids=["out of reach", "handoffs wait", "full"],
)
def test_a_worker_out_of_reach_or_without_room_is_not_asked(worker: WorkerId, load: WorkerLoad, code: str) -> None:
    bench = Bench("a", "b")
    bench.hear(Heartbeat(worker, Epoch(f"{worker}-1"), load))
    with pytest.raises(Conflict) as told:
        asyncio.run(ask(bench))
    assert told.value.code == code and asked(bench) == []


def test_the_way_there_and_back_is_not_in_the_rate() -> None:
    bench = Bench("a", "b")
    far = {"blocks": 101, "block_s": (0.031,), "push_s": (0.131,), "reserve_s": (0.03,)}
    assert measured(bench, lambda wish: bench.hear(answered(wish, **far))).bytes_per_s == pytest.approx(
        100 * BLOCK / 0.1
    )
    one = {"blocks": 1, "block_s": (0.05,), "push_s": (0.04,), "reserve_s": (0.03,)}
    assert measured(bench, lambda wish: bench.hear(answered(wish, **one))).bytes_per_s == pytest.approx(BLOCK / 0.04)


def test_a_worker_that_leaves_or_says_nothing_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for gone in (A, B):
        bench = Bench("a", "b")
        with pytest.raises(WorkerFailure, match=f"Worker {gone} was lost"):
            measured(bench, lambda wish, gone=gone, bench=bench: bench.hear(Goodbye(gone, Epoch(f"{gone}-1"))))
    monkeypatch.setattr(link_probes, "ANSWER_S", 0.05)
    bench = Bench("a", "b")
    with pytest.raises(WorkerFailure, match="did not say within"):
        measured(bench)
    assert measured(bench, lambda wish: bench.hear(answered(wish))).source == "a"


def test_expected_links_count_until_workers_tell_and_again_once_they_have_forgotten() -> None:
    bench = Bench("a", "b")
    expected, told = LinkCost(0.001, 1e9), LinkCost(0.005, 2e8)
    bench.view.links.expect({(A, B): expected})

    def beat(**links: LinkCost) -> None:
        load = WorkerLoad(links={WorkerId(peer): cost for peer, cost in links.items()}, cost=CostModel())
        bench.hear(Heartbeat(A, Epoch("a-1"), load))

    assert bench.view.snapshot(0.0).links == {(A, B): expected}
    beat(b=told)
    assert bench.view.links[A, B] == told
    bench.view.links.expect({(A, B): expected})
    assert bench.view.links[A, B] == told
    beat()
    assert bench.view.links == {(A, B): expected}
    beat(b=told, c=told)
    assert bench.view.links[A, C] == told
    bench.hear(Goodbye(A, Epoch("a-1")))
    assert bench.view.links == {(A, B): expected}
