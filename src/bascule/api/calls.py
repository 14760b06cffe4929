"""Runs the work of HTTP requests, and ends it when its client goes away or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from starlette.types import Receive

from bascule.api.errors import ClientGone
from bascule.errors import Unavailable

Result = TypeVar("Result")


class Calls:
    """The calls under way in one server."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._stopping = False

    async def run(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Run `work` to its end, or cancel it; either way its clean-up is over when this returns.

        The request's body must have been read. Raises what `work` raises, ClientGone if the client closes the
        connection, and Unavailable once `abort` has been called.
        """
        if self._stopping:
            work.close()
            raise _stopping()
        call = _Call()
        self._calls.add(call)
        watch = asyncio.create_task(_watch(receive, call))
        try:
            await work
        except asyncio.CancelledError:
            if call.why is None:
                raise
            call.task.uncancel()
            raise call.why from None
        finally:
            self._calls.discard(call)
            watch.cancel()

    def abort(self) -> None:
        """End every call now, and refuse those that come."""
        self._stopping = True
        for call in list(self._calls):
            call.end(_stopping())


class _Call:
    """The work of one request, in the task that runs it."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        self.task: asyncio.Task[Any] = task
        self.why: Exception | None = None
        """Why it was ended, if it was."""

    def end(self, why: Exception) -> None:
        if self.why is None:
            self.why = why
            self.task.cancel()


async def together(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results of all `works`, run concurrently; the first failure cancels the others and is raised as it is."""
    works = list(works)
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _watch(receive: Receive, call: _Call) -> None:
    """End a call when its client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.end(ClientGone())


def _stopping() -> Unavailable:
    return Unavailable("The server is stopping; send the request to another one, or again later.", code="stopping")
