"""The `WorkerClient` of an attached server: each submission is one HTTP stream, in a task of its own."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import httpx
from msgspec import Struct

from bascule.router.attached.exchange import Chunk, Trouble, completion_body, converse, trouble_of
from bascule.router.attached.output import Output, ends_of
from bascule.router.refusals import NOT_KEPT_APART
from bascule.types import Epoch, RequestId, WorkerId
from bascule.wire import Failed, StepTokens, Submit, TokenItem, WorkerMessage

Key = tuple[RequestId, int]

_SILENT_S = 30.0
"""A stream that is given up, when none of this server's has brought anything for so long, makes it doubtful: it may
hang, though it answers heartbeats."""


class Served(Struct, frozen=True, kw_only=True):
    """What a server has shown to serve: its own name for the model, and the longest prompt plus output (tokens)."""

    model: str
    context: int
    vocab: int
    eos: frozenset[int]
    keeps_apart: bool = True
    """It looks at `cache_salt`: what it has cached for one tenant, no other finds."""


class AttachedClient:
    """Turns submissions into completions of one server, and its chunks into the messages that workers send."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        served: Served,
        worker: WorkerId,
        epoch: Epoch,
        deliver: Callable[[WorkerMessage], None],
        on_trouble: Callable[[Trouble], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_trouble` hears of what went wrong before the request's failure is delivered; `now` is in seconds."""
        self._http = http
        self._served = served
        self._worker = worker
        self._epoch = epoch
        self._deliver = deliver
        self._on_trouble = on_trouble
        self._now = now
        self._heard_at = -math.inf
        """When a chunk came last."""
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._begun: dict[Key, float] = {}

    @property
    def running(self) -> int:
        return len(self._tasks)

    def submit(self, submission: Submit) -> None:
        key = (submission.request, submission.attempt)
        self._begun[key] = self._now()
        task = self._tasks[key] = asyncio.get_running_loop().create_task(self._run(submission))
        task.add_done_callback(lambda _: self._ended(key))

    def cancel(self, request: RequestId, attempt: int) -> None:
        """Closes the stream, by which the server knows."""
        key = (request, attempt)
        if (task := self._tasks.get(key)) is None:
            return
        if self._now() - max(self._heard_at, self._begun[key]) > _SILENT_S:
            self._on_trouble(Trouble(f"has sent nothing of any output for {_SILENT_S:g} s", doubt=True))
        task.cancel()

    def stop(self) -> None:
        """End all streams; the server itself is not ours to stop."""
        for task in list(self._tasks.values()):
            task.cancel()

    def _ended(self, key: Key) -> None:
        del self._tasks[key], self._begun[key]

    async def _run(self, submission: Submit) -> None:
        try:
            await self._stream(submission)
        except Exception as error:
            self._fail(submission, trouble_of(error))

    async def _stream(self, submission: Submit) -> None:
        sampling, drawn = submission.sampling, len(submission.generated)
        if submission.salt and not self._served.keeps_apart:
            raise Trouble(NOT_KEPT_APART, unfit="cache_salt")
        ends = ends_of(sampling, self._served.eos)
        output = Output(submission, self._served.vocab, ends)
        prompt = [*submission.prompt, *submission.generated]
        _refuse_what_cannot_be_continued(submission)

        def on_chunk(chunk: Chunk) -> bool:
            self._heard_at = self._now()
            if items := output.take(chunk):
                self._tell(items)
            return False

        name = f"{submission.request}.{submission.attempt}" if submission.attempt else submission.request
        body = completion_body(self._served.model, prompt, sampling, drawn, ends, submission.salt)
        await converse(self._http, body, name, on_chunk, submission.timeout_s)
        self._tell([output.end()])

    def _tell(self, items: Sequence[TokenItem]) -> None:
        self._deliver(StepTokens(self._worker, self._epoch, tuple(items)))

    def _fail(self, submission: Submit, trouble: Trouble) -> None:
        self._on_trouble(trouble)
        self._deliver(
            Failed(
                worker=self._worker,
                epoch=self._epoch,
                request=submission.request,
                attempt=submission.attempt,
                message=f"server {self._worker} {trouble.message}",
                retryable=trouble.retryable,
                unfit=trouble.unfit,
            )
        )


def _refuse_what_cannot_be_continued(submission: Submit) -> None:
    """The last line of defence: the router does not place such requests here (`Flight.portable`)."""
    sampling = submission.sampling
    penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    if submission.generated and (sampling.temperature > 0 or penalised):
        raise Trouble("cannot go on exactly with an output that was sampled or penalised elsewhere")
