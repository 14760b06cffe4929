"""What a full Redis server still gives, by the order in which it evicts; prints a Markdown table.

    python benchmarks/redis_eviction.py

The streams of `eviction.py` go through the `remote` tier to real servers of bounded memory, one for each order, a
request every second of a clock that is told to the tier (a server's own clock does not follow it: `lru` there goes by
the few seconds that it really took, and `lfu` by no decay). A cell is the share of the prompts' tokens found, in per
cent: only what lies unbroken from a prompt's beginning. `ours` is `volatile-ttl` with 20 samples and the lives that
the tier gives to blocks; `plain` the same with equal lives; `segmented` is an exact cache of as many blocks, as on the
device; `held` the share of `ours` if all that is there could be used.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random

from eviction import (
    BLOCK,
    STREAMS,
    TRACE_BLOCK,
    Asked,
    Cache,
    Segmented,
    documents,
    paused,
    scanned,
    sessions,
    shares,
    traced,
)
from faults import Remote

from bascule.kv.store.base import Use
from bascule.kv.store.remote import RemoteStore
from bascule.kv.store.targets import parse_remote
from bascule.types import BlockHash

VALUE = bytes(1000)
OVERHEAD_BYTES = 140
"""A key's own, as measured; what the server needs for itself comes on top."""
SERVER_BYTES = 1_200_000
ORDERS: dict[str, tuple[str, int, bool]] = {
    "allkeys-lru": ("allkeys-lru", 5, True),
    "allkeys-lfu": ("allkeys-lfu", 5, True),
    "plain": ("volatile-ttl", 20, False),
    "ours": ("volatile-ttl", 20, True),
}
SIZES = {make: STREAMS[make][1] for make in (sessions, paused, scanned, documents)}
TRACE_BLOCKS = 6000
OUR_BLOCK = 16
"""Tokens of the blocks whose depth the tier is told."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="in Mooncake's format, as for eviction.py")
    parser.add_argument("--requests", type=int, default=4000, help="of each stream at most")
    parser.add_argument("--pace", type=float, default=1.0, help="seconds between two requests")
    options = parser.parse_args()
    print(f"| requests | blocks | {' | '.join(ORDERS)} | segmented | held |\n|{'---|' * (len(ORDERS) + 4)}")
    streams = [(make.__name__, list(make(Random(1))), size, BLOCK) for make, size in SIZES.items()]
    if options.trace:
        streams.append((options.trace.stem, list(traced(options.trace)), TRACE_BLOCKS, TRACE_BLOCK))
    for name, whole, size, block in streams:
        stream = whole[: options.requests]
        cells, room, held = [], size, 0.0
        for policy, samples, ours in ORDERS.values():
            hits, there, room = served(stream, size, block, policy, samples, ours, options.pace)
            cells.append(percent(stream, hits))
            held = percent(stream, there)
        cache = Cache(room, Segmented(room, 0.2))
        cells += [percent(stream, [cache.serve(asked) for asked in stream]), held]
        print(f"| {name} | {room:,} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


def percent(stream: Sequence[Asked], hits: Sequence[int]) -> float:
    return shares(stream, hits, BLOCK / 16_384)[0]


def served(
    stream: Sequence[Asked], size: int, block: int, policy: str, samples: int, ours: bool, pace_s: float
) -> tuple[list[int], list[int], int]:
    """For each request how many blocks of its prompt lay unbroken from its beginning and how many were there at all;
    and how many blocks the server held in the end."""
    hits, there = [], []
    with ExitStack() as stack:
        remote = Remote()
        stack.callback(remote.kill)
        remote.configure("maxmemory-policy", policy)
        remote.configure("maxmemory-samples", str(samples))
        remote.configure("maxmemory", str(SERVER_BYTES + size * (len(VALUE) + OVERHEAD_BYTES)))
        url = f"redis://127.0.0.1:{remote.port}"
        store = stack.enter_context(closing(RemoteStore(parse_remote(url), timeout_s=20.0)))
        now = time.monotonic() - pace_s * len(stream)  # so that what is put, and not told yet, is not taken for old
        for asked in stream:
            now += pace_s
            names = [BlockHash(number.to_bytes(16, "big")) for number in asked.names]
            held = store.holds(names)
            found = next((place for place, holds in enumerate(held) if not holds), len(names))
            hits.append(min(found, asked.prompt))
            there.append(sum(held[: asked.prompt]))
            if absent := {name: VALUE for name, holds in zip(names, held, strict=True) if not holds}:
                store.put(absent)
            store.touch(
                [
                    Use(name, now - 1e-6 * place, ours and place < found, ours * place * block // OUR_BLOCK)
                    for place, name in enumerate(names)
                ]
            )
        return hits, there, store.stats().blocks


if __name__ == "__main__":
    main()
