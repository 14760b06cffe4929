"""Requests on their way to the engine: first they get what peers and the store have of their prompts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from bascule.engine.core import Engine, StepResult, Work
from bascule.engine.sequence import Key
from bascule.errors import RequestError
from bascule.types import Brought
from bascule.wire import FetchFrom, Submit
from bascule.worker.fetch import Fetches
from bascule.worker.prefill_side import PrefillSide
from bascule.worker.store_side import StoreSide

log = logging.getLogger(__name__)


class Arrivals:
    """Runs in the asyncio loop."""

    def __init__(
        self,
        engine: Engine,
        prefill: PrefillSide,
        fetches: Fetches,
        store: StoreSide | None,
        *,
        brought: Callable[[Key, Brought], None],
        failed: Callable[[Key, str, bool], None],
        task_ended: Callable[[asyncio.Task[Any]], None],
        wake: Callable[[], None],
    ) -> None:
        """`brought` is told what came of a prompt, `failed` of a request that the engine does not take (and whether
        another worker may); `task_ended` sees each task's end; `wake` is called when a sequence may run."""
        self.received = 0
        """Submissions since the router took this worker in."""
        self._engine = engine
        self._prefill = prefill
        self._fetches = fetches
        self._store = store
        self._brought = brought
        self._failed = failed
        self._task_ended = task_ended
        self._wake = wake
        self._closed = False
        self._coming: set[Key] = set()
        """Requests that the engine does not have yet."""
        self._fetching: dict[Key, asyncio.Task[None]] = {}
        """Requests that wait for what is fetched for them."""
        self._fetched: dict[Key, Brought] = {}
        """Of requests that have no token yet."""
        self._loaded: dict[Key, Brought] = {}
        """Of these, too."""
        self.hit_tokens = self.computed_tokens = 0
        """Prompt tokens that steps have found, and computed."""

    @property
    def waiting(self) -> int:
        """Prompts that the engine does not have yet."""
        return self._fetches.waiting + (self._store.waiting if self._store is not None else 0)

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are not cached on the device."""
        return self._fetches.waiting_tokens + (self._store.waiting_tokens if self._store is not None else 0)

    def submit(self, submission: Submit) -> None:
        """A request from the router; after `close`, one that it will place again. An attempt that is here is not begun
        a second time."""
        if self._closed:
            return
        self.received += 1
        key = Key(submission.request, submission.attempt)
        if key in self._coming or self._engine.has(*key):
            log.warning("request %s, attempt %d came twice", submission.request, submission.attempt)
            return
        self._coming.add(key)
        if submission.fetch is None:
            self._load(submission)
            return
        task = self._fetching[key] = asyncio.create_task(self._fetch(key, submission, submission.fetch))
        task.add_done_callback(self._task_ended)

    @property
    def keys(self) -> set[Key]:
        """Of all requests that have come and not ended."""
        return self._coming.union(self._engine.keys())

    def loaded(self, key: Key, brought: Brought) -> None:
        """All of the store's that a request has found so far."""
        self._loaded[key] = brought
        self._tell(key)

    def cancel(self, key: Key) -> None:
        """The request is no longer wanted here; does nothing for others."""
        self._computed(key)
        self._coming.discard(key)
        if (fetching := self._fetching.pop(key, None)) is not None:
            fetching.cancel()
        if self._store is not None:
            self._store.cancel(key)

    def close(self) -> None:
        """Nothing goes to the engine any more, nor to what a handoff or a load needs: all of it is about to end."""
        self._closed = True
        for task in self._fetching.values():
            task.cancel()

    def stepped(self, result: StepResult) -> None:
        """The engine has made a step, whose tokens are not sent yet."""
        self.computed_tokens += result.computed_tokens
        for found in result.found:
            self.hit_tokens += found.tokens
            places = self._fetches.found(found)
            if self._store is not None:
                self._store.came_otherwise(Key(found.request, found.attempt), places)
        if self._store is not None:
            self._store.stepped(result)
        for output in result.outputs:
            self._computed(Key(output.request, output.attempt), late=True)

    def _computed(self, key: Key, *, late: bool = False) -> None:
        """What is still on its way for this request is of no use any more; `late`: because it has a token."""
        self._fetched.pop(key, None)
        self._loaded.pop(key, None)
        self._fetches.give_up(key, late=late)

    async def _fetch(self, key: Key, submission: Submit, source: FetchFrom) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await self._fetches.bring(submission, source, partial(self._came, key))
        self._came(key, Brought(seconds=loop.time() - begun))
        del self._fetching[key]
        self._load(submission)

    def _came(self, key: Key, brought: Brought) -> None:
        self._fetched[key] = brought
        self._tell(key)

    def _tell(self, key: Key) -> None:
        self._brought(key, self._fetched.get(key, Brought()) + self._loaded.get(key, Brought()))

    def _load(self, submission: Submit) -> None:
        if self._store is None:
            self._begin(submission)
        else:
            self._store.start(submission, self._begin).add_done_callback(self._task_ended)

    def _begin(self, submission: Submit) -> None:
        if self._closed:
            return
        key = Key(submission.request, submission.attempt)
        if submission.decode is not None:
            # Before the engine has it: a step of another thread may be done with it at once.
            self._prefill.begin(submission, submission.decode)
        try:
            self._engine.submit(
                Work(
                    request=submission.request,
                    attempt=submission.attempt,
                    prompt=submission.prompt,
                    generated=submission.generated,
                    sampling=submission.sampling,
                    handoff=submission.decode is not None,
                    slo=submission.slo,
                    salt=submission.salt,
                    priority=submission.priority,
                )
            )
        except RequestError as error:
            self._prefill.cancel(key)
            self._failed(key, str(error), False)
        except Exception as error:
            log.exception("a request could not be submitted")
            self._prefill.cancel(key)
            self._failed(key, f"{type(error).__name__}: {error}", True)
        self._coming.discard(key)
        self._wake()
