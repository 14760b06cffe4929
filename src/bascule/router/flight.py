"""One request on its way: which attempt counts, which token is next, and what the client is still to get."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from msgspec.structs import replace

from bascule.errors import InvalidRequest, RequestError
from bascule.observe.decisions import Record
from bascule.policies.retry import Cause
from bascule.policies.snapshot import Prediction
from bascule.router.provenance import Provenance
from bascule.types import BlockHash, Delta, FinishReason, Placement, Request, WorkerId
from bascule.wire import Failed, Submit, TokenItem


class Flight:
    """A request from admission to its last token; the `Generation` that the api iterates.

    Only the current attempt's next position is taken: gaps are held, repeats and other attempts' tokens dropped. A
    position that has been taken is final.
    """

    weights = ""
    """Fingerprint of those that its tokens are from, and its hashes for; empty where no worker of our own was there."""
    unnamed: dict[WorkerId, int]
    """Workers that do not say that they have the current attempt, and how many heartbeats they had sent at first."""

    def __init__(self, request: Request, received: float, deadline: float, on_cancel: Callable[[Flight], None]) -> None:
        self.request = request
        self.received = received
        self.deadline = deadline
        self.attempt = self.failures = self.losses = 0
        """Attempts given up so far; those of them that workers failed; those that ended with a worker or a message."""
        self.excluded: frozenset[WorkerId] = frozenset()
        self.unfit: dict[WorkerId, InvalidRequest] = {}
        """Workers that could never take it, as they have said, and what to tell its client if there are no others."""
        self.tokens: list[int] = []
        """Output tokens taken so far, over all attempts."""
        self.placed: Placement | None = None
        """Where the current attempt runs; None while it waits at the router."""
        self.uncached = 0
        """Tokens that the current attempt had to compute when it was placed."""
        self.context = 0.0
        """Tokens of context that it counts for where it decodes."""
        self.hashes: tuple[BlockHash, ...] = ()
        """Of the full blocks of what it has to compute; the last known token is not among them."""
        self.placed_at, self.expected = 0.0, Prediction()
        """When the current attempt was placed, and what it was predicted to take."""
        self.prefilling = False
        """Placed, and no token of this attempt has come."""
        self.first_leg = False
        """It runs on the prefill worker for one token, and goes to the decode worker by way of the store."""
        self.handed_over = False
        """The decode worker of this attempt has sent a token: the prefill worker is no longer needed."""
        self.let_in = self.ended = False
        """It is not turned away any more; it is over."""
        self.finish: FinishReason | None = None
        """How the output ended, if it did; a cancelled one may have been complete to its reader."""
        self.first_at = self.latest_at = math.inf
        """When the first token came, and the last one."""
        self.longest_gap_s = 0.0
        """Between two steps that brought tokens."""
        self.record: Record | None = None
        """The open decision record."""
        self.prompt_blocks = 0
        """Of `hashes`, those of the prompt."""
        self._route: Placement | None = None
        self._lender: WorkerId | None = None
        self._on_cancel = on_cancel
        self._held: dict[int, TokenItem] = {}
        self._gap_since: float | None = None
        self.kv = Provenance()
        self._fresh: list[TokenItem] = []
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def placement(self) -> Placement:
        """Where the request was (last) placed."""
        if self._route is None:
            raise RuntimeError(f"request {self.request.id} has not been placed")
        return self._route

    @property
    def known_tokens(self) -> int:
        """Tokens that a worker has to compute before it can draw the next one."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def portable(self) -> bool:
        """Whether any engine may go on with it exactly, knowing no more than the tokens.

        Not once a sampled output has begun (the random stream is our engine's own), nor one with penalties that count
        the output: to another engine, what is out already is prompt.
        """
        sampling = self.request.sampling
        return not self.tokens or (
            sampling.temperature == 0 and sampling.presence_penalty == 0 and sampling.frequency_penalty == 0
        )

    @property
    def drawn_at_random(self) -> bool:
        """Whether its client has tokens that only the engine that drew them could go on from, as the seed wants it."""
        return bool(self.tokens) and self.request.sampling.temperature > 0

    def place(self, placement: Placement, uncached: int, context: float, lender: WorkerId | None = None) -> None:
        """A placement has been chosen for the current attempt, with `uncached` tokens to compute there."""
        self.placed = self._route = placement
        self._lender = lender
        self.uncached = uncached
        self.context = context
        self.prefilling = True
        self.handed_over = self.first_leg = False
        self.unnamed = {}

    def submission(self, now: float) -> Submit:
        """The current attempt, for a worker that is to go on behind the tokens that are there."""
        return Submit(
            request=self.request.id,
            attempt=self.attempt,
            prompt=self.request.prompt,
            generated=tuple(self.tokens),
            sampling=self.request.sampling,
            slo=self.request.slo,
            timeout_s=self.deadline - now,
            salt=self.request.salt,
            priority=self.request.priority,
        )

    def gap_outlasts(self, now: float, seconds: float) -> bool:
        """Whether later tokens have waited that long for one that is missing. Called now and then."""
        if not self._held:
            self._gap_since = None
        elif self._gap_since is None:
            self._gap_since = now
        return self._gap_since is not None and now - self._gap_since > seconds

    def needs(self, worker: WorkerId) -> bool:
        """Whether the current attempt cannot go on without that worker."""
        return worker in self.needed()

    def needed(self) -> set[WorkerId]:
        """The workers without which the current attempt cannot go on."""
        if self.placed is None:
            return set()
        return {self.placed.decode} if self.handed_over else {self.placed.prefill, self.placed.decode}

    def uses(self) -> set[WorkerId]:
        """The workers that the current attempt uses: those that it needs, and a peer that lends while it prefills."""
        workers = self.needed()
        if self.prefilling and self._lender is not None:
            workers.add(self._lender)
        return workers

    def refused(self, message: Failed) -> Cause:
        """For which cause it is placed again, now that a worker has given the current attempt up."""
        if not message.unfit:
            return Cause.FAILED
        self.unfit[message.worker] = InvalidRequest(message.message, param=message.unfit)
        return Cause.MOVED

    def retry(self, cause: Cause, failed: WorkerId | None = None) -> None:
        """Give the attempt up; the next one continues after the tokens taken so far, not on the worker that failed."""
        self.attempt += 1
        self.failures += cause is Cause.FAILED
        self.losses += cause in (Cause.LOST, Cause.UNHEARD)
        if failed is not None:
            self.excluded |= {failed}
        self._held.clear()
        self.kv.given_up()

    def take(self, item: TokenItem) -> bool:
        """Take a token if it belongs to this attempt and its output; returns whether the output has grown."""
        if self.ended or item.attempt != self.attempt:
            return False
        if not len(self.tokens) <= item.position < self.request.sampling.max_tokens:
            return False
        if item.position > len(self.tokens):
            self._held[item.position] = item
            return False
        self._append(item)
        while self._held and not self.ended and (held := self._held.pop(len(self.tokens), None)) is not None:
            self._append(held)
        self._wake()
        return True

    def fail(self, error: RequestError) -> None:
        """End with an error; tokens already taken are delivered first."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._wake()

    def cancel(self, finish: FinishReason | None = None) -> None:
        if not self.ended:
            self.finish, self.ended = finish, True
            self._on_cancel(self)
            self._wake()

    async def first(self) -> None:
        """Return when a delta can be read; raises the request's error if it ends without one. Who stops waiting for
        that cancels the request."""
        try:
            await self._news()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._error is not None and not self._fresh:
            raise self._error

    def __aiter__(self) -> Flight:
        """Itself: a generator that is left before its end would cost a task to close it."""
        return self

    async def __anext__(self) -> Delta:
        """All tokens that have come since the last call, as soon as there are any."""
        await self._news()
        if self._fresh:
            items, self._fresh = self._fresh, []
            return self._delta(items)
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def _append(self, item: TokenItem) -> None:
        self.kv.drew(len(self.request.prompt), item.cached_tokens)
        cut = self.first_leg and item.finish is FinishReason.LENGTH
        if cut and item.position + 1 < self.request.sampling.max_tokens:
            item = replace(item, finish=None)  # the end of a leg, not of the output
        self.tokens.append(item.token)
        self._fresh.append(item)
        if item.finish is not None:
            self.finish, self.ended = item.finish, True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _news(self) -> None:
        """Return when there are tokens to read, or none will come. One task at a time reads a flight."""
        if not self._fresh and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _delta(self, items: list[TokenItem]) -> Delta:
        logprobs = None
        if self.request.sampling.logprobs is not None:
            logprobs = tuple(item.logprobs for item in items if item.logprobs is not None)
        return Delta(
            tokens=tuple([item.token for item in items]),
            logprobs=logprobs,
            finish=items[-1].finish,
            cached_tokens=self.kv.cached_tokens or 0,
            brought=self.kv.brought,
            handoff=self.kv.handoff,
        )
