"""How fast each tier of the KV store takes and gives blocks; prints a Markdown table of medians, in MB/s.

    python benchmarks/store.py --size 400KB --blocks 128 --batch 16 --rounds 5 --disk /var/tmp

Blocks are records, packed before and unpacked (which checks their checksum) after what is timed, as a column of its
own. What the disk tier gives has just been written, so it comes from the page cache. `remote` is a Redis server on
loopback, started here if there is one.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from random import Random

from bascule.config import parse_size
from bascule.kv.store.base import Store
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.record import Payload, pack, unpack
from bascule.kv.store.remote import RemoteStore
from bascule.kv.store.targets import parse_remote
from bascule.types import BlockHash, Tier

TOKENS = tuple(range(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="400KB", help="bytes of KV in a block")
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="blocks in a call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    payload = Payload("none", Random(1).randbytes(parse_size(options.size, "--size")))
    names = [BlockHash(number.to_bytes(16, "big")) for number in range(options.blocks)]
    began = time.perf_counter()
    records = {name: pack(name, "model", TOKENS, payload) for name in names}
    megabytes = sum(map(len, records.values())) / 1e6
    print(
        f"{options.blocks} blocks of {options.size}, {options.batch} a call; pack {_rate(megabytes, began):.0f} MB/s\n"
    )
    print("| tier | put MB/s | get MB/s | unpack MB/s | one get ms |\n|---|---|---|---|---|")
    with ExitStack() as stack:
        for label, store in _stores(2 * int(megabytes * 1e6), options.disk, stack):
            rows = [_round(store, records, options.batch, megabytes) for _ in range(options.rounds)]
            put, get, check, one = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"| {label} | {put:.0f} | {get:.0f} | {check:.0f} | {one:.2f} |", flush=True)


def _round(store: Store, records: dict[BlockHash, bytes], batch: int, megabytes: float) -> tuple[float, ...]:
    names = list(records)
    calls = [names[first : first + batch] for first in range(0, len(names), batch)]
    began = time.perf_counter()
    for call in calls:
        assert store.put({name: records[name] for name in call}) == len(call), store.stats()
    put = _rate(megabytes, began)
    answers: list[bytes | None] = []
    began = time.perf_counter()
    for call in calls:
        answers += store.get(call)
    get = _rate(megabytes, began)
    began = time.perf_counter()
    for name, answer in zip(names, answers, strict=True):
        assert answer is not None, store.stats()
        unpack(name, "model", TOKENS, answer)
    check = _rate(megabytes, began)
    singles = [_milliseconds(lambda name=name: store.get([name])) for name in names[:32]]
    return put, get, check, statistics.median(singles)


def _stores(capacity: int, disk: Path, stack: ExitStack) -> Iterator[tuple[str, Store]]:
    yield "memory", MemoryStore(capacity)
    for tier, above in ((Tier.HOST, Path("/dev/shm")), (Tier.DISK, disk)):
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bascule-bench-", dir=above)))
        yield tier, stack.enter_context(closing(DirectoryStore(directory, capacity, tier)))
    if binary := shutil.which("redis-server") or shutil.which("valkey-server"):
        url = stack.enter_context(redis_server(binary))
        store = stack.enter_context(closing(RemoteStore(parse_remote(url))))
        while not store.put({BlockHash(bytes(16)): b""}):
            time.sleep(0.1)
        yield "remote", store


@contextmanager
def redis_server(binary: str) -> Iterator[str]:
    """A server on a free loopback port, without persistence; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    arguments = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _rate(megabytes: float, began: float) -> float:
    return megabytes / (time.perf_counter() - began)


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
