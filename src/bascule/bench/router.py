"""How long a routing decision takes, and how that grows: a full router state without sockets."""

from __future__ import annotations

import gc
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil

from bascule.bench.routed_state import BLOCK_TOKENS, CARD, HeldBlocks, busy_view
from bascule.kv.hashing import BlockHasher
from bascule.kv.prefix_index import PrefixIndex
from bascule.policies.route import adaptive
from bascule.policies.snapshot import RouteQuery
from bascule.router.found import Found, find
from bascule.router.view import ClusterView
from bascule.types import BlockHash, Placement, RequestId, Slo, StepLoad, Tier

SLO = Slo(2.0, 0.06, 0.2)
OUTPUT_TOKENS = 200
IN_FLIGHT = 4
"""Requests of the bench itself on each worker; the oldest ends when another is placed."""
EVENT_BLOCKS = 16
"""Blocks in one message of a worker's block events."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What is measured: the size of the cluster and of what it has cached."""

    workers: int = 1000
    blocks: int = 1_000_000
    prompt_blocks: int = 100
    decisions: int = 2000
    seed: int = 0


@dataclass(slots=True)
class _Placed:
    placement: Placement
    uncached: int
    context: float


def measure(settings: RouterSettings) -> dict[str, Any]:
    """The figures of one size: decisions, block events and memory.

    A decision hashes the prompt's blocks, looks them up, takes a snapshot, runs the adaptive policy and counts what it
    placed and what has ended. `decision_s` is by the wall clock, `decision_cpu_s` by the thread's own time, which
    others on the machine disturb less. Of `parts_s` (medians, nothing placed), `expect` comes after the decision.
    """
    gc.collect()
    before = _memory()
    index, held = PrefixIndex(), HeldBlocks(settings.seed, settings.prompt_blocks)
    held.fill(index, settings.workers, settings.blocks)
    memory = _memory() - before
    decider = _Decider(busy_view(settings.workers, settings.seed), index)
    prompts = held.prompts(settings.decisions)
    for prompt in prompts[: settings.decisions // 10]:
        decider.expect(*decider.decide(prompt))
    wall, cpu, after = (np.zeros(len(prompts)) for _ in range(3))
    rng = np.random.default_rng(settings.seed)
    for at, prompt in enumerate(prompts):
        decider.report(rng.integers(settings.workers, size=max(settings.workers // 10, 1)).tolist())
        started, own = time.perf_counter(), time.thread_time()
        placed = decider.decide(prompt)
        cpu[at], wall[at] = time.thread_time() - own, time.perf_counter() - started
        after[at] = decider.expect(*placed)
    return {
        "workers": settings.workers,
        "blocks": held.blocks,
        "prompt_blocks": settings.prompt_blocks,
        "decision_s": _quantiles(wall),
        "decision_cpu_s": _quantiles(cpu),
        "parts_s": decider.parts(prompts[:200]) | {"expect": float(np.median(after))},
        "events_per_s": _events_per_s(index, held, settings),
        "bytes_per_block": memory / held.blocks,
    }


def growth(settings: RouterSettings) -> list[dict[str, Any]]:
    """`measure` over 1, 10, 100 ... workers and 10,000, 100,000 ... blocks, up to those of the settings."""
    few = min(settings.decisions, 300)
    sizes = itertools.product(_decades(1, settings.workers), _decades(10_000, settings.blocks))
    return [measure(replace(settings, workers=workers, blocks=blocks, decisions=few)) for workers, blocks in sizes]


class _Decider:
    """What the router does between a request's arrival and its submission to a worker, the message itself left out."""

    def __init__(self, view: ClusterView, index: PrefixIndex) -> None:
        self._view = view
        self._index = index
        self._hasher = BlockHasher(CARD.fingerprint, BLOCK_TOKENS)
        self._members = list(view.members.values())
        self._flights: deque[_Placed] = deque()
        self._now = 0.0

    def decide(self, prompt: Sequence[int]) -> tuple[int, list[BlockHash]]:
        """Place one request, and end the oldest; returns the prefill worker's row (or -1), and the prompt's blocks."""
        view = self._view
        self._now += 0.001
        hashes = self._hasher.chain(prompt)
        query = self._query(prompt, self._look_up(hashes))
        decision = adaptive(view.snapshot(self._now), query)
        chosen = decision.chosen()
        if chosen is not None:
            uncached = len(prompt) - chosen.cached_tokens
            context = len(prompt) + OUTPUT_TOKENS / 2
            view.place(chosen.placement, uncached, context, self._now)
            self._flights.append(_Placed(chosen.placement, uncached, context))
        if chosen is None or len(self._flights) > IN_FLIGHT * len(self._members):
            ended = self._flights.popleft()
            view.prefilled(ended.placement, ended.uncached)
            view.decoded(ended.placement, ended.context)
        return -1 if chosen is None else view.members[chosen.placement.prefill].row, hashes

    def report(self, workers: Sequence[int]) -> None:
        """Some workers tell how far they are, as they do after each step."""
        for worker in workers:
            member = self._members[worker]
            sent = self._view.columns.sent(member.row)
            streams = int(self._view.columns.decoding[member.row])
            self._view.stepped(member, StepLoad(sent, 1, 512, streams, 1000 * streams), self._now)

    def expect(self, row: int, hashes: list[BlockHash]) -> float:
        """Tell the index what was placed, which can wait until the request is on its way; returns the seconds taken."""
        started = time.thread_time()
        if row >= 0:
            self._index.expect(row, hashes, self._now)
        self._index.expire(self._now)
        return time.thread_time() - started

    def parts(self, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
        """The median seconds of what a decision consists of; nothing is placed."""
        spent: dict[str, list[float]] = {"hash": [], "lookup": [], "snapshot": [], "policy": []}
        for prompt in prompts:
            times = [time.perf_counter()]
            hashes = self._hasher.chain(prompt)
            times.append(time.perf_counter())
            found = self._look_up(hashes)
            times.append(time.perf_counter())
            snapshot = self._view.snapshot(self._now)
            times.append(time.perf_counter())
            adaptive(snapshot, self._query(prompt, found))
            times.append(time.perf_counter())
            for taken, (start, end) in zip(spent.values(), itertools.pairwise(times), strict=True):
                taken.append(end - start)
        return {name: float(np.median(taken)) for name, taken in spent.items()}

    def _look_up(self, hashes: Sequence[BlockHash]) -> Found:
        """As `ClusterView.found` does, in the index of what is held here."""
        columns = self._view.columns
        return find(self._index, self._view.stores, hashes, CARD.layout, columns.lends & columns.placeable)

    def _query(self, prompt: Sequence[int], found: Found) -> RouteQuery:
        return RouteQuery(
            request=RequestId("bench"),
            prompt_tokens=len(prompt),
            max_tokens=2 * OUTPUT_TOKENS,
            cached=found.cached,
            peer=found.peer.row,
            peer_tokens=found.peer.tokens,
            output_tokens=float(OUTPUT_TOKENS),
            slo=SLO,
            kv_token_bytes=CARD.layout.block_bytes // BLOCK_TOKENS,
            gap_planned_s=SLO.gap_s,
            tpot_planned_s=SLO.tpot_s,
        )


def _events_per_s(index: PrefixIndex, held: HeldBlocks, settings: RouterSettings) -> float:
    """Blocks stored and removed again in a full index, by the thread's own time."""
    messages = [held.random_blocks(EVENT_BLOCKS) for _ in range(2000)]
    rows = np.random.default_rng(settings.seed).integers(settings.workers, size=len(messages)).tolist()
    started = time.thread_time()
    for row, message in zip(rows, messages, strict=True):
        index.store(row, Tier.DEVICE, message)
    for row, message in zip(rows, messages, strict=True):
        index.remove(row, Tier.DEVICE, message)
    return 2 * len(messages) * EVENT_BLOCKS / (time.thread_time() - started)


def _decades(first: int, last: int) -> list[int]:
    """First, 10 * first ... and the last."""
    sizes = [first]
    while sizes[-1] * 10 < last:
        sizes.append(sizes[-1] * 10)
    return [size for size in sizes if size < last] + [last]


def _quantiles(seconds: np.ndarray[Any, Any]) -> dict[str, float]:
    return {"p50": float(np.quantile(seconds, 0.5)), "p99": float(np.quantile(seconds, 0.99))}


def _memory() -> int:
    """Bytes of this process that lie in memory."""
    return int(psutil.Process().memory_info().rss)
