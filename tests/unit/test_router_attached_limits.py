"""Time limits of requests at attached servers: the server learns of them, and a silent one loses its trust."""

from __future__ import annotations

import asyncio
import math

import pytest
from fake_server import chunks_of, streamed
from msgspec import structs
from test_router_attached_client import Rig, attached, greedy, submission

from bascule.types import RequestId


@pytest.mark.parametrize(
    ("timeout_s", "sent"), [(12.5, "12.500"), (-0.2, "0.001"), (1e5, "3600.000"), (math.inf, None)], ids=str
)
def test_a_request_s_time_limit_goes_along_as_any_bascule_would_take_it(timeout_s: float, sent: str | None) -> None:
    async def test(rig: Rig) -> None:
        rig.client.submit(structs.replace(submission(greedy()), timeout_s=timeout_s))
        await rig.idle()
        lines = [line.partition(": ") for line in rig.server.heads[0].splitlines()]
        assert [value for name, _, value in lines if name.lower() == "x-request-timeout"] == [sent] * (sent is not None)
        assert rig.failure is None

    attached(test)


def test_a_stream_given_up_when_nothing_has_come_for_long_makes_the_server_doubtful() -> None:
    async def given_up(rig: Rig, *, silent_s: float, heard: bool) -> None:
        seen = len(rig.server.bodies)
        rig.client.submit(submission(greedy()))
        while len(rig.server.bodies) == seen:
            await asyncio.sleep(0.001)
        rig.clock.advance(20.0)
        if heard:
            rig.server.answer = lambda body: streamed(chunks_of(body))
            rig.client.submit(structs.replace(submission(greedy()), request=RequestId("other")))
            while rig.client.running > 1:
                await asyncio.sleep(0.001)
        rig.clock.advance(silent_s)
        rig.client.cancel(RequestId("r"), 1)
        await rig.idle()

    async def test(rig: Rig) -> None:
        for silent_s, heard, doubtful in ((5.0, False, False), (15.0, False, True), (15.0, True, False)):
            rig.server.answer = lambda body: [None]
            rig.troubles.clear()
            await given_up(rig, silent_s=silent_s, heard=heard)
            assert [trouble.doubt for trouble in rig.troubles] == [True] * doubtful
        assert rig.failure is None

    attached(test)
