"""What a prefix cache saves under several orders of eviction; prints a Markdown table.

    python benchmarks/eviction.py --seeds 3 --trace mooncake_conversation.jsonl

Requests come one after another to a cache of bounded size, and each holds its blocks until some more have come. A cell
is `hit / saved`: the share of prompt tokens found in the cache, and of the time to compute all prompts that they save,
in per cent, where a token costs twice as much behind `--doubling` tokens. `0.2` is what the books use: the share of all
blocks that may be protected; `lru` is the same with none. `greedy` is Greedy-Dual (Cao and Irani 1997) with frequency:
uses times cost, aged by what was last evicted. `foresight` evicts what is needed last (Belady).

`--trace` is in Mooncake's format: a JSON object a line with `input_length` and `hash_ids` of blocks of 512 tokens. A
trace of lengths alone cannot be replayed: it does not say who shares what.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

from bascule.policies.evict import EvictionOrder

BLOCK = 64
TRACE_BLOCK = 512
IN_FLIGHT = 8
"""Requests that hold blocks at a time."""


class Asked(NamedTuple):
    """A request: names of its blocks, chained like hashes, those of its output included."""

    names: list[int]
    prompt: int
    """How many of them are full blocks of the prompt."""


class Order(Protocol):
    def use(self, blocks: Sequence[int]) -> None: ...
    def offer(self, run: Sequence[int], depth: int) -> None:
        """`run` goes from its end, which is the block number `depth` of its prompt, to its beginning."""

    def pop(self, count: int) -> list[int]: ...


class Segmented:
    """The order of the books."""

    def __init__(self, capacity: int, share: float) -> None:
        self._order = EvictionOrder(capacity, share)
        self.use, self.pop = self._order.use, self._order.pop

    def offer(self, run: Sequence[int], depth: int) -> None:
        self._order.offer(run)


class GreedyDual:
    """The least stamp goes first: uses times cost on top of the last stamp that went. A block's is no less than that
    of any block behind it, so that an end goes before its beginning."""

    def __init__(self, capacity: int, growth: float) -> None:
        self._growth = growth
        self._age = 0.0
        self._uses = [1] * capacity
        self._stamps = [0.0] * capacity
        self._turn = itertools.count()
        self._valid = [-1] * capacity
        self._heap: list[tuple[float, int, int]] = []

    def use(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._uses[block] += 1
            self._valid[block] = -1

    def offer(self, run: Sequence[int], depth: int) -> None:
        stamp = 0.0
        for index, block in enumerate(run):
            worth = self._uses[block] * (1 + (depth - index) * self._growth)
            self._stamps[block] = stamp = max(stamp, self._stamps[block], self._age + worth)
            self._valid[block] = turn = next(self._turn)
            heapq.heappush(self._heap, (stamp, turn, block))

    def pop(self, count: int) -> list[int]:
        gone: list[int] = []
        while len(gone) < count:
            stamp, turn, block = heapq.heappop(self._heap)
            if self._valid[block] == turn:
                self._age = max(self._age, stamp)
                self._uses[block], self._stamps[block], self._valid[block] = 1, 0.0, -1
                gone.append(block)
        return gone


class Cache:
    """As much of the books as eviction needs."""

    def __init__(self, capacity: int, order: Order) -> None:
        self._order = order
        self._free = list(range(capacity))
        self._slots: dict[int, int] = {}
        self._names = [-1] * capacity
        self._holders = [0] * capacity
        self._held = 0
        self._capacity = capacity
        self._leases: deque[list[int]] = deque()

    def serve(self, asked: Asked) -> int:
        """How many blocks of the prompt were there."""
        hits = 0
        while hits < asked.prompt and asked.names[hits] in self._slots:
            hits += 1
        table = [self._slots[name] for name in asked.names[:hits]]
        self._order.use(table)
        self._hold(table)
        fresh = [name for name in asked.names[hits:] if name not in self._slots]
        while len(self._leases) >= IN_FLIGHT or (self._leases and self._capacity - self._held < len(fresh)):
            self._release(self._leases.popleft())
        fresh = fresh[: self._capacity - self._held]
        for slot in self._order.pop(len(fresh) - len(self._free)):
            del self._slots[self._names[slot]]
            self._free.append(slot)
        for name in fresh:
            slot = self._free.pop()
            self._slots[name], self._names[slot] = slot, name
            table.append(slot)
        self._hold(table[hits:])
        self._leases.append(table)
        return hits

    def _hold(self, table: list[int]) -> None:
        for slot in table:
            self._held += not self._holders[slot]
            self._holders[slot] += 1

    def _release(self, table: list[int]) -> None:
        idle: list[int] = []
        for slot in reversed(table):
            self._holders[slot] -= 1
            if not self._holders[slot]:
                idle.append(slot)
        self._held -= len(idle)
        self._order.offer(idle, len(table) - 1)


def foresight(stream: Sequence[Asked], capacity: int) -> list[int]:
    """Hits of each request where always the block goes that is asked for last."""
    coming: dict[int, int] = {}
    again: list[list[int]] = []
    for turn in range(len(stream) - 1, -1, -1):
        again.append([coming.get(name, len(stream)) for name in stream[turn].names])
        coming.update(dict.fromkeys(stream[turn].names, turn))
    hits: list[int] = []
    due: dict[int, int] = {}
    latest: list[tuple[int, int, int]] = []
    for asked, dues in zip(stream, reversed(again), strict=True):
        found = itertools.takewhile(lambda name: name in due, asked.names[: asked.prompt])
        hits.append(sum(1 for _ in found))
        for depth, (name, turn) in enumerate(zip(asked.names, dues, strict=True)):
            due[name] = turn
            heapq.heappush(latest, (-turn, -depth, name))
        while len(due) > capacity:
            turn, _, name = heapq.heappop(latest)
            if due.get(name) == -turn:
                del due[name]
    return hits


def shares(stream: Sequence[Asked], hits: Sequence[int], growth: float) -> tuple[float, float]:
    """Of all prompts' tokens those hit, and of the cost of computing them what that saves, in per cent."""

    def cost(blocks: int) -> float:
        return blocks + growth * blocks * (blocks - 1) / 2

    tokens = 100 * sum(hits) / sum(asked.prompt for asked in stream)
    return tokens, 100 * sum(map(cost, hits)) / sum(cost(asked.prompt) for asked in stream)


# ---------------------------------------------------------------- streams, in blocks of 64 tokens


def _maker() -> Callable[[float], list[int]]:
    names = itertools.count()
    return lambda blocks: [next(names) for _ in range(math.ceil(blocks))]


def sessions(random: Random, requests: int = 6000, talking: int = 100, turns: int = 6) -> Iterator[Asked]:
    """Conversations over one system prompt, each as likely to go on as any other."""
    make = _maker()
    system = make(20)
    live = [system] * talking
    for _ in range(requests):
        which = random.randrange(talking)
        prompt = live[which] + make(random.expovariate(1 / 8))
        live[which] = prompt + make(random.expovariate(1 / 6))
        yield Asked(live[which], len(prompt))
        if random.random() < 1 / turns:
            live[which] = system


def paused(random: Random, requests: int = 6000, talking: int = 400, turns: int = 5) -> Iterator[Asked]:
    """Conversations with pauses, most of them short and some very long."""
    make = _maker()
    system = make(20)
    due = [(random.random() * talking, number, system) for number in range(talking)]
    heapq.heapify(due)
    for number in range(talking, talking + requests):
        now, _, before = heapq.heappop(due)
        prompt = before + make(random.expovariate(1 / 8))
        names = prompt + make(random.expovariate(1 / 6))
        yield Asked(names, len(prompt))
        after = system if random.random() < 1 / turns else names
        heapq.heappush(due, (now + 0.3 * talking * random.paretovariate(1.3), number, after))


def scanned(random: Random, requests: int = 4000) -> Iterator[Asked]:
    """Short questions behind twenty system prompts; a third of the time with a scan of unique long prompts beside."""
    make = _maker()
    systems = [make(40) for _ in range(20)]
    for turn in range(requests):
        yield Asked(random.choice(systems) + make(10), 47)
        if requests <= 3 * turn < 2 * requests:
            yield Asked(make(200), 200)


def documents(random: Random, requests: int = 8000, drift: int = 0) -> Iterator[Asked]:
    """Questions on 2,000 documents of Zipf's popularity; with `drift`, other ones become popular now and then."""
    make = _maker()
    shelf = [make(10 + random.expovariate(1 / 60)) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, len(shelf) + 1)]
    for turn, rank in enumerate(random.choices(range(len(shelf)), weights, k=requests)):
        document = shelf[(rank + turn // 1000 * drift) % len(shelf)]
        yield Asked(document + make(6), len(document) + 3)


def drifting(random: Random) -> Iterator[Asked]:
    return documents(random, drift=37)


def traced(path: Path) -> Iterator[Asked]:
    """Only full blocks of prompts; what a trace does not name cannot be found again."""
    for line in path.read_text().splitlines():
        request = json.loads(line)
        full = request["hash_ids"][: request["input_length"] // TRACE_BLOCK]
        if full:
            yield Asked(full, len(full))


STREAMS: dict[Callable[[Random], Iterator[Asked]], tuple[int, ...]] = {
    sessions: (1000, 4000, 8000),
    paused: (2000, 10_000, 20_000),
    scanned: (1000, 2000, 4000),
    documents: (3000, 12_000, 40_000),
    drifting: (3000, 12_000, 40_000),
}
TRACE_SIZES = (2000, 6000, 20_000, 40_000)


def row(label: str, streams: list[list[Asked]], block: int, capacity: int, doubling: int, names: list[str]) -> str:
    growth = block / doubling
    cells: list[str] = []
    for name in names:
        found = []
        for stream in streams:
            if name == "foresight":
                hits = foresight(stream, capacity)
            else:
                share = 0.0 if name == "lru" else float(name) if name != "greedy" else None
                order = GreedyDual(capacity, growth) if share is None else Segmented(capacity, share)
                cache = Cache(capacity, order)
                hits = [cache.serve(asked) for asked in stream]
            found.append(shares(stream, hits, growth))
        cells.append(" / ".join(f"{statistics.fmean(column):.1f}" for column in zip(*found, strict=True)))
    return f"| {label} | {capacity * block:,} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the made streams; cells are means over them")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--doubling", type=int, default=16_384, metavar="TOKENS")
    parser.add_argument("--orders", default="lru,0.1,0.2,0.5,greedy,foresight")
    options = parser.parse_args()
    names = options.orders.split(",")
    print(f"| requests | cache, tokens | {' | '.join(names)} |\n|" + "---|" * (len(names) + 2))
    for make, sizes in STREAMS.items():
        streams = [list(make(Random(seed))) for seed in range(1, options.seeds + 1)]
        for capacity in sizes:
            print(row(make.__name__, streams, BLOCK, capacity, options.doubling, names), flush=True)
    if options.trace:
        stream = list(traced(options.trace))
        for capacity in TRACE_SIZES:
            print(row(options.trace.stem, [stream], TRACE_BLOCK, capacity, options.doubling, names), flush=True)


if __name__ == "__main__":
    main()
