"""A request in two legs: one worker saves its KV, the other loads it, and whichever fails, its output is whole."""

from __future__ import annotations

import asyncio

from test_router_service import Bench, RecordingClient, collect, item, offer, scenario, settle

from bascule.kv.hashing import salt_of
from bascule.router.relay import PATIENCE_S
from bascule.types import Epoch, FinishReason, RequestId, Role, Tier, WorkerId
from bascule.wire import Saved, StorePlace, Submit


class RelayBench(Bench):
    """Both workers have the host tier in common, and disks of their own."""

    def __init__(self) -> None:
        super().__init__(handoff="store")

    def join(self, name: str, role: Role, epoch: str = "") -> None:
        stores = {Tier.DISK: StorePlace(f"disk of {name}", 10), Tier.HOST: StorePlace("here", 10)}
        message = offer(name, role, epoch, stores=stores)
        self.clients[name] = RecordingClient()
        self.service.joined(self.service.view.add(message, self.clock.now()), self.clients[name])

    def saved(self, attempt: int = 0) -> None:
        self.service.saved(Saved(WorkerId("p"), Epoch("p-1"), RequestId("r"), attempt))

    def sent(self, name: str) -> list[Submit]:
        return self.clients[name].submitted


@scenario
async def test_the_second_leg_follows_the_first_ones_saved_kv() -> None:
    bench = RelayBench()
    task = bench.start(tokens=40, salt=salt_of("ann"), priority=-3)
    await settle()
    [first] = bench.sent("p")
    assert (first.save_to, first.decode, first.sampling.max_tokens) == (Tier.HOST, None, 1)
    bench.tokens("p", item(0, 50, finish=FinishReason.LENGTH))
    flight = await task
    assert not flight.ended, "only the leg has ended"
    assert flight.placement.route == "remote;prefill=p;decode=d"
    assert bench.sent("d") == []
    bench.saved()
    [second] = bench.sent("d")
    assert (second.generated, second.sampling.max_tokens, second.save_to) == ((50,), 8, None)
    assert second.stored_tokens == 40
    assert first.salt == second.salt == salt_of("ann") and first.priority == second.priority == -3
    bench.saved()
    assert len(bench.sent("d")) == 1
    bench.tokens("d", *(item(at, 50 + at, finish=FinishReason.LENGTH if at == 7 else None) for at in range(1, 8)))
    assert await collect(flight) == list(range(50, 58))
    assert flight.finish is FinishReason.LENGTH
    assert bench.service.state().store_handoffs == 1
    assert bench.service.active == 0


@scenario
async def test_an_output_that_ends_with_its_first_token_has_no_second_leg() -> None:
    bench = RelayBench()
    task = bench.start(tokens=40)
    await settle()
    bench.tokens("p", item(0, 50, finish=FinishReason.STOP))
    assert await collect(await task) == [50]
    bench.saved()
    bench.clock.advance(10)
    bench.service.tick()
    assert bench.sent("d") == []


@scenario
async def test_what_is_not_saved_in_time_is_not_waited_for() -> None:
    bench = RelayBench()
    task = bench.start(tokens=40)
    await settle()
    bench.clock.advance(5)
    bench.service.tick()
    assert bench.sent("d") == [], "the first leg has no token yet"
    bench.tokens("p", item(0, 50, finish=FinishReason.LENGTH))
    await task
    bench.clock.advance(PATIENCE_S + 0.1)
    bench.service.tick()
    assert len(bench.sent("d")) == 1
    bench.saved()
    bench.clock.advance(PATIENCE_S + 0.1)
    bench.service.tick()
    assert len(bench.sent("d")) == 1


@scenario
async def test_a_first_leg_whose_token_was_lost_on_the_way_is_placed_again() -> None:
    """Nothing else would come after it to show that it is missing."""
    bench = RelayBench()
    task = bench.start(tokens=40)
    await settle()
    bench.saved()
    assert [each.attempt for each in bench.sent("p")] == [0, 1]
    bench.tokens("p", item(0, 50, attempt=1, finish=FinishReason.LENGTH))
    flight = await task
    bench.saved(attempt=1)
    [second] = bench.sent("d")
    assert (second.attempt, second.generated) == (1, (50,))
    flight.cancel()


@scenario
async def test_a_prefill_worker_that_dies_after_the_second_leg_began_is_not_missed() -> None:
    bench = RelayBench()
    task = bench.start(tokens=40)
    await settle()
    bench.tokens("p", item(0, 50, finish=FinishReason.LENGTH))
    flight = await task
    bench.saved()
    bench.lose("p")
    bench.tokens("d", *(item(at, 50 + at, finish=FinishReason.LENGTH if at == 7 else None) for at in range(1, 8)))
    assert await collect(flight) == list(range(50, 58))


@scenario
async def test_a_prefill_worker_that_dies_before_is_replaced_behind_the_sent_token() -> None:
    bench = RelayBench()
    bench.join("q", Role.PREFILL)
    task = bench.start(tokens=40)
    await settle()
    first, other = ("p", "q") if bench.sent("p") else ("q", "p")
    bench.tokens(first, item(0, 50, finish=FinishReason.LENGTH))
    flight = await task
    bench.lose(first)
    await settle()
    [again] = bench.sent(other)
    assert (again.attempt, again.generated, again.sampling.max_tokens, again.save_to) == (1, (50,), 2, Tier.HOST)
    bench.saved(attempt=0)
    assert bench.sent("d") == [], "that was the lost attempt's"
    bench.tokens(other, item(1, 51, attempt=1, finish=FinishReason.LENGTH))
    bench.service.saved(Saved(WorkerId(other), Epoch(f"{other}-1"), RequestId("r"), 1))
    [second] = bench.sent("d")
    assert second.generated == (50, 51)
    flight.cancel()
    await asyncio.sleep(0)
    assert bench.service.active == 0


@scenario
async def test_workers_that_share_no_tier_push() -> None:
    bench = Bench(handoff="store")
    task = bench.start(tokens=40)
    await settle()
    [whole] = bench.clients["p"].submitted
    assert whole.decode is not None and whole.save_to is None
    task.cancel()
