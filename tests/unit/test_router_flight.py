"""A flight's reader gets every token once, in order, and as many at a time as have come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bascule.errors import WorkerFailure
from bascule.policies.retry import Cause
from bascule.router.flight import Flight
from bascule.types import Brought, FinishReason, Request, RequestId, SamplingParams, Tier, WorkerId
from bascule.wire import TokenItem

ID = RequestId("r")


def flight() -> Flight:
    request = Request(id=ID, prompt=(1, 2), sampling=SamplingParams(max_tokens=9), timeout=60.0)
    return Flight(request, 0.0, 60.0, lambda flight: None)


def item(position: int, *, last: bool = False, attempt: int = 0) -> TokenItem:
    return TokenItem(ID, attempt, position, 100 + position, 0, FinishReason.LENGTH if last else None)


def run(test: Callable[[Flight], Coroutine[Any, Any, None]]) -> None:
    async def work() -> None:
        async with asyncio.timeout(20):
            await test(flight())

    asyncio.run(work())


def test_tokens_that_came_together_are_one_delta() -> None:
    async def test(flight: Flight) -> None:
        for position in range(3):
            flight.take(item(position))
        await flight.first()
        assert (await anext(flight)).tokens == (100, 101, 102)
        flight.take(item(3, last=True))
        delta = await anext(flight)
        assert (delta.tokens, delta.finish) == ((103,), FinishReason.LENGTH)
        with pytest.raises(StopAsyncIteration):
            await anext(flight)

    run(test)


def test_a_reader_waits_for_the_next_token() -> None:
    async def test(flight: Flight) -> None:
        reader = asyncio.create_task(anext(flight))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert not reader.done()
        flight.take(item(0))
        flight.take(item(1))
        assert (await reader).tokens == (100, 101)

    run(test)


def test_a_gap_is_held_and_repeats_and_other_attempts_are_dropped() -> None:
    async def test(flight: Flight) -> None:
        assert not flight.take(item(1))
        assert not flight.take(item(0, attempt=1))
        assert flight.take(item(0))
        assert not flight.take(item(0))
        assert not flight.take(item(1))
        assert (await anext(flight)).tokens == (100, 101)

    run(test)


def test_nothing_is_taken_behind_the_last_token() -> None:
    async def test(flight: Flight) -> None:
        flight.take(item(2))
        flight.take(item(1, last=True))
        flight.take(item(0))
        assert flight.tokens == [100, 101]
        assert (await anext(flight)).tokens == (100, 101)

    run(test)


def test_a_failure_comes_behind_the_tokens_already_taken() -> None:
    async def test(flight: Flight) -> None:
        flight.take(item(0))
        flight.fail(WorkerFailure("died"))
        await flight.first()
        assert (await anext(flight)).tokens == (100,)
        with pytest.raises(WorkerFailure, match="died"):
            await anext(flight)

    run(test)


def test_a_failure_without_a_token_is_raised_at_once() -> None:
    async def test(flight: Flight) -> None:
        asyncio.get_running_loop().call_soon(flight.fail, WorkerFailure("died"))
        with pytest.raises(WorkerFailure):
            await flight.first()

    run(test)


def test_cancelling_wakes_the_reader_and_ends_the_output() -> None:
    async def test(flight: Flight) -> None:
        asyncio.get_running_loop().call_soon(flight.cancel)
        with pytest.raises(StopAsyncIteration):
            await anext(flight)

    run(test)


def test_what_an_attempt_loaded_that_brought_no_token_does_not_count() -> None:
    async def test(flight: Flight) -> None:
        flight.kv.brought = Brought({Tier.HOST: 160}, 0.5)
        flight.retry(Cause.FAILED, WorkerId("a"))
        assert flight.kv.brought == Brought()
        flight.kv.brought = Brought({Tier.DISK: 16})
        flight.take(item(0, attempt=1))
        flight.retry(Cause.LOST, WorkerId("b"))
        assert flight.kv.brought == Brought({Tier.DISK: 16}), "with its first token, this is what the client is told"

    run(test)
