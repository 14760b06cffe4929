"""A tier that does not keep what is handed over is left out for a while, and used again once it is back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from test_router_relay import RelayBench
from test_router_service import RecordingClient, item, offer, scenario, settle

from bascule.policies.snapshot import STORE_TIERS
from bascule.router.detours import FIRST_S, MOST_S, STRIKES, TRIAL_S, Detours
from bascule.router.flight import Flight
from bascule.router.relay import PATIENCE_S
from bascule.types import Brought, Epoch, FinishReason, RequestId, Role, Tier, WorkerId
from bascule.wire import Loaded, Saved, StorePlace, Submit, TokenItem

HOST = STORE_TIERS.index(Tier.HOST)
TRIAL = RequestId("trial")


def wait_s(detours: Detours, now: float, row: int = 0) -> float:
    shunned = detours.shunned(2, now)
    return 0.0 if shunned is None else float(shunned[row, HOST])


def broken(now: float = 0.0, blocks: int = 40) -> Detours:
    """The host tier of the worker of row 0 is left out from `now` on."""
    detours = Detours()
    for _ in range(STRIKES):
        now += 0.1
        detours.failed(0, Tier.HOST, RequestId("r"), blocks, begun=now - 0.05, now=now)
    return detours


def test_one_handoff_in_vain_may_be_chance_and_two_in_a_row_are_not() -> None:
    detours = Detours()
    for begun, now in ((0.0, 1.0), (0.5, 1.1)):  # the second was under way when the first failed
        detours.failed(0, Tier.HOST, RequestId("r"), 40, begun, now)
        assert wait_s(detours, now) == 0
    detours.kept(0, Tier.HOST, RequestId("r"), 40, 2.0)
    detours.failed(0, Tier.HOST, RequestId("r"), 40, 2.1, 3.0)
    assert wait_s(detours, 3.0) == 0, "one before it went well"
    detours.failed(0, Tier.HOST, RequestId("r"), 40, 3.1, 4.0)
    assert wait_s(detours, 4.0) == FIRST_S
    assert wait_s(detours, 4.0, row=1) == 0, "another worker may reach it"


def test_small_prompts_that_go_well_do_not_hide_that_large_ones_fail() -> None:
    detours = Detours()
    for now in (1.0, 2.0):
        detours.failed(0, Tier.HOST, RequestId("r"), 40, now - 0.5, now)
        detours.kept(0, Tier.HOST, RequestId("r"), 1, now)
    assert wait_s(detours, 2.0) > 0


def test_one_handoff_at_a_time_tries_and_each_in_vain_doubles_the_pause() -> None:
    detours = broken()
    now, pauses = 0.2, []
    for _ in range(8):
        pauses.append(wait_s(detours, now))
        now += pauses[-1]
        assert wait_s(detours, now) == 0
        detours.began(0, Tier.HOST, TRIAL, now)
        assert wait_s(detours, now) == pytest.approx(TRIAL_S), "others do not wait for what it shows"
        detours.failed(0, Tier.HOST, RequestId("late"), 40, 0.0, now)
        detours.failed(0, Tier.HOST, TRIAL, 40, now, now + 0.5)
        now += 0.5
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30]) and MOST_S == 30
    detours.began(0, Tier.HOST, TRIAL, now + MOST_S)
    detours.kept(0, Tier.HOST, TRIAL, 40, now + MOST_S)
    assert detours.shunned(2, now + MOST_S) is None
    detours.failed(0, Tier.HOST, RequestId("r"), 40, now + MOST_S, now + MOST_S + 1)
    assert detours.shunned(2, now + MOST_S + 1) is None, "all is forgotten"


def test_a_trial_that_shows_nothing_or_little_is_followed_by_another() -> None:
    detours = broken(blocks=40)
    detours.began(0, Tier.HOST, TRIAL, 5.0)
    assert wait_s(detours, 5.0 + TRIAL_S - 0.1) > 0 and wait_s(detours, 5.0 + TRIAL_S) == 0
    for blocks in (0, 39):
        detours.began(0, Tier.HOST, TRIAL, 20.0)
        detours.kept(0, Tier.HOST, TRIAL, blocks, 20.0)
        assert wait_s(detours, 20.0) == 0
        detours.began(0, Tier.HOST, TRIAL, 20.0)
        assert wait_s(detours, 20.0) == TRIAL_S, "it is still on trial"
    detours.kept(0, Tier.HOST, TRIAL, 1, 20.0)
    detours.began(0, Tier.HOST, TRIAL, 20.0)
    assert wait_s(detours, 20.0) == 0


def test_who_takes_a_workers_row_begins_anew() -> None:
    detours = broken()
    detours.left(0)
    assert detours.shunned(2, 0.3) is None


class TierBench(RelayBench):
    """The two workers have the host tier in common, and lend to each other."""

    def __init__(self, lends: bool = True) -> None:
        self.lends = lends
        super().__init__()

    def join(self, name: str, role: Role, epoch: str = "") -> None:
        message = offer(name, role, epoch, stores={Tier.HOST: StorePlace("here", 1000)}, lends=self.lends)
        self.clients[name] = RecordingClient()
        self.service.joined(self.service.view.add(message, self.clock.now()), self.clients[name])

    def told(self, name: str) -> str:
        """The decision's reason."""
        [record] = self.service.journal.records.find(name)
        return record.attempts[-1].reason


class Handover:
    """One request on a bench that is led through its legs."""

    def __init__(self, bench: TierBench, name: str) -> None:
        self.bench, self.name = bench, name
        self._task: asyncio.Task[Flight] | None = None

    async def start(self) -> Handover:
        self.bench.clock.advance(0.01)
        self._task = self.bench.start(self.name, tokens=40)
        await settle()
        return self

    def sent(self, worker: str) -> Submit:
        [submission] = (each for each in self.bench.sent(worker) if each.request == self.name)
        return submission

    @property
    def pushed(self) -> bool:
        return self.sent("p").decode is not None

    async def end(self, loaded: int = 0, computed: int = 40, missing: int | None = 0, tier: str = "host") -> None:
        """Prefill saves all but `missing` blocks, if it says so in time; decode loads so many tokens."""
        bench, request = self.bench, RequestId(self.name)
        whole = self.pushed
        bench.tokens("p", item(0, 50, name=self.name, finish=None if whole else FinishReason.LENGTH))
        assert self._task is not None
        flight = await self._task
        if not whole:
            size = {} if missing is None or missing else {"host": 2000}
            if missing is None:
                bench.clock.advance(PATIENCE_S + 0.1)
                bench.service.tick()
            else:
                bench.service.saved(Saved(WorkerId("p"), Epoch("p-1"), request, 0, size, missing))
            brought = Brought({tier: loaded} if loaded else {}, 0.0, {})
            told = Loaded(worker=WorkerId("d"), epoch=Epoch("d-1"), request=request, attempt=0, brought=brought)
            bench.service.loaded(told)
        bench.clock.advance(0.01)
        for at in range(1, 8):
            finish = FinishReason.LENGTH if at == 7 else None
            bench.tokens("d", drawn(at, self.name, 40 - computed, finish))
        assert flight.ended and flight.tokens == list(range(50, 58))


def drawn(at: int, name: str, cached: int, finish: FinishReason | None) -> TokenItem:
    return replace(item(at, 50 + at, name=name, finish=finish), cached_tokens=cached)


async def shunning(**how: Any) -> TierBench:
    """A bench on which handoffs have come to nothing, in that way, until the tier was left out."""
    bench = TierBench()
    for number in range(STRIKES):
        one = await Handover(bench, f"vain-{number}").start()
        assert not one.pushed
        await one.end(**how)
    return bench


@pytest.mark.parametrize(
    "how",
    [
        {"missing": 2},
        {"missing": 2, "loaded": 32, "computed": 8, "tier": "peer"},
        {"missing": None, "loaded": 32, "computed": 8},
        {"missing": 0, "loaded": 0},
    ],
    ids=["the tier takes nothing", "decode fetches it", "saving takes too long", "nothing is found there"],
)
def test_a_tier_that_keeps_nothing_is_left_out_and_comes_back(how: dict[str, Any]) -> None:
    @scenario
    async def run() -> None:
        bench = await shunning(**how)
        pushed = await Handover(bench, "pushed").start()
        assert pushed.pushed and pushed.sent("p").save_to is None
        assert "by way of the host tier (again in 1 s) handoffs have come to nothing" in bench.told("pushed")
        await pushed.end()
        bench.clock.advance(FIRST_S)
        trial, beside = await Handover(bench, "trial").start(), await Handover(bench, "beside").start()
        assert not trial.pushed and beside.pushed
        await trial.end(**how)
        bench.clock.advance(1.9 * FIRST_S)
        waits = await Handover(bench, "waits").start()
        assert waits.pushed, "the pause has doubled"
        for one in (beside, waits):
            await one.end()
        bench.clock.advance(0.2 * FIRST_S)
        back = await Handover(bench, "back").start()
        assert not back.pushed
        await back.end(loaded=32, computed=8)
        for name in ("after", "later"):
            one = await Handover(bench, name).start()
            assert not one.pushed and "nothing" not in bench.told(name)
            await one.end(loaded=32, computed=8)
        assert bench.service.active == 0

    run()


@scenario
async def test_a_handoff_that_went_well_in_between_keeps_the_tier_in_use() -> None:
    bench = TierBench()
    for number in range(6):
        one = await Handover(bench, str(number)).start()
        assert not one.pushed
        await (one.end(missing=2) if number % 2 else one.end(loaded=32, computed=8))


@pytest.mark.parametrize(("missing", "loaded"), [(2, 32), (0, 0)], ids=["found all the same", "from the device"])
def test_what_shows_no_failure_of_the_tier_is_none(missing: int, loaded: int) -> None:
    @scenario
    async def run() -> None:
        bench = TierBench()
        for number in range(4):
            one = await Handover(bench, str(number)).start()
            assert not one.pushed
            await one.end(missing=missing, loaded=loaded, computed=8)

    run()


@scenario
async def test_a_worker_that_comes_anew_is_believed_anew() -> None:
    bench = await shunning(missing=2)
    bench.lose("p")
    bench.join("p", Role.PREFILL, "p-2")
    one = await Handover(bench, "new").start()
    assert not one.pushed


@pytest.mark.parametrize(
    ("missing", "lends", "reaches", "stored", "fetched"),
    [(0, True, True, 40, None), (2, True, True, 40, 40), (2, False, True, 40, None), (2, True, False, 40, None)],
)
def test_what_the_tier_has_not_taken_is_fetched_from_the_prefill_worker(
    missing: int, lends: bool, reaches: bool, stored: int, fetched: int | None
) -> None:
    @scenario
    async def run() -> None:
        bench = TierBench(lends=lends)
        rows = {name: bench.service.view.members[WorkerId(name)].row for name in "pd"}
        if not reaches:
            bench.service.view.columns.reaches(rows["d"], frozenset([rows["p"]]))
        one = await Handover(bench, "r").start()
        await one.end(missing=missing)
        second = one.sent("d")
        assert second.stored_tokens == stored
        assert (second.fetch.tokens if second.fetch else None) == fetched
        assert second.fetch is None or second.fetch.peer.worker == "p"

    run()
