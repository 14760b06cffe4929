"""A link measured by a worker: real transfers into blocks of another, none of which is left behind whatever happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from engine_rig import CARD, greedy, named, reference, work
from handoff_rig import PROMPT, SAMPLING, SOURCE, TARGET, Pair, deliver, pair, verdicts

from bascule.link_wire import LinkMeasured, MeasureLink
from bascule.peer_wire import Abort, PeerMessage, Prepare
from bascule.types import Role
from bascule.wire import encode as encoded
from bascule.wire import from_worker
from bascule.worker import link_probe
from bascule.worker.link_probe import LinkProbe
from bascule.worker.parts import Identity

BLOCKS, RUNS = 6, 3


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stands still makes a run long, and costs the runs behind it their time."""
    monkeypatch.setattr(link_probe, "BUDGET_S", 60.0)
    monkeypatch.setattr(link_probe, "_LONGEST_S", 60.0)


class Rig:
    """A probe on the prefill side of a pair, to which the decode side's answers go first."""

    def __init__(self, both: Pair) -> None:
        self.both = both
        self.told: list[LinkMeasured] = []
        identity = Identity(worker=SOURCE.worker, epoch=SOURCE.epoch, role=Role.PREFILL, device="cpu")
        prefill, to_prefill = both.prefill, both.prefill.apply
        self.probe = LinkProbe(
            identity,
            both.source,
            prefill._pusher._arena,
            CARD,
            both,  # type: ignore[arg-type]
            prefill._senders,
            self.told.append,
        )

        def apply(message: PeerMessage) -> None:
            if not self.probe.apply(message):
                to_prefill(message)

        prefill.apply = apply  # type: ignore[method-assign]

    def wish(self, transport: str) -> MeasureLink:
        return MeasureLink(probe="1", target=TARGET, transport=transport, blocks=BLOCKS, runs=RUNS)

    def measure(self, transport: str, meanwhile: Callable[[], None] = lambda: None) -> LinkMeasured:
        """The answer, once the decode side has heard that all is given up."""

        async def run() -> LinkMeasured:
            self.probe.measure(self.wish(transport))
            async with asyncio.timeout(20):
                while not self.told:
                    meanwhile()
                    await asyncio.sleep(0.005)
                if self.probe._task is not None:
                    await self.probe._task
                while self.both.decode.promised or self.both.target._books.counts.quarantined:
                    await asyncio.sleep(0.005)
            await self.both.prefill.close()
            return self.told[-1]

        found = self.both.loop.run_until_complete(run())
        return from_worker(encoded(found))  # type: ignore[return-value]


@pytest.mark.parametrize("transport", ["shm", "tcp", "sealed"])
def test_every_run_is_told_and_the_other_worker_is_as_it_was(transport: str) -> None:
    with pair(transport) as both:
        found = Rig(both).measure(named(transport)[0])
        assert (found.reason, found.busy, found.blocks) == ("", False, BLOCKS)
        assert len(found.reserve_s) == len(found.block_s) == len(found.push_s) == RUNS
        assert min(*found.reserve_s, *found.block_s, *found.push_s) > 0
        prepared, aborted = both.sent(Prepare), both.sent(Abort)
        assert [one.ticket for one in prepared] == [one.ticket for one in aborted]  # type: ignore[attr-defined]
        assert both.decode.promised == 0 and not both.decode.refused
        assert both.target._books.counts.free == 32 and both.target._books.counts.cached == 0


def test_a_handoff_beside_a_probe_has_its_tokens() -> None:
    with pair("tcp") as both:
        rig = Rig(both)

        async def run() -> list[int]:
            rig.probe.measure(rig.wish("tcp"))
            tokens = await both.run()
            while not rig.told:
                await asyncio.sleep(0.005)
            return tokens

        tokens = both.loop.run_until_complete(run())
        assert rig.told[0].reason == "" and tokens == reference(PROMPT, SAMPLING) and "accepted" in verdicts(both)


def test_a_worker_with_prompts_before_it_refuses_and_sends_nothing() -> None:
    with pair("tcp") as both:
        rig = Rig(both)
        both.source.submit(work("r", PROMPT, greedy(4)))
        rig.probe.measure(rig.wish("tcp"))
        [found] = rig.told
        assert found.busy and "prompts to compute" in found.reason and both.to_decode == []
        both.source.cancel("r", 1)  # type: ignore[arg-type]


def test_a_second_probe_is_refused_while_one_runs() -> None:
    with pair("tcp") as both:
        rig = Rig(both)
        found = rig.measure("tcp", meanwhile=lambda: rig.probe.measure(rig.wish("tcp")) if not rig.told else None)
        assert rig.told[0].busy and "another link" in rig.told[0].reason
        assert found.reason == "" and len(found.push_s) == RUNS


def test_a_worker_without_room_is_given_up_and_keeps_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe, "BUDGET_S", 0.2)
    with pair("tcp", blocks=8) as both:
        lease = both.target.reserve((1,) * 32, 32)
        assert lease is not None
        found = Rig(both).measure("tcp")
        assert not found.busy and "had no room within 0.2 s" in found.reason
        assert both.decode.promised == 0
        lease.release()


def lose(both: Pair, message: PeerMessage) -> PeerMessage | None:
    return None if isinstance(message, Prepare) else deliver(both, message)


def test_a_worker_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe, "BUDGET_S", 0.1)
    with pair("tcp", lose) as both:
        assert "or did not answer" in Rig(both).measure("tcp").reason


def test_a_transport_that_the_two_do_not_have_is_named() -> None:
    with pair("tcp") as both:
        found = Rig(both).measure("shm")
        assert not found.busy and "do not both use shm; check --transfer" in found.reason


def test_a_probe_that_is_cancelled_while_its_session_closes_still_gives_its_blocks_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closing, may = threading.Event(), threading.Event()
    with pair("tcp") as both:
        rig = Rig(both)
        opened = link_probe.open_session

        def slow_to_close(*args: Any) -> Any:
            session = opened(*args)
            close = session.close

            def held() -> None:
                closing.set()
                may.wait(20)
                close()

            monkeypatch.setattr(session, "close", held)
            return session

        monkeypatch.setattr(link_probe, "open_session", slow_to_close)

        async def run() -> None:
            rig.probe.measure(rig.wish("tcp"))
            assert await asyncio.to_thread(closing.wait, 20)
            assert rig.probe._task is not None
            rig.probe._task.cancel()
            await asyncio.gather(rig.probe._task, return_exceptions=True)
            assert both.sent(Abort) == [], "it may still be written"
            may.set()
            await rig.probe.close()

        both.loop.run_until_complete(run())
        assert len(both.sent(Abort)) == len(both.sent(Prepare)) == 1


def test_a_worker_that_ends_in_the_middle_of_a_probe_leaves_no_block_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe, "_PAUSE_S", 0.0)
    with pair("tcp") as both:
        rig = Rig(both)

        async def run() -> None:
            for turn in range(12):
                rig.probe.measure(rig.wish("tcp"))
                for _ in range(turn * 3):
                    await asyncio.sleep(0)
                assert rig.probe._task is not None
                rig.probe._task.cancel()
                await asyncio.gather(rig.probe._task, return_exceptions=True)
            await rig.probe.close()
            async with asyncio.timeout(20):
                while both.decode.promised:
                    await asyncio.sleep(0.01)

        both.loop.run_until_complete(run())
