"""Offers requests to an OpenAI-compatible server and times every token: closed loop, or arrivals of their own.

In an open loop a request counts from the moment at which it was to be sent, not from when the client got round to it,
so that a slow server (or client) cannot slow down what it is measured with. How late the client was is told apart.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from msgspec import Struct
from msgspec.structs import replace

from bascule.bench.answers import Answer, BadAnswer, Counting
from bascule.bench.endpoint import Endpoint, Prompt, read_answer
from bascule.bench.quantiles import quantile
from bascule.traffic.workloads import Ask, Talk
from bascule.types import Slo

_TIMEOUT_S = 300.0
RAMP_S = 2.0
"""Seconds within which the clients of a closed loop start."""
_READY_S = 2.0
"""So long before its time a request of an open loop is made up."""
_CONNECT_S = 0.25
"""So long before its time its connection is opened."""
_PULSE_S = 0.02


class Record(Struct, frozen=True, kw_only=True):
    """What became of one request. Times in seconds from `start`, which counts from the run's."""

    start: float
    ttft: float = math.inf
    e2e: float = math.inf
    gaps: tuple[float, ...] = ()
    """Between successive arrivals of tokens."""
    tokens: int = 0
    cached: int = 0
    request: str = ""
    """Its X-Request-Id."""
    error: str = ""
    rejected: bool = False
    retry_after: float = math.nan
    """Seconds, as a refusal says."""
    answered: float = math.inf
    """When the answer had ended, a refusal's too."""
    asked: int = 0
    """Output tokens wanted."""
    sent_tokens: int = 0
    """Of the prompt."""
    prompt_tokens: int = 0
    """Of the prompt as the server counts it; 0 where it does not say."""
    counted_by: Counting = Counting.CHUNKS
    late: float = 0.0
    """Sent so long after its time, in an open loop; part of `ttft`."""
    place: tuple[int, int] = (0, 0)
    """Which of the run's talks, and which turn of it: the same for the same request on another server."""

    @property
    def tpot(self) -> float:
        """Mean time between tokens; 0 for a single one."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def gap(self) -> float:
        return max(self.gaps, default=0.0)

    def meets(self, slo: Slo) -> bool:
        """All three bounds; what failed or was rejected meets none."""
        return not self.error and self.ttft <= slo.ttft_s and self.tpot <= slo.tpot_s and self.gap <= slo.gap_s


class Run(Struct, frozen=True, kw_only=True):
    """One workload offered once."""

    records: tuple[Record, ...]
    wall_s: float
    unfinished: int = 0
    """Requests that were under way when the run was stopped; they count nowhere."""
    lags: tuple[float, ...] = ()
    """Seconds by which the client's own pulse came late, each 20 ms: how busy it was."""
    cpu_s: float = 0.0
    """Of the client's process."""

    def goodput(self, slo: Slo) -> float:
        """Requests per second that met all bounds."""
        return sum(record.meets(slo) for record in self.records) / self.wall_s

    @property
    def output_tokens_per_s(self) -> float:
        return sum(record.tokens for record in self.records if not record.error) / self.wall_s

    def good(self) -> list[Record]:
        return [record for record in self.records if not record.error]

    def quantile(self, values: Sequence[float], share: float) -> float:
        return quantile(values, share)

    def figures(self) -> dict[str, float]:
        """Percentiles of what was completed."""
        good = self.good()
        ttft, tpot = [record.ttft for record in good], [record.tpot for record in good if record.tokens > 1]
        gaps = [gap for record in good for gap in record.gaps]
        return {
            "ttft_p50": quantile(ttft, 0.5),
            "ttft_p99": quantile(ttft, 0.99),
            "tpot_mean": statistics.fmean(tpot) if tpot else math.nan,
            "itl_p50": quantile(gaps, 0.5),
            "itl_p99": quantile(gaps, 0.99),
            "output_tokens_per_s": self.output_tokens_per_s,
            "completed": len(good),
            "rejected": sum(record.rejected for record in self.records),
            "errors": sum(bool(record.error) and not record.rejected for record in self.records),
        }


class Watch:
    """Hears of each request of a run while it goes on; this one does nothing with it."""

    def sent(self) -> None:
        """A request has gone out."""

    def ended(self, record: Record) -> None:
        """What became of it."""


async def offer(url: str, model: str, asked: Iterable[Talk], concurrency: int | None = None) -> Run:
    """Offer all talks to a server that understands all that ours does; `Offer` has the rest."""
    return await Offer(Endpoint(url=url, model=model), concurrency=concurrency).run(asked)


@dataclass
class Offer:
    """How talks are offered: each at its time, or by `concurrency` clients that take the next when theirs has ended."""

    endpoint: Endpoint
    concurrency: int | None = None
    timeout_s: float = _TIMEOUT_S
    """For each request."""
    duration_s: float = math.inf
    """After which no talk begins."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Ends the run at once; what was measured until then stays."""
    watch: Watch = field(default_factory=Watch)

    async def run(self, asked: Iterable[Talk]) -> Run:
        """All talks, or as many as the time allows; an open loop takes them from `asked` as their times come."""
        # Requests at time 0 of an open loop are to be made ready before it too.
        self._begin = time.perf_counter() + (2 * _CONNECT_S if self.concurrency is None else 0.0)
        self._records: list[Record] = []
        self._under_way = 0
        coming = enumerate(asked)
        cpu = time.process_time()
        lags: list[float] = []
        pulse = asyncio.create_task(_pulse(lags))
        work = asyncio.create_task(self._open(coming) if self.concurrency is None else self._closed(coming))
        stopped = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            unfinished = self._under_way
        finally:
            for task in (work, stopped, pulse):
                task.cancel()
            await asyncio.gather(work, stopped, pulse, return_exceptions=True)
        records = tuple(self._records)
        ends = [record.start + record.e2e for record in records if not record.error]
        first = min((record.start for record in records), default=0.0)
        wall = max(ends, default=time.perf_counter() - self._begin) - first
        return Run(
            records=records,
            wall_s=max(wall, 1e-9),
            unfinished=unfinished,
            lags=tuple(lags),
            cpu_s=time.process_time() - cpu,
        )

    async def _closed(self, waiting: Iterator[tuple[int, Talk]]) -> None:
        assert self.concurrency is not None

        async def client(number: int, of: int) -> None:
            # Not all at once: a crowd at the door says little of the room.
            await asyncio.sleep(min(RAMP_S, self.duration_s) * number / of)
            for place, talk in waiting:
                if time.perf_counter() - self._begin >= self.duration_s:
                    return
                await self._hold(place, talk, None)

        async with asyncio.TaskGroup() as clients:
            for number in range(self.concurrency):
                clients.create_task(client(number, self.concurrency))

    async def _open(self, coming: Iterator[tuple[int, Talk]]) -> None:
        async with asyncio.TaskGroup() as talks:
            for place, talk in coming:
                at = talk.at or 0.0
                if at >= self.duration_s:
                    break
                await _until(self._begin + at - _READY_S)
                talks.create_task(self._hold(place, talk, self._begin + at))

    async def _hold(self, place: int, talk: Talk, due: float | None) -> None:
        """All turns of a talk; a turn that fails ends it."""
        said = Prompt()
        for turn, ask in enumerate(talk.asks):
            said = said.asked(ask.prompt)
            record, answer = await self._one(said, ask, due)
            record = replace(record, place=(place, turn))
            self._records.append(record)
            self.watch.ended(record)
            if record.error:
                break
            said, due = said.answered(answer), None

    async def _one(self, prompt: Prompt, ask: Ask, due: float | None) -> tuple[Record, Answer]:
        request = self.endpoint.request(prompt, ask.output)
        answer = Answer()
        error, late = "", 0.0
        writer: asyncio.StreamWriter | None = None
        start = due if due is not None else time.perf_counter()
        try:
            if due is not None:
                await _until(due - _CONNECT_S)
            async with asyncio.timeout(self.timeout_s + max(0.0, start - time.perf_counter())):
                self._under_way += 1
                reader, writer = await self.endpoint.connect()
                if due is not None:
                    await _until(due)
                    late = max(0.0, time.perf_counter() - due)  # the loop wakes a little early
                else:
                    start = time.perf_counter()
                self.watch.sent()
                writer.write(request)
                await read_answer(reader, answer)
            self._check_length(answer, ask)
        except TimeoutError:
            error = f"no end within {self.timeout_s:g} s"
        except (OSError, BadAnswer) as failure:
            error = str(failure) if isinstance(failure, BadAnswer) else f"{type(failure).__name__}: {failure}"
        finally:
            if writer is not None:
                writer.close()
        self._under_way -= 1
        times = answer.arrivals
        record = Record(
            start=start - self._begin,
            ttft=times[0] - start if times else math.inf,
            e2e=times[-1] - start if times else math.inf,
            gaps=answer.gaps,
            tokens=answer.count,
            cached=answer.cached,
            request=answer.request,
            error=error,
            rejected=answer.status == HTTPStatus.TOO_MANY_REQUESTS,
            retry_after=answer.retry_after,
            answered=time.perf_counter() - start,
            asked=ask.output,
            sent_tokens=len(prompt.ids),
            prompt_tokens=answer.prompt_tokens,
            counted_by=answer.counted_by,
            late=late,
        )
        return record, answer

    def _check_length(self, answer: Answer, ask: Ask) -> None:
        """Raises BadAnswer for an output that is not as long as asked, unless the model itself may have ended it."""
        ended = answer.finish == "stop" and answer.count < ask.output and not self.endpoint.exact_lengths
        known = self.endpoint.exact_lengths or answer.counted_by is not Counting.CHUNKS
        if known and not ended and answer.count != ask.output:
            raise BadAnswer(
                f"{answer.count} of {ask.output} tokens came (finish reason {answer.finish or 'none'}); do prompt and "
                "output fit into the model's context?"
            )


async def _until(moment: float) -> None:
    """Return at that moment of `time.perf_counter`, or at once if it has passed."""
    if (left := moment - time.perf_counter()) > 0:
        await asyncio.sleep(left)


async def _pulse(lags: list[float]) -> None:
    """Note by how much each of short sleeps was too long, until cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_PULSE_S)
        lags.append(max(0.0, time.perf_counter() - before - _PULSE_S))
