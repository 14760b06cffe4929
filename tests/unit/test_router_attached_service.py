"""Attached servers in the router's books: whose card counts, who may come in, and which requests they may not get."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from test_router_service import CARD, Bench, item, offer, scenario, settle

from bascule.errors import RegistrationRefused, WorkerFailure
from bascule.router.flight import Flight
from bascule.router.view import ClusterView
from bascule.types import Request, RequestId, Role, SamplingParams, WorkerId
from bascule.wire import Register


def server(name: str = "attached-0", context: int = 600, vocab: int = 100, **changes: Any) -> Register:
    card = replace(CARD, fingerprint=f"attached {name}", context=context, vocab=vocab)
    return offer(name, Role.MIXED, card=card, device=f"http://{name}", **changes)


def test_the_card_is_the_workers_own_bounded_by_the_shortest_attached_context() -> None:
    view = ClusterView(1000)
    view.add(server("attached-0", 1200), 0.0, attached=True)
    assert view.card is not None and (view.card.fingerprint, view.card.context) == ("attached attached-0", 1200)
    view.check(offer("a", Role.MIXED))
    view.add(offer("a", Role.MIXED), 0.0)
    assert view.card == CARD
    view.add(server("attached-1", 600), 0.0, attached=True)
    assert view.card == replace(CARD, context=600)
    view.check(offer("b", Role.MIXED))
    view.remove(WorkerId("attached-1"))
    assert view.card == CARD


def test_vocabularies_must_agree_whoever_comes_first_and_ids_are_reserved() -> None:
    view = ClusterView(1000)
    view.add(server(vocab=90), 0.0, attached=True)
    with pytest.raises(RegistrationRefused, match=r"100.*90"):
        view.check(offer("a", Role.MIXED))
    with pytest.raises(RegistrationRefused, match="--id"):
        view.check(offer("attached-0", Role.MIXED, "another"))
    view = ClusterView(1000)
    view.add(offer("a", Role.MIXED), 0.0)
    with pytest.raises(RegistrationRefused, match=r"90.*100"):
        view.check_server(server(vocab=90))


def test_a_server_that_rests_gets_nothing_until_its_time_is_over() -> None:
    view = ClusterView(1000)
    member = view.add(server(), 0.0, attached=True)
    view.rest(member, 2.0, 0.5)
    assert not view.snapshot(0.5).placeable[0]
    view.overdue(1.0, 3.0, 10.0)
    assert not view.snapshot(1.0).placeable[0] and view.statuses()[0].state == "suspect"
    view.overdue(2.5, 3.0, 10.0)
    assert view.snapshot(2.5).placeable[0]


@pytest.mark.parametrize(
    ("sampling", "portable"),
    [
        (SamplingParams(max_tokens=9, temperature=0.0), True),
        (SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.2), True),
        (SamplingParams(max_tokens=9, temperature=0.7), False),
        (SamplingParams(max_tokens=9, temperature=0.0, frequency_penalty=0.5), False),
        (SamplingParams(max_tokens=9, temperature=0.0, presence_penalty=-0.5), False),
    ],
)
def test_an_output_that_has_begun_may_go_to_another_engine_only_if_its_tokens_are_its_state(
    sampling: SamplingParams, portable: bool
) -> None:
    flight = Flight(Request(id=RequestId("r"), prompt=(1,), sampling=sampling, timeout=1.0), 0.0, 0.0, lambda _: None)
    assert flight.portable
    flight.take(item(0, 5))
    assert flight.portable is portable


@scenario
async def test_a_sampled_output_does_not_go_from_a_worker_to_an_attached_server_nor_hold_up_the_queue() -> None:
    bench = Bench({"a": Role.MIXED}, policy="replicated")
    starting = bench.start()
    await settle()
    bench.tokens("a", item(0, 7))
    flight = await starting
    view = bench.service.view
    member = view.add(server(), bench.clock.now(), attached=True)
    bench.clients["attached-0"] = type(bench.clients["a"])()
    bench.service.joined(member, bench.clients["attached-0"])
    bench.lose("a")
    other = bench.start("other")
    await settle()
    bench.service.tick()
    with pytest.raises(WorkerFailure, match="no worker is left but attached servers"):
        [delta async for delta in flight]
    assert [one.request for one in bench.clients["attached-0"].submitted] == ["other"]
    other.cancel()


@scenario
async def test_a_sampled_output_that_an_attached_server_began_is_not_mixed_with_another_s() -> None:
    bench = Bench({"a": Role.MIXED}, policy="replicated")
    member = bench.service.view.add(server(), bench.clock.now(), attached=True)
    bench.clients["attached-0"] = type(bench.clients["a"])()
    bench.service.joined(member, bench.clients["attached-0"])
    tasks = [bench.start("r0"), bench.start("r1")]
    await settle()
    begun = bench.clients["attached-0"].submitted[0].request
    bench.tokens("attached-0", item(0, 7, name=begun))
    bench.lose("attached-0")
    await settle()
    flight = next(task.result() for task in tasks if task.done())
    with pytest.raises(WorkerFailure, match="send the request again"):
        [delta async for delta in flight]
    assert begun not in [one.request for one in bench.clients["a"].submitted]
    for task in tasks:
        task.cancel()
