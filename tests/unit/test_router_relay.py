"""A request in two legs: one worker saves its KV, the other loads it, and whichever fails, its output is whole."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace
from test_router_service import Bench, RecordingClient, collect, item, offer, scenario, settle

from bascule.kv.hashing import salt_of
from bascule.observe.totals import HANDED_AGAIN, HANDED_BYTES, HITS, PROMPTS, Key
from bascule.router.flight import Flight
from bascule.router.relay import PATIENCE_S
from bascule.types import Brought, Epoch, FinishReason, RequestId, Role, StoreHandoff, Tier, WorkerId
from bascule.wire import Loaded, Saved, StorePlace, Submit, TokenItem


class RelayBench(Bench):
    """Both workers have the host tier in common, and disks of their own."""

    def __init__(self) -> None:
        super().__init__(handoff="store")

    def join(self, name: str, role: Role, epoch: str = "") -> None:
        stores = {Tier.DISK: StorePlace(f"disk of {name}", 10), Tier.HOST: StorePlace("here", 10)}
        message = offer(name, role, epoch, stores=stores)
        self.clients[name] = RecordingClient()
        self.service.joined(self.service.view.add(message, self.clock.now()), self.clients[name])

    async def prefilled(self, first: TokenItem) -> Flight:
        """A request of 40 tokens whose first leg has ended with this token."""
        task = self.start(tokens=40)
        await settle()
        self.tokens("p", first)
        return await task

    def saved(self, attempt: int = 0, worker: str = "p", size: int = 0) -> None:
        self.service.saved(
            Saved(WorkerId(worker), Epoch(f"{worker}-1"), RequestId("r"), attempt, {"host": size} if size else {})
        )

    def loaded(self, worker: str, brought: Brought, attempt: int = 0) -> None:
        told = Loaded(
            worker=WorkerId(worker),
            epoch=Epoch(f"{worker}-1"),
            request=RequestId("r"),
            attempt=attempt,
            brought=brought,
        )
        self.service.loaded(told)

    def counted(self, *names: str) -> dict[Key, float]:
        """The metrics of these names that are not zero."""
        return {key: count for key, count in self.service.tallies.totals().items() if key[0] in names and count}

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
    flight = await bench.prefilled(item(0, 50, finish=FinishReason.LENGTH))
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


def found(position: int, cached: int, attempt: int = 0, finish: FinishReason | None = None) -> TokenItem:
    """A token of a worker that found so many of the prompt's."""
    return replace(item(position, 50 + position, attempt, finish=finish), cached_tokens=cached)


@scenario
async def test_what_two_legs_find_counts_once_and_what_the_second_moves_is_the_handoffs() -> None:
    bench = RelayBench()
    task = bench.start(tokens=40)
    await settle()
    bench.loaded("p", Brought({"disk": 8}, 0.1, {"disk": 900}))
    bench.tokens("p", found(0, 24, finish=FinishReason.LENGTH))
    flight = await task
    assert flight.kv.handoff is None, "nothing is asked of the decode worker yet"
    bench.saved(size=2000)
    for tokens, size in ((16, 1800), (32, 3600)):
        bench.loaded("d", Brought({"host": tokens}, 0.02, {"host": size}))
    bench.tokens("d", *(found(at, 36, finish=FinishReason.LENGTH if at == 7 else None) for at in range(1, 8)))
    deltas = [delta async for delta in flight]
    moved = StoreHandoff({"host": 2000}, {"host": 32}, {"host": 3600}, 0.02, 4)
    assert deltas[-1].handoff == moved
    assert (deltas[-1].cached_tokens, deltas[-1].brought.tokens) == (24, {"disk": 8})
    [record] = bench.service.journal.records.find("r")
    assert (record.actual.cached_tokens, record.actual.loaded_tokens) == (24, {"disk": 8})
    assert record.actual.handoff == moved
    assert bench.counted(HITS, PROMPTS) == {(PROMPTS,): 40, (HITS, "device"): 16, (HITS, "disk"): 8}
    assert bench.counted(HANDED_BYTES, HANDED_AGAIN) == {
        (HANDED_BYTES, "host", "saved"): 2000,
        (HANDED_BYTES, "host", "loaded"): 3600,
        (HANDED_AGAIN,): 4,
    }


@scenario
async def test_what_a_second_attempt_moves_comes_on_top_and_its_prompt_is_not_found_again() -> None:
    bench = RelayBench()
    bench.join("q", Role.DECODE)
    flight = await bench.prefilled(found(0, 16, finish=FinishReason.LENGTH))
    bench.saved(size=2000)
    first, other = ("d", "q") if bench.sent("d") else ("q", "d")
    bench.tokens(first, found(1, 40))
    bench.lose(first)
    bench.loaded("p", Brought({"disk": 40}, 0.1, {"disk": 4000}), attempt=1)  # it prefills anew, for the same output
    bench.tokens("p", found(2, 40, attempt=1, finish=FinishReason.LENGTH))
    assert flight.kv.handoff == StoreHandoff({"host": 2000})
    bench.saved(attempt=1, size=100)
    bench.loaded(other, Brought({"host": 32}, 0.0, {"host": 3600}), attempt=1)
    bench.tokens(other, *(found(at, 32, 1, FinishReason.LENGTH if at == 7 else None) for at in range(3, 8)))
    assert await collect(flight) == list(range(50, 58))
    assert flight.kv.handoff == StoreHandoff({"host": 2100}, {"host": 32}, {"host": 3600}, 0.0, 8)
    assert bench.counted(HITS, PROMPTS) == {(PROMPTS,): 40, (HITS, "device"): 16}
    assert bench.counted(HANDED_AGAIN) == {(HANDED_AGAIN,): 8}


@scenario
async def test_kv_that_is_saved_after_the_second_leg_began_belongs_to_the_handoff() -> None:
    bench = RelayBench()
    flight = await bench.prefilled(found(0, 0, finish=FinishReason.LENGTH))
    bench.clock.advance(PATIENCE_S + 0.1)
    bench.service.tick()
    assert len(bench.sent("d")) == 1
    bench.saved(size=700)
    assert flight.kv.handoff == StoreHandoff({"host": 700})
    flight.cancel()
    assert bench.counted(HANDED_BYTES) == {(HANDED_BYTES, "host", "saved"): 700}


@scenario
async def test_a_prompt_that_an_attempt_without_a_token_had_found_counts_when_there_is_one() -> None:
    bench = Bench({"a": Role.MIXED, "b": Role.MIXED}, policy="replicated")
    task = bench.start(tokens=40)
    await settle()
    first, other = ("a", "b") if bench.clients["a"].submitted else ("b", "a")
    brought = Brought({"disk": 32}, 0.1, {"disk": 900})
    bench.service.loaded(
        Loaded(worker=WorkerId(first), epoch=Epoch(f"{first}-1"), request=RequestId("r"), attempt=0, brought=brought)
    )
    bench.lose(first)
    bench.tokens(other, found(0, 8, attempt=1))
    flight = await task
    counts = bench.service.tallies.totals()
    assert {key[1]: count for key, count in counts.items() if key[0] == HITS} == {"device": 8}
    assert counts[PROMPTS,] == 40
    flight.cancel()
