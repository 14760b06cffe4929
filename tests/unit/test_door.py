"""Who gets through: real sockets of two processes' contexts, with the same key, another, or none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing

import msgspec
import pytest
import zmq

from bascule import door
from bascule.errors import RegistrationRefused
from bascule.keys import ClusterKey
from bascule.router.link import RouterLink
from bascule.sockets import MessageSocket
from bascule.types import Epoch, WorkerId
from bascule.wire import VERSION, Registered, RegistrationRefusal, RouterMessage, Starting, WorkerMessage
from bascule.worker.link import RouterSocket
from bascule.worker.peers import Peers

WAIT = 20.0
ONE, OTHER = ClusterKey.of(b"1" * 32), ClusterKey.of(b"2" * 32)
EPOCH = Epoch("w-1")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.005)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 3 * WAIT))  # type: ignore[arg-type]


@asynccontextmanager
async def router(key: ClusterKey | None) -> AsyncIterator[tuple[RouterLink, list[WorkerMessage]]]:
    """A router's socket, and what has come through it."""
    link, got = RouterLink("tcp://127.0.0.1:*", key), []

    def take(epoch: Epoch, message: WorkerMessage) -> None:
        got.append(message)
        link.send(epoch, Registered(epoch, 0.5))

    serving = asyncio.create_task(link.serve(take))
    try:
        yield link, got
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        link.close()


@asynccontextmanager
async def worker(address: str, key: ClusterKey | None) -> AsyncIterator[tuple[RouterSocket, list[RouterMessage]]]:
    """A worker's socket that has said something, and what has come back."""
    link, got = RouterSocket(address, EPOCH, key), []
    serving = asyncio.create_task(link.serve(got.append))
    link.send(Starting(WorkerId("w"), "hello"))
    try:
        yield link, got
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        link.close()


def test_a_newcomer_of_another_release_is_told_so_and_a_member_that_seems_to_be_one_is_not() -> None:
    theirs = msgspec.msgpack.encode({"type": "Register", "version": VERSION + 1, "worker": "w", "epoch": 5})

    async def answers(is_member: bool) -> list[RouterMessage]:
        link, got = RouterLink("tcp://127.0.0.1:*"), []

        def take(epoch: Epoch, message: WorkerMessage) -> None:
            link.send(epoch, Registered(epoch, 0.5))

        serving = asyncio.create_task(link.serve(take, lambda epoch: is_member and epoch == EPOCH))
        try:
            async with worker(link.address, None) as (theirs_to_us, got):
                theirs_to_us._socket.post([theirs])
                theirs_to_us.send(Starting(WorkerId("w"), "last"))
                await until(lambda: sum(isinstance(each, Registered) for each in got) == 2)
            return got
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            link.close()

    for member in (False, True):
        refused = [each for each in asyncio.run(answers(member)) if isinstance(each, RegistrationRefusal)]
        assert [f"version {VERSION + 1}" in each.reason for each in refused] == ([] if member else [True])


@pytest.mark.parametrize("key", [ONE, None])
def test_router_and_worker_with_the_same_key_talk(key: ClusterKey | None) -> None:
    async def work() -> None:
        async with router(key) as (ours, got), worker(ours.address, key) as (_, answers):
            await until(lambda: bool(got) and bool(answers))
            assert got == [Starting(WorkerId("w"), "hello")]

    run(work)


def test_a_worker_says_when_its_router_is_gone_and_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        async with AsyncExitStack() as stack:
            async with router(None) as (ours, _):
                _, answers = await stack.enter_async_context(worker(ours.address, None))
                await until(lambda: bool(answers))
                assert "the connection" not in caplog.text
            await until(lambda: f"the connection to the router at {ours.address} has broken off" in caplog.text)
            assert "again" not in caplog.text
            with closing(RouterLink(ours.address, None)):
                await until(lambda: f"connected to the router at {ours.address} again" in caplog.text)

    run(work)


@pytest.mark.parametrize(
    ("has", "brings", "worker_says", "router_says"),
    [
        (ONE, OTHER, "did not accept our cluster key: it closed the connection", "another cluster key"),
        (ONE, None, "did not let us in: it .*asks for a cluster key", "it has no cluster key"),
        (None, ONE, "did not accept our cluster key: it", "it has a cluster key, and we none"),
    ],
)
def test_all_others_are_told_apart_on_both_sides_and_nothing_comes_through(
    has: ClusterKey | None,
    brings: ClusterKey | None,
    worker_says: str,
    router_says: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "_MOST_NAMELESS", 0)

    async def work() -> None:
        async with router(has) as (ours, got):
            while router_says not in caplog.text:  # which end sees first that mechanisms differ is a race
                async with worker(ours.address, brings) as (link, answers):
                    with pytest.raises(RegistrationRefused, match=worker_says) as caught:
                        await asyncio.wait_for(link.turned_away(), WAIT)
                    assert ours.address in str(caught.value) and "--cluster-key-file" in str(caught.value)
                    assert (got, answers) == ([], [])

    with caplog.at_level(logging.WARNING):
        run(work)


def test_the_address_of_who_was_turned_away_is_told_and_not_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with router(ONE) as (ours, _), worker(ours.address, OTHER) as (link, _):
            with pytest.raises(RegistrationRefused):
                await asyncio.wait_for(link.turned_away(), WAIT)

    with caplog.at_level(logging.WARNING, "bascule.door"):
        run(work)
    said = [record.getMessage() for record in caplog.records if "did not let" in record.getMessage()]
    assert len(said) == 1 and "the socket for workers did not let 127.0.0.1:" in said[0]


def test_a_client_with_the_servers_key_but_not_the_clients_is_refused() -> None:
    """Knowing whom one talks to is not enough: the door asks for the client's own key."""
    stranger = ClusterKey(ONE.server_public, b"", OTHER.client_public, OTHER.client_secret, b"")

    async def work() -> None:
        async with router(ONE) as (ours, got), worker(ours.address, stranger) as (link, _):
            with pytest.raises(RegistrationRefused, match="has another cluster key"):
                await asyncio.wait_for(link.turned_away(), WAIT)
            assert got == []

    run(work)


def test_a_locked_socket_lets_nobody_in_where_no_doorkeeper_answers() -> None:
    async def work() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        listener = MessageSocket(context, zmq.ROUTER, linger_ms=0, key=ONE)
        got: list[list[bytes]] = []
        reader = asyncio.create_task(listener.deliver(got.append))
        async with worker(listener.bind("tcp://127.0.0.1:*"), ONE) as (link, _):
            with pytest.raises(RegistrationRefused):
                await asyncio.wait_for(link.turned_away(), WAIT)
        assert got == []
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        listener.close()
        context.destroy(linger=0)

    run(work)


def test_what_answers_there_but_is_no_router_is_named() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with worker(f"tcp://127.0.0.1:{port}", None) as (link, _):
            with pytest.raises(RegistrationRefused, match="is no router"):
                await asyncio.wait_for(link.turned_away(), WAIT)
        server.close()

    run(work)


def test_a_worker_waits_for_a_router_that_is_not_there_yet() -> None:
    async def work() -> None:
        async with router(ONE) as (first, _):
            address = first.address
        async with worker(address, ONE) as (link, answers):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(link.turned_away(), 1.0)
            successor = RouterLink(address, ONE)
            serving = asyncio.create_task(
                successor.serve(lambda epoch, _: successor.send(epoch, Registered(epoch, 0.5)))
            )
            await until(lambda: bool(answers))
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            successor.close()

    run(work)


@pytest.mark.parametrize(("key", "comes"), [(ONE, True), (OTHER, False), (None, False)])
def test_peers_talk_by_the_same_key_only(key: ClusterKey | None, comes: bool) -> None:
    from bascule.peer_wire import Renew

    async def work() -> None:
        contexts: list[zmq.Context[zmq.Socket[bytes]]] = [zmq.Context(), zmq.Context()]
        here = Peers(contexts[0], "127.0.0.1", WorkerId("a"), Epoch("a-1"), ONE)
        there = Peers(contexts[1], "127.0.0.1", WorkerId("b"), Epoch("b-1"), key)
        got: list[object] = []
        readers = [
            asyncio.create_task(here.serve(lambda epoch, message: got.append((epoch, message)))),
            asyncio.create_task(there.serve(lambda *_: None)),
        ]
        for _ in range(5 if comes else 20):
            there.send(here.address, Renew(()))
            await asyncio.sleep(0.05)
        if comes:
            await until(lambda: len(got) == 5)
        else:
            assert got == []
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        here.close()
        there.close()
        for context in contexts:
            context.destroy(linger=0)

    run(work)
