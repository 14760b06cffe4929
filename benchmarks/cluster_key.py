"""What a cluster key costs messages between router and worker, and KV over TCP; prints Markdown tables.

    python benchmarks/cluster_key.py [--seconds 2] [--rounds 5] [--prompt-tokens 128,1500]

Both ends are in this process, on loopback, as `RouterLink` and `RouterSocket` set them up. A round trip is a message of
64 tokens from the worker and a `Cancel` back. The flow is such messages one way, as many as go; CPU is this process's,
both ends with their zmq threads, for each of them. Medians of the rounds, which take turns. KV is what `bascule bench
handoff` measures, in real processes.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import median

import uvloop

from bascule.bench import handoff
from bascule.bench.transport_target import SEALED
from bascule.keys import ClusterKey
from bascule.router.link import RouterLink
from bascule.types import Epoch, RequestId, StepLoad, WorkerId
from bascule.wire import Cancel, StepTokens, TokenItem, encode
from bascule.worker.link import RouterSocket

EPOCH = Epoch("worker-1")
STEP = StepTokens(
    WorkerId("worker"),
    EPOCH,
    tuple(TokenItem(RequestId(f"{number:032x}"), 0, 100, 20_000 + number, 0, None) for number in range(64)),
    StepLoad(0, 0, 0, 64, 64_000),
)
BACK = Cancel(RequestId("0" * 32), 0)


async def measured(key: ClusterKey | None, seconds: float) -> tuple[float, float, float]:
    """Seconds of a round trip, messages per second of the flow, CPU seconds of each of those."""
    link = RouterLink("tcp://127.0.0.1:*", key)
    worker = RouterSocket(link.address, EPOCH, key)
    back: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    came, answering = 0, True

    def at_router(epoch: Epoch, _: object) -> None:
        nonlocal came
        came += 1
        if answering:
            link.send(epoch, BACK)

    serving = [
        asyncio.create_task(link.serve(at_router)),
        asyncio.create_task(worker.serve(lambda _: back.set_result(None))),
    ]
    trips = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun, back = time.perf_counter(), asyncio.get_running_loop().create_future()
        worker.send(STEP)
        await back
        trips.append(time.perf_counter() - begun)
    answering, came, sent = False, 0, 0
    begun, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < begun + seconds:
        for _ in range(64):
            worker.send(STEP)
        sent += 64
        while came < sent - 1024:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    while came < sent:
        await asyncio.sleep(0)
    took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)
    worker.close()
    link.close()
    return median(trips), sent / took, cpu / sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each of a round's four parts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", default="128,1500", help="of the time to the second token; none: no server")
    options = parser.parse_args()
    messages(options)
    lengths = [int(length) for length in options.prompt_tokens.split(",") if length]
    transfers(options.rounds, lengths)


def messages(options: argparse.Namespace) -> None:
    kinds = {"none": None, "with a key": ClusterKey.of(bytes(32))}
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, key in kinds.items():
            found[kind].append(uvloop.run(measured(key, options.seconds)))
    print(f"Messages of {len(encode(STEP))} bytes.\n")
    print("| key | round trip | messages a second | CPU a message |\n|---|---|---|---|")
    for kind, rounds in found.items():
        trip, rate, cpu = (median(column) for column in zip(*rounds, strict=True))
        print(f"| {kind} | {trip * 1e6:.0f} us | {rate:,.0f} | {cpu * 1e6:.1f} us |")


def transfers(runs: int, lengths: list[int]) -> None:
    found = handoff.measure(
        handoff.HandoffSettings(
            model="smollm2", dtype="bfloat16", size=64 << 20, lengths=lengths, transports=["tcp", SEALED], runs=runs
        )
    )
    print(f"\n{found.bytes_per_transfer / 1e6:.0f} MB of KV from process to process.\n")
    print("| KV over TCP | GB/s | of a plain socket's | CPU s/GB |\n|---|---|---|---|")
    for row in found.transports:
        if row.name in ("tcp", SEALED):
            name = f"{row.name}, verified" if row.verified else row.name
            print(f"| {name} | {row.bytes_per_s / 1e9:.2f} | {row.ratio:.2f} | {row.cpu_s_per_gb:.3f} |")
    if lengths:
        second_token(found)


def second_token(found: handoff.HandoffReport) -> None:
    print("\n| prompt tokens | KV over TCP | second token s | of one worker's | exposed ms |\n|---|---|---|---|---|")
    for one in found.second_token:
        row = f"| {one.prompt_tokens} | {one.transport} | {one.remote_s:.3f} | {one.ratio:.3f} "
        print(f"{row}| {one.exposed_s * 1e3:.1f} |")


if __name__ == "__main__":
    main()
