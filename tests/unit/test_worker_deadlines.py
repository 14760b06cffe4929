"""A request's time limit travels with it: a worker ends what is over it, though nobody tells it to."""

from __future__ import annotations

import asyncio
import math

import pytest
from handoff_rig import SAMPLING, SOURCE, pair
from test_worker_handoff import decode_side, prepare
from worker_rig import EPOCH, Cluster, over_sockets

from bascule.clock import VirtualClock
from bascule.engine.sequence import Key
from bascule.peer_wire import Abort, Prepare
from bascule.types import RequestId, SamplingParams, TicketId
from bascule.wire import Submit
from bascule.worker import deadlines
from bascule.worker.deadlines import Deadlines

KEY = Key(RequestId("r"), 1)


def test_what_is_over_its_time_and_a_grace_is_ended_once() -> None:
    ended: list[Key] = []
    clock = VirtualClock()
    mine = Deadlines(ended.append, clock)
    mine.bound(KEY, 3.0)
    mine.bound(Key(RequestId("endless"), 1), math.inf)
    mine.bound(done := Key(RequestId("done"), 1), 1.0)
    mine.forget(done)
    clock.advance(2.0)
    assert mine.left(KEY) == 1.0 and mine.left(done) == math.inf
    clock.advance(1.9)
    mine.check()
    assert ended == []
    clock.advance(0.2)
    mine.check()
    mine.check()
    assert ended == [KEY]


def test_a_worker_whose_router_says_nothing_more_ends_a_request_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_GRACE_S", 0.1)

    async def scenario(cluster: Cluster) -> None:
        monkeypatch.setattr(cluster.service, "tokens", lambda _: None)  # or it would cancel what it does not know
        limits, known, ended = cluster.worker._deadlines, list[Key](), list[Key]()
        bound, cancel = limits.bound, limits._cancel
        monkeypatch.setattr(limits, "bound", lambda key, seconds: (known.append(key), bound(key, seconds)))
        monkeypatch.setattr(limits, "_cancel", lambda key: (ended.append(key), cancel(key)))
        for name, timeout_s, tokens in (("short", 0.3, 80), ("long", 100.0, 20)):
            cluster.router.send(
                EPOCH,
                Submit(
                    request=RequestId(name),
                    attempt=1,
                    prompt=(1, 2, 3),
                    generated=(),
                    sampling=SamplingParams(max_tokens=tokens, temperature=0.0),
                    timeout_s=timeout_s,
                ),
            )
        await cluster.wait(lambda: len(known) == 2 and bool(ended) and not limits._ends)
        await cluster.wait(lambda: not cluster.engine.load().running)
        assert ended == [Key(RequestId("short"), 1)]
        assert cluster.books.counts.held == 0

    over_sockets(scenario, step_s=0.05)  # "short" would need 4 s


def test_the_router_says_how_long_a_request_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: Cluster) -> None:
        seen: list[float] = []
        monkeypatch.setattr(cluster.worker._deadlines, "bound", lambda _, seconds: seen.append(seconds))
        await cluster.complete([5] * 8)
        assert 0 < seen[0] <= 20.0

    over_sockets(scenario)


def test_a_handoff_takes_the_time_that_is_left_along() -> None:
    async def run() -> None:
        with pair("loopback") as both:
            both.prefill._deadlines.bound(Key(RequestId("r"), 1), 5.0)
            assert len(await both.run()) == SAMPLING.max_tokens
            [prepare] = both.sent(Prepare)
            assert isinstance(prepare, Prepare) and 0 < prepare.timeout_s <= 5.0
            assert both.prefill._deadlines.left(Key(RequestId("r"), 1)) == math.inf

    asyncio.run(run())


def test_a_handoff_that_comes_to_nothing_leaves_no_time_limit_behind() -> None:
    with decode_side() as rigged:
        limits = rigged.side._deadlines

        def comes(request: str, ticket: str, **changes: object) -> None:
            asked = prepare(request=RequestId(request), ticket=TicketId(ticket), timeout_s=600.0, **changes)
            rigged.side.apply(SOURCE.epoch, asked)

        comes("refused", "t1", prompt=())
        assert limits._ends == {}
        comes("given up", "t2")
        comes("tried again", "t3")
        assert {key.request for key in limits._ends} == {"given up", "tried again"}
        rigged.side.apply(SOURCE.epoch, Abort(TicketId("t2")))
        comes("tried again", "t4")
        rigged.side.apply(SOURCE.epoch, Abort(TicketId("t3")))
        assert {key.request for key in limits._ends} == {"tried again"}, "its second ticket lives"
        rigged.forget_all()
        assert limits._ends == {}
