"""What a tier refuses is offered to it again for a while, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from bascule.kv.store.base import Use
from bascule.kv.store.tiers import Saved
from bascule.types import BlockHash
from bascule.worker import saver as module
from bascule.worker.saver import Saver

NAMES = [BlockHash(bytes([number]) * 16) for number in range(40)]


class Place:
    """A tier that may be shut, and blocks that are on the device."""

    def __init__(self) -> None:
        self.shut = False
        self.device = set(NAMES)
        self.held: list[BlockHash] = []
        self.told: list[BlockHash] = []
        self.calls = 0
        self.used: list[BlockHash] = []
        self.saver = Saver(self.save, self.told.extend, 32, self.use)

    def save(self, names: Sequence[BlockHash]) -> Saved:
        self.calls += 1
        here = [name for name in names if name in self.device and name not in self.held]
        if self.shut:
            return Saved({}, here)
        self.held += here
        return Saved(dict.fromkeys(here, 1), [])

    def use(self, uses: Sequence[Use]) -> Saved:
        self.used += [use.name for use in uses]
        return self.save([use.name for use in uses])

    async def offer_again(self) -> None:
        self.saver.again()
        await self.saver.drain()


def run(scenario: Callable[[Place], Awaitable[None]]) -> None:
    async def with_place() -> None:
        place = Place()
        try:
            await scenario(place)
        finally:
            place.saver.close()

    asyncio.run(asyncio.wait_for(with_place(), 20))


def test_what_was_refused_is_saved_when_the_tier_answers_again() -> None:
    async def scenario(place: Place) -> None:
        place.shut = True
        place.saver.add(NAMES[:20])
        await place.saver.drain()
        assert place.calls == 1, "the others would be refused, too"
        await place.offer_again()
        assert place.held == [] and place.calls == 2
        place.shut = False
        place.saver.add(NAMES[20:22])
        await place.offer_again()
        assert sorted(place.held) == sorted(place.told) == NAMES[20:22], "what is new goes first"
        await place.offer_again()
        assert sorted(place.held) == sorted(place.told) == NAMES[:22]
        calls = place.calls
        await place.offer_again()
        assert place.calls == calls, "nothing is left"

    run(scenario)


def test_a_prefix_lacks_all_behind_the_first_block_that_was_refused_or_waits() -> None:
    async def scenario(place: Place) -> None:
        place.saver.add(NAMES[:3])
        assert place.saver.lacking(NAMES[:5]) == 5, "they wait"
        await place.saver.drain()
        assert place.saver.lacking(NAMES[:3]) == 0
        place.shut = True
        place.saver.add(NAMES[3:6])
        await place.saver.drain()
        assert [place.saver.lacking(NAMES[:count]) for count in (3, 4, 6)] == [0, 1, 3]
        place.shut = False
        await place.offer_again()
        assert place.saver.lacking(NAMES[:6]) == 0

    run(scenario)


def test_what_has_been_evicted_meanwhile_is_not_offered_for_ever() -> None:
    async def scenario(place: Place) -> None:
        place.shut = True
        place.saver.add(NAMES[:3])
        await place.saver.drain()
        place.shut = False
        place.device.clear()
        await place.offer_again()
        calls = place.calls
        await place.offer_again()
        assert place.calls == calls and not place.held

    run(scenario)


def test_a_tier_that_stays_shut_is_left_alone_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        place.shut = True
        place.saver.add(NAMES[:3])
        await place.saver.drain()
        monkeypatch.setattr(module, "_OFFERED_S", 0.0)
        await place.offer_again()
        assert place.calls == 1
        place.shut = False
        await place.offer_again()
        assert not place.held

    run(scenario)


def test_no_more_is_kept_than_the_device_holds() -> None:
    async def scenario(place: Place) -> None:
        place.shut = True
        for start in range(0, 40, 10):
            place.saver.add(NAMES[start : start + 10])
            await place.saver.drain()
        place.shut = False
        await place.offer_again()
        assert sorted(place.held) == NAMES[8:], "the oldest are left out"

    run(scenario)


def test_uses_and_saves_take_turns() -> None:
    async def scenario(place: Place) -> None:
        place.saver.add(NAMES[:20])
        place.saver.use([Use(name, 0.0, again=False) for name in NAMES[10:30]])
        await place.saver.drain()
        assert place.used == NAMES[10:30]
        assert place.held == [*NAMES[:16], *NAMES[16:30]], "what was in the line comes first, and nothing comes twice"
        assert place.saver.idle

    run(scenario)


def test_of_too_many_uses_the_last_are_left_out() -> None:
    async def scenario(place: Place) -> None:
        place.saver.use([Use(name, 0.0, again=False) for name in NAMES])
        await place.saver.drain()
        assert place.used == NAMES[:32]

    run(scenario)
