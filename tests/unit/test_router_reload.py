"""All workers started anew: one after another, with the same weights or others, while requests run and wait."""

from __future__ import annotations

import asyncio

import pytest
from membership_rig import CARD, FakeLink, offer
from msgspec.structs import replace
from test_router_service import collect, item, scenario, settle

from bascule.clock import VirtualClock
from bascule.config import RoutingConfig
from bascule.errors import Conflict, WorkerFailure
from bascule.router.flight import Flight
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.types import Epoch, FinishReason, ModelCard, Request, RequestId, SamplingParams, WorkerId
from bascule.wire import (
    Goodbye,
    Heartbeat,
    Neighbours,
    RegistrationRefusal,
    StepTokens,
    Stop,
    Submit,
    TokenItem,
    WorkerLoad,
)

NEW = replace(CARD, fingerprint="other weights")
LAST = FinishReason.LENGTH


class Rig:
    """A router with workers that end when they are told to; who starts them again is the test."""

    def __init__(self, *workers: str) -> None:
        self.clock = VirtualClock()
        self.link = FakeLink()
        self.view = ClusterView(1000)
        config = RoutingConfig(policy="replicated", suspect_after=1e6, dead_after=1e7)
        self.service = Service(self.view, config, self.clock)
        self.membership = Membership(self.link, self.service, config, self.clock)  # type: ignore[arg-type]
        self.operations = self.membership.operations
        self.epochs: dict[str, str] = {}
        for name in workers:
            self.come(name)

    def come(self, name: str, card: ModelCard = CARD) -> None:
        """A process with that name offers itself for the first time, or again."""
        epoch = self.epochs.setdefault(name, f"{name}-1")
        self.membership.apply(Epoch(epoch), replace(offer(name, epoch), card=card))

    def ends(self, name: str) -> None:
        """It does so, as it was told to; what is started in its place has another epoch."""
        assert self.told(name, Stop), f"{name} was not told to end"
        epoch = self.epochs[name]
        self.membership.apply(Epoch(epoch), Goodbye(WorkerId(name), Epoch(epoch)))
        self.epochs[name] = f"{name}-{int(epoch.rsplit('-')[-1]) + 1}"

    def told(self, name: str, kind: type) -> list[object]:
        epoch = self.epochs[name]
        return [message for to, message in self.link.sent if to == epoch and isinstance(message, kind)]

    def tick(self, seconds: float = 0.1) -> None:
        self.clock.advance(seconds)
        self.service.tick()
        self.operations.tick()

    def start(self, name: str) -> asyncio.Task[Flight]:
        sampling = SamplingParams(max_tokens=8)
        request = Request(id=RequestId(name), prompt=tuple(range(40)), sampling=sampling, timeout=1000.0)
        return asyncio.create_task(self.service.start(request))

    def has(self, name: str) -> str:
        """The worker that a request was sent to last."""
        sent = [(to, one) for to, one in self.link.sent if isinstance(one, Submit) and one.request == name]
        return sent[-1][0].rsplit("-")[0] if sent else ""

    def tokens(self, worker: str, *items: TokenItem) -> None:
        epoch = Epoch(self.epochs[worker])
        self.membership.apply(epoch, StepTokens(WorkerId(worker), epoch, items))

    def states(self) -> dict[str, str]:
        return {member.id: member.state for member in self.view.members.values()}


@scenario
async def test_workers_are_replaced_one_after_another() -> None:
    rig = Rig("a", "b")
    assert rig.operations.reload_status().state == "none"
    assert rig.operations.reload().current == "a"
    rig.tick()
    assert rig.states() == {"a": "drained", "b": "ready"} and not rig.operations.reload_status().ended
    rig.ends("a")
    rig.tick(100)
    assert rig.states() == {"b": "ready"}, "the next one only goes when this one is back"
    assert rig.operations.reload_status().ended
    rig.come("a")
    rig.tick()
    rig.tick()
    status = rig.operations.reload_status()
    assert (status.state, status.done, status.current, status.ended) == ("running", 1, "b", False)
    rig.ends("b")
    rig.tick()
    rig.come("b")
    rig.tick()
    assert rig.operations.reload_status().state == "done" and rig.states() == {"a": "ready", "b": "ready"}
    assert rig.operations.reload_status().done == 2


@scenario
async def test_other_weights_wait_for_the_last_worker_with_those_of_before_and_take_over() -> None:
    rig = Rig("a", "b")
    rig.operations.reload()
    rig.tick()
    rig.ends("a")
    rig.tick()
    rig.come("a", NEW)
    assert rig.states() == {"b": "ready"} and not rig.told("a", RegistrationRefusal)
    assert rig.operations.reload_status().waiting == ("a",)
    running = rig.start("r")
    await settle()
    assert rig.has("r") == "b"
    rig.tokens("b", item(0, 7))
    rig.tick()
    rig.come("a", NEW)
    rig.tick()
    assert rig.states() == {"a": "ready", "b": "draining"}
    assert rig.view.card == NEW and rig.operations.reload_status().fingerprint == "other weights"
    later = rig.start("s")
    await settle()
    assert rig.has("s") == "a", "new requests go to the new weights while the old ones end what they have"
    rig.tokens("b", item(1, 8, finish=LAST))
    assert await collect(await running) == [7, 8]
    rig.tick()
    rig.ends("b")
    rig.tick()
    rig.come("b", NEW)
    rig.tick()
    assert rig.states() == {"a": "ready", "b": "ready"} and rig.operations.reload_status().state == "done"
    later.cancel()


@scenario
async def test_a_single_worker_is_replaced_and_requests_wait_meanwhile() -> None:
    rig = Rig("a")
    rig.operations.reload()
    rig.tick()
    waiting = rig.start("r")
    await settle()
    rig.ends("a")
    rig.tick(5)
    rig.come("a", NEW)
    assert rig.has("r") == "a"
    rig.tokens("a", item(0, 7, finish=LAST))
    assert await collect(await waiting) == [7]
    rig.tick()
    assert rig.operations.reload_status().state == "done"


@scenario
async def test_an_output_that_has_begun_never_goes_on_with_other_weights() -> None:
    rig = Rig("a", "b")
    begun, fresh = rig.start("r"), rig.start("s")
    await settle()
    assert {rig.has("r"), rig.has("s")} == {"a", "b"}
    old = rig.has("r")
    other = "ab".replace(old, "")
    rig.tokens(old, item(0, 7))
    flight = await begun
    rig.operations.reload()
    rig.operations.drain(WorkerId("b"))
    rig.come("c", NEW)
    assert rig.states() == {"a": "draining", "b": "draining", "c": "ready"}
    rig.operations.drain(WorkerId(old), 0.0)
    rig.tick()
    assert rig.has("r") == old, "its time is over, but nobody could go on with it"
    with pytest.raises(Conflict, match="no longer served"):
        rig.operations.resume(WorkerId("b"))
    rig.membership.lost(WorkerId(other), "died")
    assert rig.has("s") == "c", "nothing of it was out"
    rig.membership.lost(WorkerId(old), "died")
    with pytest.raises(WorkerFailure, match="other weights do not go on"):
        await collect(flight)
    assert rig.has("r") == old
    fresh.cancel()


@scenario
async def test_what_waits_with_tokens_when_the_weights_change_is_ended_and_the_rest_is_named_anew() -> None:
    rig = Rig("a")
    begun = rig.start("r")
    await settle()
    rig.tokens("a", item(0, 7))
    flight = await begun
    fresh = rig.start("s")
    await settle()
    rig.operations.reload()
    before = rig.service._flights[RequestId("s")].hashes
    rig.membership.lost(WorkerId("a"), "died")
    assert rig.service.state().queued == 2
    rig.epochs["a"] = "a-2"
    rig.come("a", NEW)
    with pytest.raises(WorkerFailure, match="send it again"):
        await collect(flight)
    assert rig.has("s") == "a" and rig.service._flights[RequestId("s")].hashes != before
    fresh.cancel()


@scenario
async def test_other_weights_are_refused_without_a_reload_and_other_models_always() -> None:
    rig = Rig("a", "b")
    rig.come("c", NEW)
    (refusal,) = rig.told("c", RegistrationRefusal)
    assert isinstance(refusal, RegistrationRefusal) and "bascule admin reload" in refusal.reason
    rig.operations.reload()
    for number, card in enumerate(
        [replace(NEW, name="another"), replace(NEW, context=500), replace(NEW, vocab=90), replace(CARD, context=500)]
    ):
        rig.come(f"d{number}", card)
        assert rig.told(f"d{number}", RegistrationRefusal)
    assert set(rig.states()) == {"a", "b"} and not rig.operations.reload_status().waiting


@scenario
async def test_a_worker_that_dies_on_its_own_before_its_turn_is_not_waited_for_twice() -> None:
    rig = Rig("a", "b")
    rig.operations.reload()
    rig.tick()
    rig.membership.lost(WorkerId("b"), "died")
    rig.epochs["b"] = "b-2"
    rig.ends("a")
    rig.tick()
    rig.come("a")
    rig.come("b")
    rig.tick()
    rig.tick()
    assert rig.operations.reload_status().state == "done" and not rig.told("b", Stop)


@scenario
async def test_workers_with_other_weights_are_not_introduced_to_those_before() -> None:
    rig = Rig("a", "b")
    rig.operations.reload()
    rig.operations.drain(WorkerId("a"))
    rig.operations.drain(WorkerId("b"))
    rig.link.sent.clear()
    rig.come("c", NEW)
    rig.come("d", NEW)
    assert not rig.told("a", Neighbours) and not rig.told("b", Neighbours)
    (empty, told) = rig.told("c", Neighbours)
    assert isinstance(empty, Neighbours) and isinstance(told, Neighbours)
    assert not empty.come and [one.worker for one in told.come] == ["d"]


@scenario
async def test_a_router_without_workers_says_that_there_is_nothing_to_reload() -> None:
    rig = Rig()
    with pytest.raises(Conflict, match="No worker has joined yet"):
        rig.operations.reload()
    assert rig.operations.reload_status().state == "none"


def test_a_heartbeat_of_before_is_heard_while_it_drains() -> None:
    rig = Rig("a")
    rig.operations.reload()
    rig.come("c", NEW)
    rig.membership.apply(Epoch("a-1"), Heartbeat(WorkerId("a"), Epoch("a-1"), WorkerLoad(), 0, (), 0.0, b""))
    assert set(rig.states()) == {"a", "c"}
