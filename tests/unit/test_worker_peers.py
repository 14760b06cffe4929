"""Connections between workers end some time after a peer has gone."""

from __future__ import annotations

import asyncio

import pytest
import zmq
from worker_rig import Cluster, over_sockets

from bascule.peer_wire import PeerMessage, Renew
from bascule.types import Epoch, TicketId, WorkerId
from bascule.wire import Neighbour, Neighbours, PeerAddress
from bascule.worker import peers as peers_module
from bascule.worker import worker as worker_module
from bascule.worker.peers import Peers


def test_a_departed_peers_connection_ends_when_nothing_was_sent_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: Peers, there: Peers) -> None:
        got: asyncio.Queue[PeerMessage] = asyncio.Queue()
        serving = asyncio.create_task(there.serve(lambda _, message: got.put_nowait(message)))
        idle = len(asyncio.all_tasks())

        async def arrives(name: str) -> None:
            here.send(there.address, message := Renew((TicketId(name),)))
            assert await asyncio.wait_for(got.get(), 20) == message

        async def reads_on(present: set[WorkerId]) -> bool:
            here.forget_departed(present)
            await asyncio.sleep(0)
            return len(asyncio.all_tasks()) > idle

        await arrives("first")
        assert await reads_on(set()), "something may be under way"
        monkeypatch.setattr(peers_module, "_QUIET_S", 0.0)
        assert await reads_on({there.address.worker})
        assert not await reads_on(set())
        await arrives("over a new connection")
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    async def run() -> None:
        with zmq.Context() as context:
            both = [Peers(context, "127.0.0.1", WorkerId(name), Epoch(f"{name}-1")) for name in "ab"]
            await scenario(*both)
            for one in both:
                one.close()

    asyncio.run(run())


def test_a_worker_forgets_peers_that_its_router_says_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "_QUIET_S", 0.0)
    monkeypatch.setattr(worker_module, "_DEPARTED_S", 0.01)

    async def scenario(cluster: Cluster) -> None:
        worker, other = cluster.worker, PeerAddress(WorkerId("b"), Epoch("b-1"), "tcp://127.0.0.1:1")
        worker._apply(Neighbours((Neighbour(other.worker, ()),)))
        worker._peers.send(other, Renew(()))
        await asyncio.sleep(0.05)
        assert list(worker._peers._connections) == [other.address]
        worker._apply(Neighbours(gone=(other.worker,)))
        await cluster.wait(lambda: not worker._peers._connections)

    over_sockets(scenario)
