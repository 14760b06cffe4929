"""A worker tries whether it reaches the others, goes on trying those it does not, and hands nothing over to them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
from handoff_rig import SAMPLING, TARGET, pair

from bascule.link_wire import Neighbour, Neighbours, Reached, TryReach
from bascule.peer_wire import Prepare
from bascule.types import Epoch, Role, WorkerId
from bascule.worker import neighbours
from bascule.worker.neighbours import Reach
from bascule.worker.parts import Identity

WHO = Identity(worker=WorkerId("w"), epoch=Epoch("w-1"), role=Role.MIXED, device="cpu")


def test_who_cannot_be_reached_is_named_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_AGAIN_S", 0.05)

    async def run() -> None:
        reach = Reach(WHO, lambda _: None)
        watching = asyncio.create_task(reach.watch())
        with socket.create_server(("127.0.0.1", 0)) as listening:
            here = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
            with socket.create_server(("127.0.0.1", 0)) as other:
                port = other.getsockname()[1]
            away = f"127.0.0.1:{port}"
            reach.told(Neighbours((Neighbour(WorkerId("a"), (here,)), Neighbour(WorkerId("b"), (here, away)))))
            await until(lambda: reach.unreachable == {"b": f"{away} (connection refused)"})
            reach.told(Neighbours((Neighbour(WorkerId("c"), (away,)),)))
            await until(lambda: set(reach.unreachable) == {"b", "c"})
            reach.told(Neighbours(gone=(WorkerId("c"),)))
            assert set(reach.unreachable) == {"b"}
            with socket.create_server(("127.0.0.1", port)):
                await until(lambda: reach.unreachable == {})
            reach.forget_all()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_the_router_is_told_how_each_address_of_a_question_came_out_and_a_flood_is_not_tried() -> None:
    told: list[Reached] = []

    async def run() -> None:
        reach = Reach(WHO, told.append)
        watching = asyncio.create_task(reach.watch())
        with socket.create_server(("127.0.0.1", 0)) as listening:
            here = f"127.0.0.1:{listening.getsockname()[1]}"
            with socket.create_server(("127.0.0.1", 0)) as other:
                away = f"127.0.0.1:{other.getsockname()[1]}"
            reach.asked(TryReach("good", (here, f"tcp://{here}")))
            reach.asked(TryReach("bad", (here, away)))
            await until(lambda: len(told) == 2 and not reach._answering)
            for one in range(100):
                reach.asked(TryReach(str(one), (here,)))
            tried = len(reach._answering)
            await until(lambda: not reach._answering)
            assert len(told) == 2 + tried < 20
            reach.asked(TryReach("late", (away,)))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await until(lambda: not reach._answering)

    asyncio.run(asyncio.wait_for(run(), 20))
    found = {answer.question: answer for answer in told}
    assert {(answer.worker, answer.epoch) for answer in told} == {("w", "w-1")}
    assert found["good"].unreachable == "" and found["bad"].unreachable.endswith("(connection refused)")
    assert "late" not in found, "who ends does not answer any more"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_what_would_go_to_a_worker_out_of_reach_is_decoded_here_without_asking() -> None:
    async def run() -> None:
        with pair("loopback") as both:
            both.prefill._unreachable = {TARGET.worker: "tcp://10.0.0.9:1 (no answer within 2 s)"}
            assert len(await both.run()) == SAMPLING.max_tokens
            assert both.sent(Prepare) == []

    asyncio.run(run())
