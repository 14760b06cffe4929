"""What a worker does with requests that come, or have all they waited for, while it leaves: nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_rig import Rig, greedy
from fetch_rig import IMPATIENT, PEER_ADDRESS, Two, play, prompt_of
from msgspec import structs

from bascule.peer_wire import Fetch, Fetched, PeerMessage
from bascule.types import RequestId
from bascule.wire import FetchFrom, Submit
from bascule.worker.arrivals import Arrivals

PROMPT = prompt_of(1)
PLAIN = Submit(
    request=RequestId("r"), attempt=0, prompt=tuple(PROMPT), generated=(), sampling=greedy(4), decode=PEER_ADDRESS
)
FETCHING = structs.replace(PLAIN, request=RequestId("f"), fetch=FetchFrom(PEER_ADDRESS, len(PROMPT)))


class Handoffs:
    """Stands for the prefill side: counts what it would begin."""

    def __init__(self) -> None:
        self.begun: list[RequestId] = []

    def begin(self, submission: Submit, decode: Any) -> None:
        self.begun.append(submission.request)

    def cancel(self, key: Any) -> None:
        raise AssertionError("nothing was refused")


def arrivals(two: Two, handoffs: Handoffs) -> Arrivals:
    return Arrivals(
        two.rigs[0].engine,
        handoffs,  # type: ignore[arg-type]
        two.fetches,
        None,
        brought=lambda key, brought: None,
        failed=lambda key, why, again: pytest.fail(why),
        task_ended=lambda task: None,
        wake=lambda: None,
    )


def waiting(rig: Rig) -> int:
    return rig.engine.load().waiting


def test_requests_go_to_the_engine_and_to_handoffs_until_the_worker_leaves() -> None:
    async def scenario(two: Two) -> None:
        handoffs = Handoffs()
        ours = arrivals(two, handoffs)
        ours.submit(structs.replace(PLAIN, priority=-3))
        assert (handoffs.begun, waiting(two.rigs[0])) == (["r"], 1)
        assert [one.work.priority for one in two.rigs[0].engine._scheduler.waiting] == [-3]
        ours.close()
        ours.submit(structs.replace(PLAIN, request=RequestId("late")))
        assert (handoffs.begun, waiting(two.rigs[0]), ours.received) == (["r"], 1, 1)
        two.rigs[0].engine.cancel(RequestId("r"), 0)
        two.rigs[0].run()

    play(scenario)


def test_a_request_that_waits_for_a_peer_is_forgotten_when_the_worker_leaves() -> None:
    def silent(two: Two, message: PeerMessage) -> PeerMessage | None:
        return None if isinstance(message, Fetch | Fetched) else message

    async def scenario(two: Two) -> None:
        two.rigs[0].engine.cost = IMPATIENT
        handoffs = Handoffs()
        ours = arrivals(two, handoffs)
        ours.submit(FETCHING)
        await asyncio.sleep(0)
        assert ours.waiting == 1
        ours.close()
        await asyncio.sleep(0.5)
        assert (handoffs.begun, waiting(two.rigs[0]), ours.waiting) == ([], 0, 0)

    play(scenario, tamper=silent)
