"""What a worker says that cannot be, well-formed as it is: no client gets any of it, and nothing is held for it."""

from __future__ import annotations

import asyncio

from membership_rig import CARD, Bench, offer
from msgspec.structs import replace

from bascule.router.flight import Flight
from bascule.types import Epoch, Request, RequestId, SamplingParams, TokenLogprobs, WorkerId
from bascule.wire import Goodbye, Starting, StepTokens, Submit, TokenItem

REQUEST = Request(id=RequestId("r"), prompt=(1, 2), sampling=SamplingParams(max_tokens=4), timeout=60.0)


def item(position: int, token: int, attempt: int = 0, top: tuple[tuple[int, float], ...] = ()) -> TokenItem:
    return TokenItem(REQUEST.id, attempt, position, token, 0, None, TokenLogprobs(-1.0, top))


def test_a_message_of_another_epoch_than_its_sender_s_is_dropped() -> None:
    bench = Bench("a", "b")
    bench.membership.apply(Epoch("b-1"), Goodbye(WorkerId("a"), Epoch("a-1")))
    bench.membership.apply(Epoch("b-1"), offer("a", "a-2"))
    assert {member.epoch for member in bench.view.members.values()} == {"a-1", "b-1"}


def test_a_member_that_offers_itself_under_another_name_is_not_heard() -> None:
    """It is no newcomer: refused, it would end."""
    bench = Bench("a")
    bench.link.sent.clear()
    bench.membership.apply(Epoch("a-1"), replace(offer("b", "a-1"), version=0))
    bench.membership.apply(Epoch("a-1"), offer("c", "a-1"))
    assert not bench.link.sent and set(bench.view.members) == {"a"}


def test_a_token_that_the_model_does_not_have_is_not_delivered_and_the_request_goes_elsewhere() -> None:
    for wrong in (item(1, CARD.vocab), item(1, 7, top=((CARD.vocab, -1.0),))):
        asyncio.run(elsewhere(wrong))


async def elsewhere(wrong: TokenItem) -> None:
    bench = Bench("a", "b")
    service = bench.membership._service
    starting = asyncio.create_task(service.start(REQUEST))
    async with asyncio.timeout(20):
        await asyncio.sleep(0)
        [first] = placed(bench)
        bench.hear(StepTokens(WorkerId(first), Epoch(f"{first}-1"), (item(0, 5),)))
        flight = await starting
        bench.hear(StepTokens(WorkerId(first), Epoch(f"{first}-1"), (wrong,)))
        assert flight.tokens == [5]
        [_, second] = placed(bench)
        assert second != first
        flight.cancel()


def placed(bench: Bench) -> list[str]:
    """Where the request was submitted, in order."""
    return [str(epoch).removesuffix("-1") for epoch, message in bench.link.sent if isinstance(message, Submit)]


def test_positions_behind_an_output_s_end_are_not_held() -> None:
    flight = Flight(REQUEST, 0.0, 60.0, lambda flight: None)
    for position in (4, 5, 2**31, 2**53):
        assert not flight.take(item(position, 1))
    assert not flight.gap_outlasts(0.0, 0.0) and not flight._held


def test_workers_that_only_ever_start_fill_no_memory() -> None:
    bench = Bench()
    for number in range(5000):
        bench.membership.apply(Epoch("x"), Starting(WorkerId(f"w-{number}"), "loading"))
    assert 0 < len(bench.membership.stages) < 2000
