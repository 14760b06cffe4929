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
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Run `work` to its end, or cancel it; either way its clean-up is over when this returns.

        The request's body must have been read. Raises what `work` raises, ClientGone if the client closes the
        connection, and Unavailable once `abort` has been called.
        """
        if self._stopping:
            work.close()
            raise _stopping()
        task = asyncio.create_task(work)
        watch = asyncio.create_task(_closed(receive))
        self._tasks.add(task)
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            if task.cancelled():
                raise _stopping()
            task.result()
        finally:
            self._tasks.discard(task)
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    def abort(self) -> None:
        """End every call now, and refuse those that come."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()


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


async def _closed(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _stopping() -> Unavailable:
    return Unavailable("The server is stopping; send the request to another one, or again later.", code="stopping")
