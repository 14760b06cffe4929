"""Members drained, resumed and given another role: every state, what goes on meanwhile, and who gets nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from membership_rig import Bench as Cluster
from test_router_service import Bench, RecordingClient, collect, item, offer, scenario, settle

from bascule.errors import Conflict, NotFound, Unavailable
from bascule.policies.retry import MOST_TRIES
from bascule.router.link_probes import LinkProbes
from bascule.router.operations import MemberOperations
from bascule.router.service import BACK_S
from bascule.types import Epoch, FinishReason, Request, RequestId, Role, SamplingParams, WorkerId
from bascule.wire import Draining, Goodbye, Leaving, Stop

LAST = FinishReason.LENGTH
SPLIT = {"p": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE}
TWO = {"a": Role.MIXED, "b": Role.MIXED}


class Client(RecordingClient):
    """Counts how often its worker was told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


class Rig(Bench):
    """A service and its operations, as membership would drive them."""

    def __init__(self, roles: dict[str, Role], **routing: Any) -> None:
        super().__init__(roles, **routing)
        links = LinkProbes(self.service.view, lambda epoch, message: None)
        self.operations = MemberOperations(self.service, routing.get("policy", "disaggregated"), self.clock, links)

    def join(self, name: str, role: Role, epoch: str = "", *, attached: bool = False) -> None:
        self.clients[name] = Client()
        member = self.service.view.add(offer(name, role, epoch), self.clock.now(), attached=attached)
        if hasattr(self, "operations"):
            self.operations.joined(member)
        self.service.joined(member, self.clients[name])

    def state(self, name: str) -> str:
        return self.service.view.members[WorkerId(name)].state

    def tick(self, seconds: float = 0.1) -> None:
        self.clock.advance(seconds)
        self.service.tick()
        self.operations.tick()

    def drain(self, name: str, timeout: float | None = None) -> None:
        self.operations.drain(WorkerId(name), timeout)

    def resume(self, name: str) -> None:
        self.operations.resume(WorkerId(name))

    def leaves(self, name: str) -> int:
        return self.operations.leaves(self.service.view.members[WorkerId(name)])

    def stops(self, name: str) -> int:
        client = self.clients[name]
        assert isinstance(client, Client)
        return client.stops

    def with_request(self, name: str = "r") -> str:
        """The worker that a request of that name was submitted to last."""
        return next(
            worker
            for worker, client in self.clients.items()
            if any(one.request == name and one.attempt == self.attempt(name) for one in client.submitted)
        )

    def attempt(self, name: str) -> int:
        return max(one.attempt for client in self.clients.values() for one in client.submitted if one.request == name)


@scenario
async def test_a_worker_without_requests_is_drained_at_once_and_ready_again_when_resumed() -> None:
    rig = Rig(TWO, policy="replicated")
    assert rig.operations.drain(WorkerId("a")).state == "drained"
    placed = [rig.start(f"r{index}") for index in range(4)]
    await settle()
    assert not rig.clients["a"].submitted and len(rig.clients["b"].submitted) == 4
    waiting = rig.start("r4")
    await settle()
    assert rig.service.state().queued == 1
    assert rig.operations.resume(WorkerId("a")).state == "ready"
    assert rig.clients["a"].submitted[0].request == "r4"
    for task in [*placed, waiting]:
        task.cancel()


@scenario
async def test_what_a_draining_worker_has_ends_there() -> None:
    rig = Rig(TWO, policy="replicated")
    starting = rig.start()
    await settle()
    worker = rig.with_request()
    rig.drain(worker)
    rig.tick()
    assert rig.state(worker) == "draining"
    rig.tokens(worker, item(0, 7))
    rig.tick()
    assert rig.state(worker) == "draining" and rig.service.state().workers[0].requests in (0, 1)
    rig.tokens(worker, item(1, 8, finish=LAST))
    rig.tick()
    assert rig.state(worker) == "drained"
    assert await collect(await starting) == [7, 8]


@scenario
async def test_a_request_that_is_to_be_handed_over_ends_on_the_draining_worker() -> None:
    rig = Rig(SPLIT)
    starting = rig.start()
    await settle()
    decode = rig.clients["p"].submitted[0].decode
    assert decode is not None
    rig.drain(decode.worker)
    rig.drain("p")
    rig.tick()
    assert rig.state("p") == rig.state(decode.worker) == "draining"
    rig.tokens("p", item(0, 7))
    rig.tick()
    assert rig.state("p") == "draining", "its KV is not handed over yet"
    rig.tokens(decode.worker, item(1, 8))
    rig.tick()
    assert rig.state("p") == "drained" and rig.state(decode.worker) == "draining"
    rig.tokens(decode.worker, item(2, 9, finish=LAST))
    rig.tick()
    assert rig.state(decode.worker) == "drained" and await collect(await starting) == [7, 8, 9]


@scenario
async def test_what_is_left_goes_elsewhere_when_the_time_is_over_however_often() -> None:
    rig = Rig(TWO, policy="replicated")
    starting = rig.start()
    await settle()
    for attempt in range(MOST_TRIES + 2):
        worker = rig.with_request()
        rig.tokens(worker, item(attempt, 50 + attempt, attempt=attempt))
        rig.drain(worker, 5.0)
        rig.tick(4.9)
        assert rig.state(worker) == "draining" and rig.attempt("r") == attempt
        rig.tick(0.2)
        assert rig.state(worker) == "drained" and ("r", attempt) in rig.clients[worker].cancelled
        other = rig.with_request()
        assert other != worker and rig.clients[other].submitted[-1].generated == tuple(range(50, 51 + attempt))
        rig.resume(worker)
    rig.tokens(rig.with_request(), item(MOST_TRIES + 2, 99, attempt=MOST_TRIES + 2, finish=LAST))
    assert await collect(await starting) == [*range(50, 52 + MOST_TRIES), 99]


@scenario
async def test_what_nobody_else_could_take_stays_until_somebody_can() -> None:
    rig = Rig({"a": Role.MIXED}, policy="replicated")
    starting = rig.start()
    await settle()
    rig.drain("a", 0.0)
    rig.tick()
    assert rig.state("a") == "draining" and not rig.clients["a"].cancelled
    rig.tokens("a", item(0, 7))
    rig.join("b", Role.MIXED)
    rig.tick()
    assert rig.state("a") == "drained" and rig.clients["b"].submitted[0].generated == (7,)
    rig.tokens("b", item(1, 8, attempt=1, finish=LAST))
    assert await collect(await starting) == [7, 8]


@scenario
async def test_a_sampled_output_of_an_attached_server_stays_when_the_time_is_over() -> None:
    rig = Rig({"a": Role.MIXED}, policy="replicated")
    rig.drain("a")
    rig.join("s", Role.MIXED, attached=True)
    sampled = Request(
        id=RequestId("r"), prompt=(1, 2), sampling=SamplingParams(max_tokens=8, temperature=1.0, seed=1), timeout=60.0
    )
    starting = asyncio.create_task(rig.service.start(sampled))
    await settle()
    rig.tokens("s", item(0, 7))
    rig.resume("a")
    rig.drain("s", 0.0)
    rig.tick()
    assert rig.state("s") == "draining" and not rig.clients["a"].submitted
    rig.tokens("s", item(1, 8, finish=LAST))
    rig.tick()
    assert rig.state("s") == "drained" and await collect(await starting) == [7, 8]


@scenario
async def test_with_all_workers_drained_requests_wait_within_their_bounds() -> None:
    rig = Rig(TWO, policy="replicated", queue_limit=1)
    rig.drain("a")
    rig.drain("b")
    assert not rig.service.ready and rig.service.draining
    waiting = rig.start("r0", timeout=5)
    await settle()
    with pytest.raises(Exception, match="line is full: 1 requests wait; try again in 1 s"):
        await rig.start("r1")
    rig.tick(5.1)
    with pytest.raises(Exception, match="5 s"):
        await waiting
    rig.lose("a")
    rig.lose("b")
    assert not rig.service.draining
    with pytest.raises(Unavailable):
        await rig.start("r2")


@scenario
async def test_a_drain_and_a_role_hold_for_a_worker_that_is_started_anew() -> None:
    rig = Rig(SPLIT)
    rig.drain("d")
    rig.operations.set_role(WorkerId("e"), Role.MIXED)
    for name in ("d", "e"):
        rig.lose(name)
        rig.join(name, Role.DECODE, f"{name}-2")
    assert (rig.state("d"), rig.state("e")) == ("drained", "ready")
    assert [status.role for status in rig.service.view.statuses()] == [Role.PREFILL, Role.DECODE, Role.MIXED]
    rig.resume("d")
    rig.lose("d")
    rig.join("d", Role.DECODE, "d-3")
    assert rig.state("d") == "ready"


@scenario
async def test_a_role_counts_from_the_next_placement_on_and_running_work_ends_as_it_is() -> None:
    rig = Rig(SPLIT)
    starting = rig.start("r")
    await settle()
    decode = rig.clients["p"].submitted[0].decode
    assert decode is not None
    other = "e" if decode.worker == "d" else "d"
    rig.operations.set_role(decode.worker, Role.PREFILL)
    later = [rig.start(f"later{index}") for index in range(4)]
    await settle()
    submissions = [one for client in rig.clients.values() for one in client.submitted if one.request != "r"]
    assert len(submissions) == 4 and rig.clients[decode.worker].submitted
    assert {one.decode.worker for one in submissions if one.decode is not None} == {other}
    rig.tokens("p", item(0, 7))
    rig.tokens(decode.worker, item(1, 8, finish=LAST))
    assert await collect(await starting) == [7, 8]
    for task in later:
        task.cancel()


@scenario
async def test_a_role_that_the_policy_cannot_do_without_is_kept() -> None:
    rig = Rig({"p": Role.PREFILL, "d": Role.DECODE})
    with pytest.raises(Conflict, match="policy disaggregated needs a decode worker"):
        rig.operations.set_role(WorkerId("d"), Role.PREFILL)
    assert rig.operations.set_role(WorkerId("d"), Role.DECODE).role is Role.DECODE
    rig.join("e", Role.DECODE)
    rig.drain("e")
    with pytest.raises(Conflict, match="resume one"):
        rig.operations.set_role(WorkerId("d"), Role.PREFILL)
    rig.resume("e")
    assert rig.operations.set_role(WorkerId("d"), Role.PREFILL).role is Role.PREFILL
    assert rig.operations.set_role(WorkerId("e"), Role.MIXED).role is Role.MIXED


@scenario
async def test_other_policies_take_any_role() -> None:
    rig = Rig(TWO, policy="adaptive")
    for name in ("a", "b"):
        rig.operations.set_role(WorkerId(name), Role.PREFILL)
    starting = rig.start()
    await settle()
    assert rig.clients["a"].submitted or rig.clients["b"].submitted
    starting.cancel()


@scenario
async def test_an_attached_server_can_be_drained_and_resumed_but_has_no_role() -> None:
    rig = Rig(TWO, policy="replicated")
    rig.join("s", Role.MIXED, attached=True)
    assert rig.operations.drain(WorkerId("s")).state == "drained"
    assert rig.operations.resume(WorkerId("s")).state == "ready"
    with pytest.raises(Conflict, match="attached server"):
        rig.operations.set_role(WorkerId("s"), Role.DECODE)


@scenario
async def test_an_unknown_worker_is_answered_with_those_that_there_are() -> None:
    rig = Rig(TWO)
    for call in (rig.drain, rig.resume, lambda name: rig.operations.set_role(name, Role.MIXED)):
        with pytest.raises(NotFound, match=r"no worker 'c' now; there are: a, b\."):
            call(WorkerId("c"))


@scenario
async def test_a_worker_that_leaves_is_told_to_stop_when_nothing_needs_it_any_more() -> None:
    rig = Rig(TWO, policy="replicated")
    starting = rig.start()
    await settle()
    busy = rig.with_request()
    idle = "b" if busy == "a" else "a"
    assert rig.leaves(idle) == 0 and rig.stops(idle) == 1
    assert rig.leaves(busy) == 1 and rig.stops(busy) == 0
    rig.tick()
    with pytest.raises(Conflict, match="about to end"):
        rig.resume(busy)
    rig.tokens(busy, item(0, 7, finish=LAST))
    rig.tick()
    assert rig.stops(busy) == 1
    assert rig.leaves(busy) == 0 and rig.stops(busy) == 2, "it has not heard the first time"
    assert await collect(await starting) == [7]


@scenario
async def test_a_leave_ends_with_the_process_and_requests_wait_for_the_next_for_a_while() -> None:
    rig = Rig({"a": Role.MIXED}, policy="single")
    rig.leaves("a")
    rig.lose("a")
    assert rig.service.draining
    waiting = rig.start()
    await settle()
    rig.join("a", Role.MIXED, "a-2")
    assert rig.state("a") == "ready" and rig.clients["a"].submitted
    waiting.cancel()
    await settle()
    rig.leaves("a")
    rig.lose("a")
    rig.clock.advance(BACK_S)
    with pytest.raises(Unavailable):
        await rig.start("late")


@scenario
async def test_a_peer_that_lends_is_needed_until_the_first_token() -> None:
    rig = Rig(TWO, policy="replicated")
    starting = rig.start()
    await settle()
    worker = rig.with_request()
    lender = WorkerId("b" if worker == "a" else "a")
    flight = next(iter(rig.service._flights.values()))
    flight.place(flight.placement, 1, 1.0, lender)
    rig.drain(lender)
    assert rig.state(lender) == "draining"
    rig.tokens(worker, item(0, 7))
    rig.tick()
    assert rig.state(lender) == "drained"
    starting.cancel()


def test_the_router_answers_a_leave_and_stops_strangers() -> None:
    cluster = Cluster("a")
    cluster.link.sent.clear()
    cluster.hear(Leaving(WorkerId("a"), Epoch("a-1")))
    cluster.hear(Leaving(WorkerId("a"), Epoch("a-0")))
    assert [(epoch, type(message)) for epoch, message in cluster.link.sent] == [
        ("a-1", Stop),
        ("a-1", Draining),
        ("a-0", Stop),
    ]
    cluster.hear(Goodbye(WorkerId("a"), Epoch("a-1")))
    assert not cluster.view.members
