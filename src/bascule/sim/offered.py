"""The requests of a trace as a simulation takes them, and how fast they come for a given load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import cast

from bascule.errors import ConfigError
from bascule.policies.cost import decode_seconds
from bascule.policies.load import prompt_seconds
from bascule.sim.cluster import Cluster
from bascule.sim.text import Text, named, own_name
from bascule.sim.worker import Kind
from bascule.traffic.traces import TraceRequest
from bascule.traffic.workloads import Ask, Talk
from bascule.types import BlockHash


def trace_talks(trace: Iterable[TraceRequest], block_tokens: int) -> Iterator[Talk]:
    """One request a talk, each at its time, with the names of its blocks and no tokens; made one by one.

    Raises ConfigError for blocks of the trace that do not go into those of the workers, nor the other way round.
    """
    fresh = count()
    for request in trace:
        text = Text(request.prompt_tokens, _names(request, block_tokens, fresh))
        yield Talk((Ask(cast(tuple[int, ...], text), request.output_tokens),), request.at)


def speed_for(load: float, trace: Sequence[TraceRequest], cluster: Cluster) -> float:
    """How many times faster than recorded the trace has to come for workers to be busy for `load` of the time.

    What a request takes is its prompt, computed alone and whole, and its share of decode steps that are as full as the
    TPOT bound, a worker's sequences and its KV memory let them be. So what caches spare and what queueing costs is not
    in it.
    """
    if not (load > 0 and math.isfinite(load)):
        raise ConfigError(f"a load of {load:g} is not possible; give a share above 0, such as 0.7")
    span = trace[-1].at - trace[0].at
    if span <= 0:
        raise ConfigError("all requests of the trace come at the same time; a load needs a trace with a length")
    work = 0.0
    workers = [(pool.kind, pool.count) for pool in cluster.pools]
    total = sum(number for _, number in workers)
    mean = sum(request.prompt_tokens + request.output_tokens / 2 for request in trace) / len(trace)
    for kind, number in workers:
        token_s = full_step_share(kind, mean, cluster.slo.tpot_s)
        seconds = sum(
            prompt_seconds(kind.cost, request.prompt_tokens, 0, kind.chunk_tokens) + request.output_tokens * token_s
            for request in trace
        )
        work += seconds * number / total
    return load * total * span / work


def full_step_share(kind: Kind, context: float, tpot_s: float) -> float:
    """Seconds that a token of output takes of a worker, where as many streams of `context` tokens share its steps as
    the bound on TPOT, its sequences and its memory allow."""
    fitting = max(1, min(kind.max_sequences, int(kind.kv_tokens / max(context, 1.0))))
    streams = fitting
    while streams > 1 and decode_seconds(kind.cost, streams, int(streams * context)) > tpot_s:
        streams -= 1
    return decode_seconds(kind.cost, streams, int(streams * context)) / streams


def _names(request: TraceRequest, block_tokens: int, fresh: Iterator[int]) -> Sequence[BlockHash]:
    full = request.prompt_tokens // block_tokens
    if not request.hash_ids:
        return [own_name(next(fresh)) for _ in range(full)]
    theirs = request.block_tokens
    if theirs % block_tokens == 0:
        parts = theirs // block_tokens
        return [named(name * parts + part) for name in request.hash_ids for part in range(parts)][:full]
    if block_tokens % theirs == 0:
        parts = block_tokens // theirs
        return [named(name) for name in request.hash_ids[parts - 1 :: parts]][:full]
    raise ConfigError(
        f"blocks of {block_tokens} tokens do not go into the trace's blocks of {theirs}; set --block-size to a part or "
        "a multiple of that"
    )
