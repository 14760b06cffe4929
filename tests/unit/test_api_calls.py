"""The work of a request ends with its client, with its server, or by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bascule.api.calls import Calls
from bascule.api.errors import ClientGone
from bascule.errors import Unavailable

Message = dict[str, Any]


class Client:
    """A client that stays until `gone` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def run(test: Callable[[Calls, Client], Coroutine[Any, Any, None]]) -> None:
    async def work() -> None:
        async with asyncio.timeout(20):
            await test(Calls(), Client())

    asyncio.run(work())


class Work:
    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cleaned_up = False

    async def __call__(self) -> None:
        try:
            self.started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.cleaned_up = True


def test_a_client_that_goes_ends_the_work_and_its_clean_up_is_over() -> None:
    async def test(calls: Calls, client: Client) -> None:
        work = Work()
        asyncio.get_running_loop().call_later(0.01, client.gone.set)
        with pytest.raises(ClientGone):
            await calls.run(work(), client.receive)
        assert work.cleaned_up
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        await asyncio.sleep(0)

    run(test)


def test_work_that_ends_leaves_nothing_that_watches() -> None:
    async def test(calls: Calls, client: Client) -> None:
        async def work() -> None:
            await asyncio.sleep(0)

        await calls.run(work(), client.receive)
        client.gone.set()
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(test)


def test_a_stop_ends_calls_under_way_and_refuses_new_ones() -> None:
    async def test(calls: Calls, client: Client) -> None:
        work = Work()
        asyncio.get_running_loop().call_later(0.01, calls.abort)
        with pytest.raises(Unavailable):
            await calls.run(work(), client.receive)
        assert work.cleaned_up
        with pytest.raises(Unavailable):
            await calls.run(Work()(), client.receive)

    run(test)


def test_a_cancellation_from_outside_stays_one() -> None:
    async def test(calls: Calls, client: Client) -> None:
        work = Work()
        task = asyncio.create_task(calls.run(work(), client.receive))
        await work.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.cleaned_up

    run(test)


def test_a_failure_of_the_work_is_raised_as_it_is() -> None:
    async def test(calls: Calls, client: Client) -> None:
        async def work() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await calls.run(work(), client.receive)

    run(test)
