"""A request that cannot be placed must not stand in the way of those behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.unit.test_router_service import Bench, RecordingClient, collect, item, offer, scenario, settle

from bascule.errors import WorkerFailure
from bascule.types import FinishReason, Role


@scenario
async def test_a_request_that_cannot_be_placed_ends_and_those_behind_it_go_on() -> None:
    bench = Bench({"m": Role.MIXED}, policy="adaptive")
    policy = bench.service._policy

    def poisoned(snapshot: Any, query: Any) -> Any:
        if query.request == "bad":
            raise ZeroDivisionError("an odd bound")
        return policy(snapshot, query)

    bench.service._policy = poisoned
    bad, good = bench.start("bad"), bench.start("good")
    await settle()
    with pytest.raises(WorkerFailure, match="could not be placed"):
        await bad
    bench.tokens("m", item(0, 7, name="good", finish=FinishReason.LENGTH))
    assert await collect(await good) == [7]
    assert bench.service.active == 0


@scenario
async def test_what_no_worker_that_is_left_can_hold_ends_and_does_not_block_the_line() -> None:
    bench = Bench({"large": Role.MIXED}, policy="adaptive")
    message = offer("small", Role.MIXED, kv_blocks=2)
    bench.clients["small"] = RecordingClient()
    big = bench.start("big", tokens=200)
    await settle()
    bench.service.joined(bench.service.view.add(message, 0.0), bench.clients["small"])
    bench.lose("large")
    little = bench.start("little", tokens=4)
    await settle()
    bench.service.tick()
    with pytest.raises(WorkerFailure, match="KV memory"):
        await big
    await settle()
    assert [one.request for one in bench.clients["small"].submitted] == ["little"]
    little.cancel()
    await asyncio.gather(little, return_exceptions=True)
