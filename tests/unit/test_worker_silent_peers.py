"""A worker whose peer is silent, as a stopped process is: what it does with other peers goes on meanwhile."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from engine_rig import BLOCK, CARD, greedy
from fetch_rig import Two, play, prompt_of
from handoff_rig import Pair, pair, verdicts
from msgspec import structs

from bascule.engine.sequence import Key
from bascule.engine.work import Progress
from bascule.kv.transfer.base import machine_id
from bascule.kv.transfer.frames import HEADER_BYTES, Verdict, pack_reply
from bascule.peer_wire import Commit, Fetch, Fetched, PeerMessage, Prepare, Reserved, TransferEndpoint
from bascule.types import Epoch, RequestId, TicketId, WorkerId
from bascule.wire import PeerAddress, Submit
from bascule.worker import peer_threads
from bascule.worker.peer_threads import PeerThreads

SILENT = PeerAddress(WorkerId("s"), Epoch("s-1"), "tcp://127.0.0.1:3")
MORE_THAN_THREADS = 10


class SilentReceiver:
    """Welcomes every writer, and says and takes nothing after that."""

    def __init__(self, server: socket.socket) -> None:
        self.welcomed: list[socket.socket] = []
        self.endpoint = TransferEndpoint("tcp", "{}:{}".format(*server.getsockname()), machine_id())
        self._server = server

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            connection.recv(HEADER_BYTES, socket.MSG_WAITALL)
            connection.sendall(pack_reply(Verdict.DONE))
            self.welcomed.append(connection)


@contextmanager
def silent_receiver() -> Iterator[SilentReceiver]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        receiver = SilentReceiver(server)
        thread = threading.Thread(target=receiver.serve, daemon=True)
        thread.start()
        yield receiver
        server.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        for connection in receiver.welcomed:
            connection.close()


async def until_its_threads_wait(receiver: SilentReceiver, most: int) -> None:
    async with asyncio.timeout(20):
        while len(receiver.welcomed) < most:
            await asyncio.sleep(0.001)


def test_handoffs_to_a_silent_worker_hold_up_none_to_another() -> None:
    def grant_there(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Commit):
            stuck.append(sum(key.request.startswith("silent") for key in both.prefill._by_key))
        if not isinstance(message, Prepare):
            return None if getattr(message, "ticket", "") in granted else message
        if not message.request.startswith("silent"):
            return message
        granted.add(message.ticket)
        answer = Reserved(
            ticket=message.ticket, epoch=SILENT.epoch, blocks=(0, 1), have_blocks=0, endpoints=(receiver.endpoint,)
        )
        both.loop.call_soon(both.prefill.apply, answer)
        return None

    async def scenario(both: Pair) -> None:
        for number in range(MORE_THAN_THREADS):
            key = Key(RequestId(f"silent {number}"), 1)
            submission = Submit(
                request=key.request, attempt=1, prompt=tuple(range(2 * BLOCK)), generated=(), sampling=greedy(4)
            )
            both.prefill.begin(submission, SILENT)
            both.prefill.progressed(
                Progress(request=key.request, attempt=1, blocks=(0, 1), computed=2 * BLOCK, last=True)
            )
        await until_its_threads_wait(receiver, 8)
        await both.run()

    granted: set[TicketId] = set()
    stuck: list[int] = []
    with silent_receiver() as receiver, pair("tcp", grant_there) as both:
        both.loop.run_until_complete(scenario(both))
        assert verdicts(both) == ["accepted"]
        assert min(stuck) == MORE_THAN_THREADS, "it had to wait until some were given up"


def test_loans_to_a_silent_worker_hold_up_none_to_another_and_can_be_taken_back() -> None:
    async def scenario(two: Two) -> None:
        answers: list[Fetched] = []
        answer = two.lender._answer

        def answered(epoch: Epoch, message: PeerMessage) -> None:
            if epoch == SILENT.epoch and isinstance(message, Fetched):
                answers.append(message)
            else:
                answer(epoch, message)

        two.lender._answer = answered
        two.compute(1, prompt_of(1))
        tickets = [TicketId(f"silent {number}") for number in range(MORE_THAN_THREADS)]
        wish = Fetch(
            ticket=TicketId(""),
            secret=bytes(16),
            worker=SILENT.worker,
            fingerprint=CARD.fingerprint,
            layout=CARD.layout,
            tokens=tuple(prompt_of(1)),
            have_blocks=0,
            blocks=tuple(range(10)),
            endpoints=(receiver.endpoint,),
        )
        for ticket in tickets:
            two.lender.lend(SILENT.epoch, structs.replace(wish, ticket=ticket))
        await until_its_threads_wait(receiver, 4)
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 10
        assert answers == []
        for ticket in tickets:
            assert two.lender.revoke(SILENT.epoch, ticket)
        async with asyncio.timeout(15):
            while len(answers) < len(tickets):
                await asyncio.sleep(0.001)
        assert all(each.reason for each in answers)

    with silent_receiver() as receiver:
        play(scenario, "tcp")


def test_a_peers_threads_end_some_time_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        threads, peer = PeerThreads(1, "test"), Epoch("e")
        with threads.of(peer) as one:
            with threads.of(peer) as same:
                assert same is one
            monkeypatch.setattr(peer_threads, "_KEPT_S", 0.0)
        with threads.of(peer) as again:
            assert again is one
            await asyncio.sleep(0.01)
            assert again.submit(lambda: 5).result(20) == 5
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError):
            one.submit(lambda: 5)
        with threads.of(peer) as other:
            assert other is not one
        threads.close()

    asyncio.run(scenario())
