"""Failures at the router: how often a request is tried, what all of them may be tried together, and who rests."""

from __future__ import annotations

import asyncio

import pytest
from test_router_service import Bench, collect, item, scenario, settle

from bascule.errors import WorkerFailure
from bascule.policies.retry import MOST_FAILURES, MOST_TRIES, Budget, rest_s
from bascule.router.flight import Flight
from bascule.router.pulse import HEARTBEAT_S
from bascule.router.retries import UNNAMED_BEATS
from bascule.types import Epoch, FinishReason, RequestId, Role, WorkerId, WorkerLoad
from bascule.wire import Failed

LAST = FinishReason.LENGTH
TWO = {"a": Role.MIXED, "b": Role.MIXED}


class Rig(Bench):
    """Workers `a` and `b` take whole requests, unless told otherwise."""

    def __init__(self, roles: dict[str, Role] = TWO, policy: str = "replicated") -> None:
        super().__init__(roles, policy=policy)

    def where(self, name: str = "r") -> tuple[str, int]:
        """The worker that a request was submitted to last, and the attempt."""
        sent = [
            (one.attempt, worker)
            for worker, client in self.clients.items()
            for one in client.submitted
            if one.request == name
        ]
        attempt, worker = max(sent, default=(-1, ""))
        return worker, attempt

    def fail(self, name: str = "r", failing: str | None = None) -> str:
        """Its worker gives a request up; returns the worker."""
        worker, attempt = self.where(name)
        failing = None if failing is None else WorkerId(failing)
        self.service.failed(
            Failed(
                worker=WorkerId(worker),
                epoch=Epoch(f"{worker}-1"),
                request=RequestId(name),
                attempt=attempt,
                message="broken",
                retryable=True,
                failing=failing,
            )
        )
        return worker

    def beat(self, worker: str, *runs: tuple[str, int], after_s: float = HEARTBEAT_S) -> None:
        """A heartbeat comes, so long after what was before."""
        self.clock.advance(after_s)
        named = tuple((RequestId(name), attempt) for name, attempt in runs)
        member = self.service.view.members[WorkerId(worker)]
        self.service.view.heartbeat(member, WorkerLoad(), self.clock.now(), named)
        self.service.tick()

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.service.view.overdue(self.clock.now(), 1e9, 2e9)
        self.service.tick()

    def resting(self, worker: str) -> bool:
        return self.service.view.members[WorkerId(worker)].resting

    async def begin(self, name: str = "r") -> asyncio.Task[Flight]:
        starting = self.start(name, timeout=1e6)
        await settle()
        return starting


async def drop(*tasks: asyncio.Task[Flight]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@scenario
async def test_lost_workers_cost_a_request_fewer_of_its_tries_than_failing_ones() -> None:
    rig = Rig()
    starting = await rig.begin()
    for attempt in range(MOST_TRIES):
        assert rig.where()[1] == attempt and not starting.done()
        worker, _ = rig.where()
        rig.lose(worker)
        if attempt + 1 < MOST_TRIES:
            rig.join(worker, Role.MIXED, f"{worker}-{attempt + 2}")
        await settle()
    with pytest.raises(WorkerFailure, match=f"died; tried {MOST_TRIES} times"):
        await starting
    assert MOST_TRIES > MOST_FAILURES and rig.service.state().retries == {"lost": MOST_TRIES - 1}


@scenario
async def test_a_worker_that_fails_one_request_after_another_gets_none_for_a_while() -> None:
    rig = Rig()
    failed = []
    for number in range(8):
        failed.append(await rig.begin(f"r{number}"))
        if rig.where(f"r{number}")[0] == "a":
            rig.fail(f"r{number}")
    assert rig.resting("a") and not rig.resting("b")
    assert rig.service.state().rests == {"a": 1} and rig.service.state().workers[0].state == "suspect"
    await drop(*failed)
    others = [await rig.begin(f"other{number}") for number in range(4)]
    assert {rig.where(f"other{number}")[0] for number in range(4)} == {"b"}
    await drop(*others)


@scenario
async def test_after_its_rest_it_gets_one_request_to_be_tried_by_and_rests_twice_as_long_if_that_fails() -> None:
    rig = Rig({"a": Role.MIXED})
    first = await rig.begin("first")
    for _ in range(MOST_FAILURES):
        rig.fail("first")
    with pytest.raises(WorkerFailure, match=f"broken; tried {MOST_FAILURES} times"):
        await first
    waiting = [await rig.begin(f"r{number}") for number in range(2)]
    assert rig.where("r0") == ("", -1), "it rests"
    rig.pass_time(1.01)
    assert rig.where("r0") == ("a", 0) and rig.where("r1") == ("", -1)
    rig.fail("r0")
    rig.pass_time(1.01)
    assert rig.where("r0") == ("a", 0), "the rest has doubled"
    rig.pass_time(1.0)
    assert rig.where("r0") == ("a", 1) and rig.where("r1") == ("", -1)
    rig.tokens("a", item(0, 7, attempt=1, name="r0"))
    rig.service.tick()
    assert rig.where("r1") == ("a", 0) and not rig.resting("a"), "one that goes well ends it"
    await drop(*waiting)


@scenario
async def test_one_step_that_fails_all_its_requests_makes_a_worker_rest_once() -> None:
    rig = Rig()
    tasks = [await rig.begin(f"r{number}") for number in range(8)]
    on_a = [f"r{number}" for number in range(8) if rig.where(f"r{number}")[0] == "a"]
    assert len(on_a) == 4
    for name in on_a:
        rig.fail(name)
    assert rig.service.state().rests == {"a": 1}
    rig.pass_time(1.01)
    assert not rig.resting("a")
    await drop(*tasks)


@scenario
async def test_who_is_to_blame_is_not_always_who_tells() -> None:
    rig = Rig({"p": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE}, policy="disaggregated")
    starting = await rig.begin()
    decode = rig.clients["p"].submitted[0].decode
    assert decode is not None
    rig.fail(failing=decode.worker)
    again = rig.clients["p"].submitted[1].decode
    assert again is not None and again.worker != decode.worker
    strikes = {member.id: member.strikes for member in rig.service.view.members.values()}
    assert strikes == {"p": 0, "d": 0, "e": 0} | {decode.worker: 1}
    await drop(starting)


@scenario
async def test_where_everything_fails_no_more_is_tried_again_than_the_budget_has() -> None:
    rig = Rig()
    refused = tried = 0
    for number in range(150):
        starting = await rig.begin(f"r{number}")
        while not starting.done():
            rig.pass_time(30.0)
            rig.fail(f"r{number}")
            await settle()
        tried += rig.where(f"r{number}")[1] + 1
        with pytest.raises(WorkerFailure) as failure:
            await starting
        refused += "too many requests fail" in failure.value.message
    assert refused > 50 and tried == 150 + 100
    assert rig.service.state().retries == {"failed": 100, "refused": refused}


def test_what_succeeds_earns_tries_for_what_fails() -> None:
    budget = Budget()
    while budget.spend():
        pass
    for _ in range(4):
        budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend() and not budget.spend()


def test_rests_grow_to_a_bound() -> None:
    assert [rest_s(strikes) for strikes in range(7)] == [0, 0, 0, 1, 2, 4, 8]
    assert rest_s(10_000) == rest_s(9) == 30


@scenario
async def test_an_end_that_was_lost_on_the_way_is_noticed_by_what_the_worker_still_has() -> None:
    rig = Rig()
    starting = await rig.begin()
    worker, _ = rig.where()
    rig.tokens(worker, item(0, 7))
    flight = await starting
    for _ in range(3 * UNNAMED_BEATS):
        rig.beat(worker, ("r", 0))
    assert rig.where() == (worker, 0)
    for _ in range(UNNAMED_BEATS):
        rig.beat(worker)
        assert rig.where() == (worker, 0)
    rig.beat(worker)
    other, attempt = rig.where()
    assert attempt == 1 and rig.clients[other].submitted[-1].generated == (7,)
    rig.tokens(other, item(1, 8, attempt=1, finish=LAST))
    assert await collect(flight) == [7, 8] and rig.service.state().retries == {"unheard": 1}


@scenario
async def test_heartbeats_from_while_the_router_stood_still_do_not_show_that_a_later_submission_was_lost() -> None:
    rig = Rig()
    starting = await rig.begin()
    lost, _ = rig.where()
    rig.lose(lost)
    worker, attempt = rig.where()
    assert worker != lost and attempt == 1
    for _ in range(5 * UNNAMED_BEATS):
        rig.beat(worker, after_s=0.01)
    for _ in range(UNNAMED_BEATS - 2):
        rig.beat(worker)
    assert rig.where() == (worker, 1)
    rig.beat(worker, ("r", 1))
    assert rig.where() == (worker, 1) and rig.service.state().retries == {"lost": 1}
    await drop(starting)


@scenario
async def test_a_handoff_is_not_lost_while_either_side_has_it_or_one_is_silent() -> None:
    rig = Rig({"p": Role.PREFILL, "d": Role.DECODE}, policy="disaggregated")
    starting = await rig.begin()
    for _ in range(2 * UNNAMED_BEATS):
        rig.beat("d")
        rig.beat("p", ("r", 0))
    for _ in range(UNNAMED_BEATS - 1):
        rig.beat("p")
        rig.beat("d")
    rig.beat("d", ("r", 0))
    for _ in range(2 * UNNAMED_BEATS):
        rig.beat("p")
    assert rig.where() == ("p", 0), "the decode worker may have it, for all it has said"
    for _ in range(UNNAMED_BEATS + 1):
        rig.beat("p")
        rig.beat("d")
    assert rig.where() == ("p", 1)
    await drop(starting)


async def waits_in_vain(rig: Rig, name: str, seconds: float, *, vanishes: bool = False) -> None:
    """A request that is placed, and given up after so long."""
    starting = rig.start(name, timeout=1e6 if vanishes else seconds)
    await settle()
    assert rig.where(name) == ("a", 0)
    rig.clock.advance(seconds)
    if vanishes:
        starting.cancel()
    rig.service.tick()
    await asyncio.gather(starting, return_exceptions=True)


@scenario
async def test_a_worker_that_lets_one_request_after_another_wait_in_vain_gets_none_for_a_while() -> None:
    rig = Rig({"a": Role.MIXED})
    await waits_in_vain(rig, "r0", 20.0)
    await waits_in_vain(rig, "r1", 20.0, vanishes=True)
    assert not rig.resting("a")
    await waits_in_vain(rig, "r2", 20.0)
    assert rig.resting("a") and rig.service.state().rests == {"a": 1}


@scenario
async def test_clients_without_patience_say_nothing_of_a_worker() -> None:
    rig = Rig({"a": Role.MIXED})
    for number in range(5):
        await waits_in_vain(rig, f"r{number}", 2.0)
        await waits_in_vain(rig, f"s{number}", 2.0, vanishes=True)
    assert rig.service.view.members[WorkerId("a")].strikes == 0


@scenario
async def test_a_worker_that_brings_tokens_of_other_requests_does_not_hang() -> None:
    rig = Rig({"a": Role.MIXED})
    other = await rig.begin("other")
    for number in range(5):
        starting = rig.start(f"r{number}", timeout=20.0)
        await settle()
        rig.clock.advance(15.0)
        rig.tokens("a", item(number, 7, name="other"))
        rig.clock.advance(5.0)
        rig.service.tick()
        await asyncio.gather(starting, return_exceptions=True)
    assert rig.service.view.members[WorkerId("a")].strikes == 0
    await drop(other)


@scenario
async def test_a_stream_that_stops_is_put_down_to_who_decodes_and_a_handoff_under_way_to_nobody() -> None:
    rig = Rig({"p": Role.PREFILL, "d": Role.DECODE}, policy="disaggregated")

    async def stops(name: str, *, handed_over: bool) -> dict[WorkerId, int]:
        starting = rig.start(name, timeout=20.0)
        await settle()
        rig.tokens("p", item(0, 7, name=name))
        if handed_over:
            rig.tokens("d", item(1, 8, name=name))
        flight = await starting
        rig.clock.advance(20.0)
        rig.service.tick()
        assert flight.ended
        return {member.id: member.strikes for member in rig.service.view.members.values()}

    assert await stops("r0", handed_over=False) == {"p": 0, "d": 0}
    assert await stops("r1", handed_over=True) == {"p": 0, "d": 1}
