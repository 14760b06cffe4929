"""A short run of random faults, and that the harness would see it if something were wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from bascule.bench.footprints import Trend
from chaos.__main__ import one_run
from chaos.clients import CONTEXT, GRACE_S, VOCAB, Clients, Ended, asked
from chaos.run import too_many_failed, unsteady
from chaos.schedule import DEAD_S, LAYOUTS, ROLES, VETERANS, kinds_of, schedule
from chaos.truth import true_tokens
from support.redis_server import redis_binary

SEED = 8
"""Its layout pushes over shared memory or TCP, or goes by way of Redis."""


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_wrong_while_workers_connections_and_stores_fail(smollm2: Path) -> None:
    redis_binary()
    verdict = one_run(SEED, requests=250, faults=30, limit_s=400, mean_gap_s=0.3)
    assert verdict.violations == [] and not too_many_failed([verdict])
    assert verdict.befallen >= 30 and len(verdict.ended) >= 250


def test_a_seed_gives_the_same_faults_and_requests_again() -> None:
    assert list(islice(schedule(SEED, 1.0), 200)) == list(islice(schedule(SEED, 1.0), 200))
    assert list(islice(schedule(SEED, 1.0), 200)) != list(islice(schedule(SEED + 1, 1.0), 200))
    assert asked(SEED, 17) == asked(SEED, 17) != asked(SEED, 18)


@pytest.mark.parametrize("seed", range(len(LAYOUTS)))
def test_every_fault_of_a_layout_comes_up(seed: int) -> None:
    drawn = {fault.name for fault in islice(schedule(seed, 1.0), 1000)}
    assert drawn == set(kinds_of(LAYOUTS[seed]))


def test_a_soak_leaves_its_veterans_alive_and_gives_them_all_other_faults() -> None:
    ending = {fault.name for fault in islice(schedule(SEED, 1.0, VETERANS), 2000) if fault.victim not in VETERANS}
    drawn = [fault for fault in islice(schedule(SEED, 1.0, VETERANS), 2000) if fault.victim in VETERANS]
    assert {"kill -9", "restart (SIGTERM)", "paused, declared dead", "paused in mid-write"} <= ending
    assert not any(fault.name.startswith(("kill", "restart")) for fault in drawn)
    assert all(fault.seconds < DEAD_S for fault in drawn if fault.name.startswith("paused"))


def test_a_soak_has_a_veteran_of_each_role_and_fails_where_one_was_not_judged() -> None:
    assert sorted(ROLES[name] for name in VETERANS) == sorted(set(ROLES.values()))
    names = ["router 1", *(f"{name} {pid}" for pid, name in enumerate(VETERANS, 2))]
    steady = [Trend(name, 20.0, 100.0, 101.0, 0.1, 30, 30) for name in names]
    assert unsteady(steady) == []
    for left_out, role in enumerate(("router", "prefill", "decode", "mixed")):
        rest = [trend for number, trend in enumerate(steady) if number != left_out]
        assert unsteady(rest) == [f"no {role} process lived long enough to be judged"]
    successor = Trend("mixed-0 9", 10.0, 100.0, 112.0, 1.2, 30, 40)
    assert unsteady([*steady[:-1], successor]) == [
        "mixed-0 9 grows by 1.20 MB a minute",
        "mixed-0 9 has 40 open files, and had 30",
    ]


def events(tokens: list[int], end: str) -> bytes:
    parts = [json.dumps({"choices": [{"token_ids": [token]}]}) for token in tokens]
    return "".join(f"data: {part}\n\n" for part in [*parts, *filter(None, [end])]).encode()


def response(body: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def judged(make: Callable[[list[int]], bytes], *, silent: bool = False, limit_s: float = 20.0) -> Ended:
    """What the harness says of a server that answers a streamed request with what `make` makes of its true tokens."""
    one = next(one for one in (asked(SEED, number) for number in range(1000)) if one.stream and one.manner == "plain")
    one.limit_s = limit_s
    content = make(true_tokens(CONTEXT, VOCAB, one.prompt, one.sampling))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(content)
        if silent:
            await reader.read()
        writer.close()

    async def run() -> Ended:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await Clients(SEED, "127.0.0.1", server.sockets[0].getsockname()[1], "model").ask(one)

    return asyncio.run(run())


def test_the_true_tokens_are_exact() -> None:
    assert judged(lambda true: response(events(true, "[DONE]"))).verdict == "exact"


def test_one_token_that_differs_is_wrong_however_the_answer_ends() -> None:
    def one_off(true: list[int]) -> list[int]:
        return [*true[:-1], true[-1] ^ 1]

    assert judged(lambda true: response(events(one_off(true), "[DONE]"))).verdict == "wrong"
    assert judged(lambda true: response(events(one_off(true), '{"error": {"message": "m"}}'))).verdict == "wrong"
    cut = judged(lambda true: response(events(one_off(true), ""), length=1 << 20))
    assert cut.verdict == "wrong" and cut.explain()["differs_at"] == len(cut.tokens) - 1


def test_an_answer_that_lacks_its_last_token_is_wrong() -> None:
    assert judged(lambda true: response(events(true[:-1], "[DONE]"))).verdict == "wrong"


def test_an_error_event_is_an_error_and_an_answer_without_end_is_cut() -> None:
    failed = judged(lambda true: response(events(true[:2], '{"error": {"message": "no worker"}}')))
    assert (failed.verdict, failed.error) == ("error", "no worker")
    assert judged(lambda true: response(events(true, ""))).verdict == "cut"
    assert judged(lambda true: response(events(true[:2], ""), length=1 << 20)).verdict == "cut"


def test_a_server_that_says_nothing_more_behind_the_limit_hangs() -> None:
    ended = judged(lambda true: response(events(true[:2], ""), length=1 << 20), silent=True, limit_s=0.1 - GRACE_S)
    assert ended.verdict == "hung"
