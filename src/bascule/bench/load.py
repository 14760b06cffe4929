"""Offers a workload to an OpenAI-compatible server and times every token: closed loop, or arrivals of their own."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from urllib.parse import urlsplit

from msgspec import Struct

from bascule.bench.workloads import Ask, Talk
from bascule.types import Slo

_LIMIT = 1 << 22
_TIMEOUT_S = 300.0
_RAMP_S = 2.0
"""Seconds within which the clients of a closed loop start."""


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

    def goodput(self, slo: Slo) -> float:
        """Requests per second that met all bounds."""
        return sum(record.meets(slo) for record in self.records) / self.wall_s

    @property
    def output_tokens_per_s(self) -> float:
        return sum(record.tokens for record in self.records if not record.error) / self.wall_s

    def good(self) -> list[Record]:
        return [record for record in self.records if not record.error]

    def quantile(self, values: Sequence[float], share: float) -> float:
        """Linear between the nearest ranks; NaN of nothing."""
        if not values:
            return math.nan
        ordered = sorted(values)
        position = (len(ordered) - 1) * share
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    def figures(self) -> dict[str, float]:
        """Percentiles of what was completed."""
        good = self.good()
        ttft, tpot = [record.ttft for record in good], [record.tpot for record in good if record.tokens > 1]
        gaps = [gap for record in good for gap in record.gaps]
        return {
            "ttft_p50": self.quantile(ttft, 0.5),
            "ttft_p99": self.quantile(ttft, 0.99),
            "tpot_mean": statistics.fmean(tpot) if tpot else math.nan,
            "itl_p50": self.quantile(gaps, 0.5),
            "itl_p99": self.quantile(gaps, 0.99),
            "output_tokens_per_s": self.output_tokens_per_s,
            "completed": len(good),
            "rejected": sum(record.rejected for record in self.records),
            "errors": sum(bool(record.error) and not record.rejected for record in self.records),
        }


async def offer(url: str, model: str, asked: Sequence[Talk], concurrency: int | None = None) -> Run:
    """Offer all talks: `concurrency` clients that take the next one when theirs has ended, or each at its own time."""
    begin = time.perf_counter()
    records: list[Record] = []
    if concurrency is not None:
        waiting = iter(asked)

        async def client(number: int) -> None:
            # Not all at once: a crowd at the door says little of the room.
            await asyncio.sleep(_RAMP_S * number / concurrency)
            for talk in waiting:
                records.extend(await _hold(url, model, talk, begin))

        await asyncio.gather(*(client(number) for number in range(concurrency)))
    else:

        async def later(talk: Talk) -> None:
            await asyncio.sleep(max(0.0, begin + (talk.at or 0.0) - time.perf_counter()))
            records.extend(await _hold(url, model, talk, begin))

        await asyncio.gather(*(later(talk) for talk in asked))
    ends = [record.start + record.e2e for record in records if not record.error]
    wall = max(ends, default=time.perf_counter() - begin) - min(record.start for record in records)
    return Run(records=tuple(records), wall_s=max(wall, 1e-9))


async def _hold(url: str, model: str, talk: Talk, begin: float) -> list[Record]:
    """All turns of a talk; a turn that fails ends it."""
    said: list[int] = []
    records = []
    for ask in talk.asks:
        said += ask.prompt
        record, answer = await _one(url, model, said, ask, begin)
        records.append(record)
        if record.error:
            break
        said += answer
    return records


async def _one(url: str, model: str, prompt: list[int], ask: Ask, begin: float) -> tuple[Record, list[int]]:
    target = urlsplit(url)
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": ask.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    answer = _Answer(ask.output)
    start = time.perf_counter()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(target.hostname, target.port, limit=_LIMIT)
            start = time.perf_counter()
            writer.write(head + body)
            while data := await reader.read(1 << 16):
                answer.take(data, time.perf_counter())
            writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        answer.error = answer.error or f"{type(error).__name__}: {error}"
    return answer.record(start, begin), answer.tokens


class _Answer:
    """A streamed answer as it comes in; an arrival with several tokens is one arrival."""

    def __init__(self, wanted: int) -> None:
        self.tokens: list[int] = []
        self.error = ""
        self._wanted = wanted
        self._arrivals: list[float] = []
        self._status = 0
        self._request = ""
        self._cached = 0
        self._done = False
        self._rest = b""

    def take(self, data: bytes, now: float) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        before = len(self.tokens)
        for line in lines:
            if line.startswith(b"data: "):
                self._event(line[6:].strip())
            elif line.startswith(b"HTTP/1.1 "):
                self._status = int(line[9:12])
            elif line[:13].lower() == b"x-request-id:":
                self._request = line[13:].strip().decode()
        if len(self.tokens) > before:
            self._arrivals.append(now)

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"])[:200]
        for choice in event.get("choices", ()):
            self.tokens += choice.get("token_ids") or ()
        if usage := event.get("usage"):
            self._cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def record(self, start: float, begin: float) -> Record:
        rejected = self._status == 429
        if self._status != 200:
            self.error = self.error or f"status {self._status}: {self._rest[:200]!r}"
        elif not self._done or len(self.tokens) != self._wanted:
            self.error = self.error or f"{len(self.tokens)} of {self._wanted} tokens came"
        if not self._arrivals:
            return Record(start=start - begin, error=self.error, rejected=rejected, request=self._request)
        times = self._arrivals
        return Record(
            start=start - begin,
            ttft=times[0] - start,
            e2e=times[-1] - start,
            gaps=tuple(later - earlier for earlier, later in pairwise(times)),
            tokens=len(self.tokens),
            cached=self._cached,
            request=self._request,
            error=self.error,
            rejected=rejected,
        )
