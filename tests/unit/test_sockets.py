"""Messages between processes: all of them, in order, whatever else the event loop and the socket do meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import zmq

from bascule.sockets import MOST_WAITING, MessageSocket
from bascule.wire import WireError

WAIT = 20.0


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[MessageSocket, MessageSocket]]:
    """A listening ROUTER, and a DEALER called `peer` that has connected to it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    listener = MessageSocket(context, zmq.ROUTER, linger_ms=0)
    peer = MessageSocket(context, zmq.DEALER, linger_ms=0, identity="peer")
    peer.connect(listener.bind("tcp://127.0.0.1:*"))
    try:
        yield listener, peer
    finally:
        peer.close()
        listener.close()
        context.destroy(linger=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.001)


def run(work: Callable[[], object]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def test_many_messages_at_once_come_all_and_in_order() -> None:
    async def work() -> None:
        async with pair() as (listener, peer):
            got: list[bytes] = []
            reader = asyncio.create_task(listener.deliver(lambda frames: got.append(frames[-1])))
            sent = [b"%d" % number for number in range(1000)]
            for message in sent:
                peer.post([message])
            await until(lambda: len(got) == len(sent))
            assert got == sent
            reader.cancel()

    run(work)


def test_messages_that_came_before_anyone_read_are_delivered() -> None:
    async def work() -> None:
        async with pair() as (listener, peer):
            peer.post([b"early"])
            await asyncio.sleep(0.2)
            got: list[list[bytes]] = []
            reader = asyncio.create_task(listener.deliver(got.append))
            await until(lambda: got == [[b"peer", b"early"]])
            reader.cancel()

    run(work)


def test_both_ends_may_send_from_within_what_they_receive() -> None:
    """A send can take the descriptor's news of a message in passing; none may be left lying for that."""

    async def work() -> None:
        async with pair() as (listener, peer):
            answered: list[bytes] = []

            def answer(frames: list[bytes]) -> None:
                for part in (b"a", b"b"):
                    listener.post([frames[0], frames[-1] + part])

            def ask_again(frames: list[bytes]) -> None:
                answered.append(frames[-1])
                if len(answered) < 400:
                    peer.post([b"%d" % len(answered)])

            readers = [asyncio.create_task(listener.deliver(answer)), asyncio.create_task(peer.deliver(ask_again))]
            peer.post([b"0"])
            await until(lambda: len(answered) >= 400)
            for reader in readers:
                reader.cancel()

    run(work)


def test_a_message_to_nobody_is_reported_later() -> None:
    async def work() -> None:
        async with pair() as (listener, _):
            failures: list[str] = []
            listener.post([b"stranger", b"hello"], lambda: failures.append("stranger"))
            assert failures == []
            await until(lambda: failures == ["stranger"])

    run(work)


def test_more_messages_than_may_wait_for_an_end_that_is_away_are_reported_and_not_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        peer = MessageSocket(context, zmq.DEALER, linger_ms=0)
        failures: list[int] = []
        try:
            peer.connect("tcp://127.0.0.1:9")  # nobody listens there
            for number in range(MOST_WAITING + 3):
                peer.post([b"message"], partial(failures.append, number))
            await until(lambda: len(failures) == 3)
            assert failures == [MOST_WAITING, MOST_WAITING + 1, MOST_WAITING + 2]
        finally:
            peer.close()
            context.destroy(linger=0)

    run(work)
    [record] = caplog.records
    assert f"{MOST_WAITING} messages wait for a process that does not read" in record.message


def test_a_connection_that_is_gone_after_a_few_messages_is_not_called_full(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        peer = MessageSocket(context, zmq.DEALER, linger_ms=0)
        failures: list[str] = []
        try:
            peer.connect("tcp://127.0.0.1:9")
            peer.post([b"message"], partial(failures.append, "first"))
            peer._socket.disconnect("tcp://127.0.0.1:9")
            peer.post([b"message"], partial(failures.append, "second"))
            await until(lambda: failures == ["second"])
        finally:
            peer.close()
            context.destroy(linger=0)

    run(work)
    assert caplog.records == []


def test_a_message_that_cannot_be_applied_does_not_end_the_conversation() -> None:
    async def work() -> None:
        async with pair() as (listener, peer):
            got: list[bytes] = []

            def apply(frames: list[bytes]) -> None:
                if frames[-1] == b"garbage":
                    raise WireError("no message")
                if frames[-1] == b"bug":
                    raise ZeroDivisionError
                got.append(frames[-1])

            reader = asyncio.create_task(listener.deliver(apply))
            for message in (b"garbage", b"bug", b"fine"):
                peer.post([message])
            await until(lambda: got == [b"fine"])
            reader.cancel()

    run(work)


def test_nothing_is_delivered_after_close_and_a_send_then_is_a_failure() -> None:
    async def work() -> None:
        async with pair() as (listener, peer):
            got: list[bytes] = []
            failures: list[str] = []
            reader = asyncio.create_task(listener.deliver(lambda frames: got.append(frames[-1])))
            peer.post([b"one"])
            await until(lambda: got == [b"one"])
            peer.post([b"two"])
            listener.close()
            listener.post([b"peer", b"late"], lambda: failures.append("late"))
            await until(lambda: failures == ["late"])
            assert got == [b"one"]
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    run(work)
