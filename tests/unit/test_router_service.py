"""The life of a request at the router, with workers that do as the test says and a clock that it moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bascule.clock import VirtualClock
from bascule.config import RoutingConfig
from bascule.errors import DeadlineExceeded, Overloaded, RegistrationRefused, Unavailable, WorkerFailure
from bascule.policies.retry import MOST_FAILURES
from bascule.router.flight import Flight
from bascule.router.retries import GAP_S
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.types import (
    CostModel,
    Epoch,
    FinishReason,
    KVLayout,
    ModelCard,
    Request,
    RequestId,
    Role,
    SamplingParams,
    WorkerId,
)
from bascule.wire import VERSION, Failed, PeerAddress, Register, StepTokens, Submit, TokenItem

LAYOUT = KVLayout("float32", 1, 1, 4, 16, 2, 16)
CARD = ModelCard(name="tiny", fingerprint="f1", context=1000, vocab=100, layout=LAYOUT)


class RecordingClient:
    def __init__(self) -> None:
        self.submitted: list[Submit] = []
        self.cancelled: list[tuple[str, int]] = []

    def submit(self, submission: Submit) -> None:
        self.submitted.append(submission)

    def cancel(self, request: RequestId, attempt: int) -> None:
        self.cancelled.append((request, attempt))

    def stop(self) -> None:
        raise AssertionError("nobody asked")


def offer(name: str, role: Role, epoch: str = "", **changes: Any) -> Register:
    epoch = epoch or f"{name}-1"
    values: dict[str, Any] = {
        "version": VERSION,
        "worker": WorkerId(name),
        "epoch": Epoch(epoch),
        "role": role,
        "card": CARD,
        "device": "cpu:0",
        "pid": 1,
        "peer": PeerAddress(WorkerId(name), Epoch(epoch), "tcp://127.0.0.1:1"),
        "max_sequences": 4,
        "kv_blocks": 100,
        "machine": "here",
        "cost": CostModel(),
    }
    return Register(**(values | changes))


class Bench:
    """A service with a prefill and a decode worker."""

    def __init__(self, roles: dict[str, Role] | None = None, **routing: Any) -> None:
        self.clock = VirtualClock()
        self.service = Service(ClusterView(1000), RoutingConfig(**routing), self.clock)
        self.clients: dict[str, RecordingClient] = {}
        for name, role in (roles or {"p": Role.PREFILL, "d": Role.DECODE}).items():
            self.join(name, role)

    def join(self, name: str, role: Role, epoch: str = "") -> None:
        message = offer(name, role, epoch)
        self.service.view.check(message)
        self.clients[name] = RecordingClient()
        self.service.joined(self.service.view.add(message, self.clock.now()), self.clients[name])

    def lose(self, name: str) -> None:
        member = self.service.view.members[WorkerId(name)]
        self.service.view.remove(member.id)
        self.service.lost(member, "died")

    def tokens(self, worker: str, *items: TokenItem) -> None:
        self.service.tokens(StepTokens(WorkerId(worker), Epoch(f"{worker}-1"), items))

    def start(
        self, name: str = "r", tokens: int = 10, timeout: float = 60.0, salt: bytes = b"", priority: int = 0
    ) -> asyncio.Task[Flight]:
        request = Request(
            id=RequestId(name),
            prompt=tuple(range(tokens)),
            sampling=SamplingParams(max_tokens=8),
            timeout=timeout,
            salt=salt,
            priority=priority,
        )
        return asyncio.create_task(self.service.start(request))


def item(position: int, token: int, attempt: int = 0, name: str = "r", finish: FinishReason | None = None) -> TokenItem:
    return TokenItem(RequestId(name), attempt, position, token, 0, finish)


def scenario(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 10))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def collect(flight: Flight) -> list[int]:
    return [token for delta in [delta async for delta in flight] for token in delta.tokens]


@scenario
async def test_a_split_request_streams_its_first_token_from_the_prefill_worker() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    submission = bench.clients["p"].submitted[0]
    assert submission.decode is not None and submission.decode.worker == "d"
    bench.tokens("p", item(0, 7))
    flight = await starting
    bench.tokens("d", item(1, 8), item(2, 9, finish=FinishReason.LENGTH))
    assert await collect(flight) == [7, 8, 9]
    assert bench.service.active == 0


@scenario
async def test_tokens_out_of_order_are_held_and_repeats_dropped() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    bench.tokens("d", item(2, 9), item(1, 8))
    bench.tokens("p", item(0, 7), item(0, 5))
    bench.tokens("d", item(1, 4), item(3, 10, finish=FinishReason.STOP))
    assert await collect(await starting) == [7, 8, 9, 10]


@scenario
async def test_tokens_of_an_earlier_attempt_or_a_stranger_are_never_taken() -> None:
    bench = Bench({"p": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE})
    starting = bench.start(salt=b"s" * 32)
    await settle()
    decode = bench.clients["p"].submitted[0].decode
    assert decode is not None
    bench.tokens("p", item(0, 7))
    flight = await starting
    other = "e" if decode.worker == "d" else "d"
    bench.tokens(other, item(1, 66))
    bench.lose(decode.worker)
    again = bench.clients["p"].submitted[1]
    assert (again.attempt, again.generated, again.salt) == (1, (7,), b"s" * 32)
    bench.tokens("p", item(1, 55, attempt=0))
    bench.tokens("p", item(1, 8, attempt=1))
    bench.tokens(other, item(2, 9, attempt=1, finish=FinishReason.LENGTH))
    assert await collect(flight) == [7, 8, 9]


@scenario
async def test_a_request_fails_only_after_several_workers_did() -> None:
    bench = Bench({"a": Role.MIXED, "b": Role.MIXED}, policy="replicated")
    starting = bench.start()
    for attempt in range(MOST_FAILURES):
        await settle()
        worker = next(
            name for name, client in bench.clients.items() if any(s.attempt == attempt for s in client.submitted)
        )
        bench.service.failed(
            Failed(
                worker=WorkerId(worker),
                epoch=Epoch(f"{worker}-1"),
                request=RequestId("r"),
                attempt=attempt,
                message="broken",
                retryable=True,
            )
        )
    with pytest.raises(WorkerFailure, match="broken"):
        await starting
    assert all(client.submitted for client in bench.clients.values()), "the second worker was never tried"
    assert bench.service.active == 0


@scenario
async def test_cached_tokens_are_those_of_the_first_prefill() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    bench.tokens("p", TokenItem(RequestId("r"), 0, 0, 7, 4))
    flight = await starting
    bench.tokens("d", TokenItem(RequestId("r"), 0, 1, 8, 0, FinishReason.LENGTH))
    assert [delta.cached_tokens async for delta in flight] == [4]


@scenario
async def test_a_prefill_worker_that_has_handed_over_can_fail_or_die_without_effect() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    bench.tokens("p", item(0, 7))
    flight = await starting
    bench.tokens("d", item(1, 8))
    bench.service.failed(
        Failed(worker=WorkerId("p"), epoch=Epoch("p-1"), request=RequestId("r"), attempt=0, message="?", retryable=True)
    )
    bench.lose("p")
    bench.tokens("d", item(2, 9, finish=FinishReason.LENGTH))
    assert await collect(flight) == [7, 8, 9]
    assert flight.attempt == 0 and not bench.clients["d"].cancelled


@scenario
async def test_a_token_lost_on_the_way_is_computed_again() -> None:
    bench = Bench({"a": Role.MIXED, "b": Role.MIXED}, policy="replicated")
    starting = bench.start()
    await settle()
    first = next(name for name, client in bench.clients.items() if client.submitted)
    bench.tokens(first, item(0, 7), item(2, 9, finish=FinishReason.LENGTH))
    flight = await starting
    bench.service.tick()
    bench.clock.advance(GAP_S + 0.1)
    bench.service.tick()
    other = "b" if first == "a" else "a"
    assert bench.clients[other].submitted[0].generated == (7,)
    bench.tokens(other, item(1, 8, attempt=1), item(2, 9, attempt=1, finish=FinishReason.LENGTH))
    assert await collect(flight) == [7, 8, 9]


@scenario
async def test_a_submission_that_cannot_be_sent_goes_to_another_worker() -> None:
    bench = Bench({"a": Role.MIXED, "b": Role.MIXED}, policy="replicated")
    starting = bench.start()
    await settle()
    first = next(name for name, client in bench.clients.items() if client.submitted)
    bench.service.unsent(WorkerId(first), bench.clients[first].submitted[0])
    other = "b" if first == "a" else "a"
    assert [submission.attempt for submission in bench.clients[other].submitted] == [1]
    starting.cancel()


@scenario
async def test_a_failure_that_cannot_be_retried_ends_the_request_at_once() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    bench.service.failed(
        Failed(
            worker=WorkerId("p"), epoch=Epoch("p-1"), request=RequestId("r"), attempt=0, message="no", retryable=False
        )
    )
    with pytest.raises(WorkerFailure):
        await starting


@scenario
async def test_cancelling_tells_both_workers_and_frees_their_places() -> None:
    bench = Bench()
    starting = bench.start()
    await settle()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert bench.clients["p"].cancelled == bench.clients["d"].cancelled == [("r", 0)]
    snapshot = bench.service.view.snapshot(bench.clock.now())
    counts = (snapshot.prefilling, snapshot.ahead_tokens, snapshot.decoding, snapshot.context_tokens)
    assert all(not column.any() for column in counts)


@scenario
async def test_the_deadline_ends_a_request_with_an_error_and_stops_its_workers() -> None:
    bench = Bench()
    starting = bench.start(timeout=5)
    await settle()
    bench.clock.advance(4.9)
    bench.service.tick()
    await settle()
    assert not starting.done()
    bench.clock.advance(0.2)
    bench.service.tick()
    with pytest.raises(DeadlineExceeded, match="5 s"):
        await starting
    assert bench.clients["d"].cancelled


@scenario
async def test_requests_beyond_the_slots_wait_and_beyond_the_queue_are_turned_away() -> None:
    bench = Bench({"a": Role.MIXED}, policy="single", queue_limit=1)
    placed = [bench.start(f"r{i}") for i in range(4)]
    await settle()
    waiting = bench.start("r4")
    await settle()
    assert bench.service.state().queued == 1
    with pytest.raises(Overloaded) as refused:
        await bench.start("r5")
    assert refused.value.retry_after > 0
    bench.tokens("a", item(0, 1, name="r0", finish=FinishReason.STOP))
    await settle()
    assert bench.clients["a"].submitted[-1].request == "r4"
    for task in [*placed, waiting]:
        task.cancel()


@scenario
async def test_without_a_worker_a_request_is_unavailable_at_once() -> None:
    bench = Bench()
    for name in ("p", "d"):
        bench.lose(name)
    with pytest.raises(Unavailable):
        await bench.start()


@scenario
async def test_a_worker_that_runs_what_has_ended_is_told_to_stop_again() -> None:
    bench = Bench()
    bench.tokens("d", item(3, 1, name="ghost"))
    assert bench.clients["d"].cancelled == [("ghost", 0)]


def test_a_worker_with_another_model_layout_or_version_is_refused_naming_both() -> None:
    view = ClusterView(1000)
    view.add(offer("a", Role.MIXED), 0.0)
    other_model = ModelCard(name="other", fingerprint="f2", context=1000, vocab=100, layout=LAYOUT)
    with pytest.raises(RegistrationRefused, match=r"f2.*f1"):
        view.check(offer("b", Role.MIXED, card=other_model))
    half = KVLayout("bfloat16", 1, 1, 4, 16, 2, 8)
    other_layout = ModelCard(name="tiny", fingerprint="f1", context=1000, vocab=100, layout=half)
    with pytest.raises(RegistrationRefused, match=r"bfloat16.*float32"):
        view.check(offer("b", Role.MIXED, card=other_layout))
    with pytest.raises(RegistrationRefused, match=f"version {VERSION + 1}"):
        view.check(offer("b", Role.MIXED, version=VERSION + 1))


def test_a_burned_epoch_is_never_taken_back() -> None:
    view = ClusterView(1000)
    view.add(offer("a", Role.MIXED, "a-1"), 0.0)
    view.remove(WorkerId("a"))
    with pytest.raises(RegistrationRefused, match="a-1"):
        view.check(offer("a", Role.MIXED, "a-1"))
    view.check(offer("a", Role.MIXED, "a-2"))


def test_a_router_that_stood_still_does_not_blame_its_workers() -> None:
    view = ClusterView(1000)
    member = view.add(offer("a", Role.MIXED), 0.0)
    view.excuse(60.0)
    assert view.overdue(61.0, 3.0, 10.0) == [] and not member.suspect


def test_missed_heartbeats_make_a_worker_suspect_and_then_dead() -> None:
    view = ClusterView(1000)
    member = view.add(offer("a", Role.MIXED), 0.0)
    assert view.overdue(2.0, 3.0, 10.0) == [] and not member.suspect
    assert view.overdue(4.0, 3.0, 10.0) == [] and member.suspect
    assert not view.snapshot(4.0).placeable[member.row]
    view.heartbeat(member, member.load, 5.0)
    assert not member.suspect
    assert view.overdue(15.5, 3.0, 10.0) == [member]


@scenario
async def test_who_has_to_wait_is_decided_on_once_when_it_comes() -> None:
    bench = Bench()
    asked: list[str] = []
    policy = bench.service._policy
    bench.service._policy = lambda snapshot, query: (asked.append(query.request), policy(snapshot, query))[1]
    for name in ("a", "b", "c", "d", "e"):  # the decode worker takes four
        bench.start(name)
    await settle()
    assert asked == ["a", "b", "c", "d", "e"]
    assert bench.service.state().queued == 1
