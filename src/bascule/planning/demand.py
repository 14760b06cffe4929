"""What is asked of a plan: traffic as it comes, in seeded samples, and the same with longer prompts or more reuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace as with_fields
from functools import cached_property
from itertools import accumulate, count, islice
from pathlib import Path
from random import Random

from msgspec import Struct
from msgspec.structs import replace

from bascule.errors import ConfigError
from bascule.sim.offered import trace_talks
from bascule.traffic.profile import reused_blocks
from bascule.traffic.synthetic import Synthetic, read_generator
from bascule.traffic.traces import TraceRequest, read_trace, repeated, scaled, turned
from bascule.traffic.workloads import VOCABULARY, WORKLOADS, Kind, Span, Talk, talks

_SAMPLE = 256
"""Requests that averages are of."""
_BLOCK_TOKENS = 16
_MOST_SHARED = 0.9
"""Of a prompt: something is always new."""


class Row(Struct, frozen=True):
    """One request, in tokens."""

    prompt: int
    output: int
    cached: float
    """Of the prompt, in an earlier one: what a cache without end would have."""


class Demand(Struct, frozen=True, kw_only=True, dict=True):
    """Traffic; exactly one of `kinds`, `trace` and `generator` is there, and one of `rate` and `clients`."""

    name: str
    kinds: tuple[Kind, ...] = ()
    trace: tuple[TraceRequest, ...] = ()
    generator: Synthetic | None = None
    rate: float | None = None
    """Requests/s."""
    clients: int | None = None
    """Of a closed loop."""

    @property
    def level(self) -> float:
        """Clients, or requests/s."""
        return float(self.clients if self.clients is not None else self.rate or 0.0)

    @property
    def level_told(self) -> str:
        if self.clients is not None:
            return f"{self.clients} client{'s' * (self.clients != 1)}"
        return f"{self.level:.3g} requests/s"

    def at(self, level: float) -> Demand:
        """The same by so many clients, or at such a rate."""
        if self.clients is not None:
            return replace(self, clients=max(1, round(level)))
        return replace(self, rate=level)

    def open_at(self, rate: float) -> Demand:
        """The same as arrivals of their own."""
        return replace(self, rate=rate, clients=None)

    def closed_by(self, clients: int) -> Demand:
        """The same by clients that wait for each answer."""
        return replace(self, rate=None, clients=clients)

    @property
    def block_tokens(self) -> int:
        """Of a KV block."""
        first = self.trace[0] if self.trace else None
        if self.generator is not None:
            return self.generator.block_tokens
        return first.block_tokens if first is not None and first.hash_ids else _BLOCK_TOKENS

    def talks(self, requests: int, seed: int) -> Iterator[Talk]:
        """About so many requests; other ones for another seed."""
        if self.kinds:
            return iter(talks(self.name, requests, seed, self.rate, VOCABULARY, self.kinds))
        return trace_talks(self._requests(requests, seed), self.block_tokens)

    @cached_property
    def rows(self) -> list[Row]:
        """A sample."""
        if self.kinds:
            return [row for kind in self.kinds for row in _rows(kind) for _ in range(kind.share)]
        sample = self._requests(_SAMPLE, 1)
        reused = (sum(tokens for tokens, _ in found) for found in reused_blocks(sample))
        return [Row(one.prompt_tokens, one.output_tokens, tokens) for one, tokens in zip(sample, reused, strict=True)]

    @property
    def prompt_tokens(self) -> float:
        """Mean."""
        return sum(row.prompt for row in self.rows) / len(self.rows)

    @property
    def output_tokens(self) -> float:
        """Mean."""
        return sum(row.output for row in self.rows) / len(self.rows)

    @property
    def new_tokens(self) -> float:
        """Mean of what is in no cache, of a prompt."""
        return self.prompt_tokens - sum(row.cached for row in self.rows) / len(self.rows)

    @property
    def reuse(self) -> float:
        """Share of all prompt tokens."""
        return 1 - self.new_tokens / self.prompt_tokens

    # ------------------------------------------------------------ the same, otherwise

    def with_prompts(self, factor: float) -> Demand:
        """Prompts of so many times the length (1/2 or 2), which share as large a part."""
        if self.kinds:
            return replace(self, kinds=tuple(_longer(kind, factor) for kind in self.kinds))
        if self.generator is not None:
            rows = tuple(
                replace(
                    row,
                    prompt_tokens=max(1, round(row.prompt_tokens * factor)),
                    reused_tokens=round(row.reused_tokens * factor),
                )
                for row in self.generator.rows
            )
            return replace(self, generator=replace(self.generator, rows=rows))
        return replace(self, trace=tuple(_longer_request(request, factor) for request in self.trace))

    def with_outputs(self, factor: float) -> Demand:
        """Outputs of so many times the length."""
        if self.kinds:
            changed = (with_fields(kind, output=_times(kind.output, factor)) for kind in self.kinds)
            return replace(self, kinds=tuple(changed))
        if self.generator is not None:
            rows = tuple(
                replace(row, output_tokens=max(1, round(row.output_tokens * factor))) for row in self.generator.rows
            )
            return replace(self, generator=replace(self.generator, rows=rows))
        outputs = (max(1, round(request.output_tokens * factor)) for request in self.trace)
        return replace(
            self,
            trace=tuple(
                replace(request, output_tokens=output) for request, output in zip(self.trace, outputs, strict=True)
            ),
        )

    def with_reuse(self, factor: float) -> Demand | None:
        """So many times as large a part of each prompt in an earlier one; None where that changes nothing.

        Where nothing is used again, twice as much means that all prompts begin with the same half.
        """
        if factor < 1 and self.reuse < 0.01:
            return None
        if self.kinds:
            return replace(self, kinds=tuple(_reusing(kind, factor, bare=self.reuse < 0.01) for kind in self.kinds))
        if self.generator is not None:
            rows = tuple(
                replace(row, reused_tokens=round(_shared_part(row.prompt_tokens, row.reused_tokens, factor)))
                for row in self.generator.rows
            )
            return replace(self, generator=replace(self.generator, rows=rows))
        return replace(self, trace=tuple(_renamed(self.trace, factor)))

    def _requests(self, requests: int, seed: int) -> list[TraceRequest]:
        """By time, at the rate asked for."""
        if self.generator is not None:
            return self.generator.requests(requests, seed, self.rate)
        trace = list(self.trace)
        if seed > 1:
            trace = turned(trace, Random(seed).randrange(len(trace)))
        trace = repeated(trace, -(-requests // len(trace)))[:requests]
        own = rate_of(self.trace)
        return trace if self.rate is None or own is None else scaled(trace, self.rate / own)


def demand_of(
    workload: str | None, trace: Path | None, rate: float | None, clients: int | None, speed: float = 1.0
) -> Demand:
    """Of a workload by its name, or a trace or profile in a file. Raises ConfigError for what cannot be."""
    if trace is None:
        if workload not in WORKLOADS:
            raise ConfigError(f"workload {workload!r} is not known; there are {', '.join(WORKLOADS)}")
        return Demand(name=workload, kinds=WORKLOADS[workload], rate=rate, clients=clients)
    generator = read_generator(trace)
    if generator is not None:
        own: float | None = generator.rate
    else:
        requests = tuple(read_trace(trace))
        own = rate_of(requests)
    if clients is None and rate is None:
        if own is None:
            raise ConfigError(f"all requests of {trace} come at the same time; give --rate or --concurrency")
        rate = own * speed
    if generator is not None:
        return Demand(name=str(trace), generator=generator, rate=rate, clients=clients)
    return Demand(name=str(trace), trace=requests, rate=rate, clients=clients)


def rate_of(trace: Sequence[TraceRequest]) -> float | None:
    """Requests/s; None where all come at the same time."""
    return len(trace) / trace[-1].at if trace[-1].at else None


# ---------------------------------------------------------------- kinds of a workload


def _mean(span: Span) -> float:
    return (span[0] + span[1]) / 2


def _times(span: Span, factor: float) -> Span:
    return max(1, round(span[0] * factor)), max(1, round(span[1] * factor))


def _rows(kind: Kind) -> Iterator[Row]:
    """The turns of a conversation, each as long as on average."""
    own, output = _mean(kind.prompt), round(_mean(kind.output))
    before = accumulate([0.0] + [own + output] * (kind.turns - 1))
    for turn, said in enumerate(before):
        shared = kind.shared if kind.tenants else 0
        yield Row(round(shared + said + own), output, shared + said if turn or shared else 0.0)


def _longer(kind: Kind, factor: float) -> Kind:
    return with_fields(kind, prompt=_times(kind.prompt, factor), shared=round(kind.shared * factor))


def _reusing(kind: Kind, factor: float, *, bare: bool) -> Kind:
    if kind.turns > 1:
        return with_fields(kind, turns=max(1, round(kind.turns * factor)))
    whole = kind.shared + _mean(kind.prompt)
    if bare:
        shared, tenants = whole / 2, 1
    else:
        shared, tenants = _shared_part(whole, kind.shared, factor), kind.tenants
    kept = (whole - shared) / _mean(kind.prompt)
    return with_fields(kind, prompt=_times(kind.prompt, kept), shared=round(shared), tenants=tenants)


def _shared_part(whole: float, shared: float, factor: float) -> float:
    return min(shared * factor, max(_MOST_SHARED * whole, shared))


# ---------------------------------------------------------------- requests of a trace


def _longer_request(request: TraceRequest, factor: float) -> TraceRequest:
    prompt = max(1, round(request.prompt_tokens * factor))
    names = (
        request.hash_ids[::2] if factor < 1 else tuple(2 * name + part for name in request.hash_ids for part in (0, 1))
    )
    return replace(request, prompt_tokens=prompt, hash_ids=names[: -(-prompt // request.block_tokens)])


def _renamed(trace: Sequence[TraceRequest], factor: float) -> Iterator[TraceRequest]:
    """Blocks named so that each prompt has more, or fewer, of its leading ones in common with earlier ones."""
    fresh = count(1 + max((name for request in trace for name in request.hash_ids), default=0))
    if not any(request.hash_ids for request in trace):
        common = list(islice(fresh, 1 + max(request.prompt_tokens for request in trace) // _BLOCK_TOKENS))
        for request in trace:
            blocks = -(-request.prompt_tokens // _BLOCK_TOKENS)
            made = (*common[: blocks // 2], *islice(fresh, blocks - blocks // 2))
            yield replace(request, hash_ids=made, block_tokens=_BLOCK_TOKENS)
        return
    following: dict[tuple[int, int], int] = {}
    """The name of the n-th block, where more is shared than up to a block of this name."""
    for request, found in zip(trace, reused_blocks(trace), strict=True):
        shared = len(found)
        wanted = round(_shared_part(request.prompt_tokens // request.block_tokens, shared, factor))
        names = list(request.hash_ids)
        for place in range(min(shared, wanted), min(max(shared, wanted), len(names))):
            key = (names[shared - 1], place)
            names[place] = next(fresh) if wanted < shared else following.setdefault(key, names[place])
        yield replace(request, hash_ids=tuple(names))
