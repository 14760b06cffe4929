"""What traffic is like, in figures: lengths, arrivals, how many at once, what prompts share, conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.errors import ConfigError
from bascule.traffic.synthetic import Synthetic, synthetic_of
from bascule.traffic.traces import TraceRequest

WINDOWS_S = (1, 10, 60)
"""In which requests are counted for the index of dispersion."""
DISTANCES_S = (1, 10, 60, 600, 3600)
"""Within which a block was last used, for reuse by distance."""
_MOST_FOLLOWERS = 2
"""A turn's last full block is followed by its own partial one and by the next turn's full one."""

Values = NDArray[np.float64]


class Spread(Struct, frozen=True, kw_only=True):
    """Of one figure over all requests."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Arrived(Struct, frozen=True, kw_only=True):
    """How requests came."""

    duration_s: float
    """From the first to the last."""
    rate: float
    """Requests/s over that time."""
    gap_cv: float | None
    """Coefficient of variation of the gaps: 1 for Poisson arrivals, above it bursty. None for fewer than three."""
    dispersion: dict[str, float]
    """Variance over mean of the counts in windows of so many seconds: 1 for Poisson arrivals."""


class Reuse(Struct, frozen=True, kw_only=True):
    """Prompt tokens whose block, and all before it, had been in an earlier prompt: what a cache without end finds."""

    tokens: int
    share: float
    """Of all prompt tokens."""
    by_distance: dict[str, float]
    """Share of all prompt tokens whose block was last used within so many seconds."""
    distinct_tokens: int
    """What such a cache would hold in the end."""


class Sessions(Struct, frozen=True, kw_only=True):
    """Conversations: requests that go on from one another."""

    told: bool
    """The trace names them; else a prompt that begins with all full blocks of an earlier one goes on from that."""
    count: int
    turns: Spread
    pause_s: Spread | None
    """Between the starts of successive turns; None where every conversation has one."""


class TrafficProfile(Struct, frozen=True, kw_only=True):
    """All of it; what a trace does not tell is None."""

    requests: int
    prompt_tokens: Spread
    output_tokens: Spread
    arrivals: Arrived
    concurrency: Spread | None
    """Requests at once, over time."""
    service_s: float | None
    """Mean time of a request that `concurrency` follows from."""
    reuse: Reuse | None
    cached_share: float | None
    """Prompt tokens that the server's own caches had."""
    sessions: Sessions | None
    generator: Synthetic
    """Makes traffic like this one."""


def profile_of(trace: Sequence[TraceRequest], service_s: tuple[float, float] | None = None) -> TrafficProfile:
    """Of requests by time. `service_s`: seconds to the first token and for each further one, where the trace has no
    times of its own.

    Raises ConfigError for an empty trace.
    """
    if not trace:
        raise ConfigError("there are no requests to profile")
    prompts = np.array([request.prompt_tokens for request in trace], np.float64)
    took = _service_times(trace, service_s)
    hits = reused_blocks(trace)
    named = any(request.hash_ids for request in trace)
    known = [(request.cached_tokens, request.prompt_tokens) for request in trace if request.cached_tokens is not None]
    arrived = arrivals_of(trace)
    return TrafficProfile(
        requests=len(trace),
        prompt_tokens=spread_of(prompts),
        output_tokens=spread_of(np.array([request.output_tokens for request in trace], np.float64)),
        arrivals=arrived,
        concurrency=None if took is None else _concurrency(np.array([request.at for request in trace]), took),
        service_s=None if took is None else float(took.mean()),
        reuse=_reuse(trace, hits, float(prompts.sum())) if named else None,
        cached_share=sum(cached for cached, _ in known) / sum(prompt for _, prompt in known) if known else None,
        sessions=_sessions(trace),
        generator=synthetic_of(trace, [_summed(found) for found in hits], arrived.rate, arrived.gap_cv),
    )


def spread_of(values: Values) -> Spread:
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return Spread(mean=float(values.mean()), p50=float(p50), p90=float(p90), p99=float(p99), max=float(values.max()))


def arrivals_of(trace: Sequence[TraceRequest]) -> Arrived:
    """Rate and burstiness of requests by time."""
    at = np.array([request.at for request in trace])
    gaps, duration = np.diff(at), float(at[-1] - at[0])
    counted = {}
    for window in WINDOWS_S:
        # Whole windows only, and enough of them to speak of a variance.
        if (whole := int(duration // window)) >= 10:
            counts = np.bincount(((at - at[0]) // window).astype(np.int64), minlength=whole)[:whole]
            counted[str(window)] = float(counts.var() / counts.mean()) if counts.mean() else 0.0
    return Arrived(
        duration_s=duration,
        rate=len(gaps) / duration if duration > 0 else 0.0,
        gap_cv=float(gaps.std() / gaps.mean()) if len(gaps) > 1 and duration > 0 else None,
        dispersion=counted,
    )


def reused_blocks(trace: Sequence[TraceRequest]) -> list[list[tuple[int, float]]]:
    """For each request the leading blocks that an earlier one had too: tokens, and seconds since their last use."""
    used: dict[int, float] = {}
    found = []
    for request in trace:
        mine: list[tuple[int, float]] = []
        left = request.prompt_tokens
        for name in request.hash_ids:
            last = used.get(name)
            if last is None:
                break
            mine.append((min(left, request.block_tokens), request.at - last))
            left -= request.block_tokens
        found.append(mine)
        used.update(dict.fromkeys(request.hash_ids, request.at))
    return found


def _summed(found: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Reused tokens of one request, and how long ago the last of them was used."""
    return sum(tokens for tokens, _ in found), found[-1][1] if found else 0.0


def _reuse(trace: Sequence[TraceRequest], hits: Sequence[Sequence[tuple[int, float]]], total: float) -> Reuse:
    tokens = np.array([tokens for found in hits for tokens, _ in found], np.float64)
    ages = np.array([age for found in hits for _, age in found], np.float64)
    by_distance = {str(limit): float(tokens[ages <= limit].sum() / total) for limit in DISTANCES_S}
    return Reuse(
        tokens=int(tokens.sum()),
        share=float(tokens.sum() / total),
        by_distance=by_distance,
        distinct_tokens=int(total - tokens.sum()),
    )


def _service_times(trace: Sequence[TraceRequest], service_s: tuple[float, float] | None) -> Values | None:
    """Seconds that each request takes, None where nobody knows."""
    if service_s is not None:
        first, each = service_s
        return np.array([first + each * (request.output_tokens - 1) for request in trace], np.float64)
    known = [request.e2e_s for request in trace if request.e2e_s is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    return np.array([mean if request.e2e_s is None else request.e2e_s for request in trace], np.float64)


def _concurrency(at: Values, took: Values) -> Spread:
    """Requests under way, weighted by time, from the first arrival to the last end."""
    moments = np.concatenate([at, at + took])
    steps = np.concatenate([np.ones(len(at)), -np.ones(len(at))])
    order = np.argsort(moments, kind="stable")
    level, lasts = np.cumsum(steps[order])[:-1], np.diff(moments[order])
    if not lasts.sum():
        return spread_of(np.array([float(len(at))]))
    by_level = np.argsort(level, kind="stable")
    level, share = level[by_level], np.cumsum(lasts[by_level]) / lasts.sum()
    p50, p90, p99 = (float(level[min(len(level) - 1, int(np.searchsorted(share, part)))]) for part in (0.5, 0.9, 0.99))
    return Spread(mean=float(took.sum() / lasts.sum()), p50=p50, p90=p90, p99=p99, max=float(level.max()))


def _sessions(trace: Sequence[TraceRequest]) -> Sessions | None:
    told = any(request.session for request in trace)
    if not told and not any(request.hash_ids for request in trace):
        return None
    times: dict[str | int, list[float]] = {}
    for request, name in zip(trace, _told(trace) if told else _guessed(trace), strict=True):
        times.setdefault(name, []).append(request.at)
    pauses = np.concatenate([np.diff(turns) for turns in times.values()])
    return Sessions(
        told=told,
        count=len(times),
        turns=spread_of(np.array([len(turns) for turns in times.values()], np.float64)),
        pause_s=spread_of(pauses) if len(pauses) else None,
    )


def _told(trace: Sequence[TraceRequest]) -> Iterator[str | int]:
    """The session's name; a number for a request without one."""
    return (request.session or number for number, request in enumerate(trace))


def _guessed(trace: Sequence[TraceRequest]) -> Iterator[str | int]:
    """The number of the conversation that each request belongs to.

    Where many prompts part from each other behind a block, what leads there is a system prompt and no conversation.
    """
    followers: dict[int, set[int]] = {}
    for request in trace:
        for name, following in zip(request.hash_ids, request.hash_ids[1:], strict=False):
            followers.setdefault(name, set()).add(following)
    ends: dict[int, int] = {}
    for number, request in enumerate(trace):
        full = request.hash_ids[: request.prompt_tokens // request.block_tokens]
        mine = next((ends.pop(name) for name in reversed(full) if name in ends), number)
        yield mine
        if full and len(followers.get(full[-1], ())) <= _MOST_FOLLOWERS:
            ends[full[-1]] = mine
