"""A real worker that commits faults to order: what it sends and receives is bent here, and nowhere in the package.

`python -m chaos.faulty_worker FOLDER ID worker MODEL ...`: a folder for sockets, the worker's id, then the command line
of `bascule`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bascule.cli.main import main
from bascule.engine.mock import mock_card
from bascule.kv.transfer.channel import Channel, Message
from bascule.kv.transfer.frames import Buffers, Header, Kind, ticket_key
from bascule.kv.transfer.shm import ShmSession
from bascule.kv.transfer.stream import Stream
from bascule.kv.transfer.tcp import TcpReceiver
from bascule.kv.transfer.tcp_sender import TcpSession
from bascule.peer_wire import Prepare
from bascule.types import TicketId
from bascule.wire import PeerAddress
from bascule.worker import card
from bascule.worker.decode_side import DecodeSide
from bascule.worker.outgoing import Outgoing
from bascule.worker.peers import Peers
from bascule.worker.worker import Worker
from chaos.orders import Order, Orders
from chaos.phases import ENDS, end_at_phases, end_here, lose_on_the_way, phase_of
from chaos.truth import LAYERS

_TICKETS = 256
_BENT = ("flip", "duplicate", "truncate")


class Known:
    """Which request a ticket is of, as far as this worker has seen it."""

    def __init__(self) -> None:
        self._requests: dict[str, tuple[str, int]] = {}
        self._digests: dict[bytes, str] = {}
        self._order: deque[str] = deque()
        self._lock = Lock()

    def add(self, ticket: str, request: str, attempt: int) -> None:
        with self._lock:
            self._requests[ticket] = request, attempt
            self._digests[ticket_key(TicketId(ticket))] = ticket
            self._order.append(ticket)
            if len(self._order) > _TICKETS:
                first = self._order.popleft()
                self._requests.pop(first, None)
                self._digests.pop(ticket_key(TicketId(first)), None)

    def of(self, ticket: str) -> str:
        return self._requests.get(ticket, ("", 0))[0]

    def at(self, phase: str, ticket: str) -> str:
        """What an order for that request at that phase is for."""
        return phase_of(phase, *self._requests.get(ticket, ("", 0)))

    def written(self, header: Header) -> str:
        """What an order for the request whose blocks a frame brings is for."""
        return self.at("transferring", self._digests.get(header.key, "")) if header.kind is Kind.WRITE else ""


def learn_tickets(known: Known) -> None:
    renew, apply = Outgoing.renew_ticket, DecodeSide.apply

    def renew_ticket(self: Outgoing) -> None:
        renew(self)
        known.add(self.ticket, *self.key)

    def applied(self: DecodeSide, sender: Any, message: Any) -> None:
        if isinstance(message, Prepare):
            known.add(message.ticket, message.request, message.attempt)
        apply(self, sender, message)

    Outgoing.renew_ticket = renew_ticket  # type: ignore[method-assign]
    DecodeSide.apply = applied  # type: ignore[method-assign]


def bend_tcp(orders: Orders, known: Known) -> None:
    """Frames (or parts of sealed ones) that leave over TCP: cut off, flipped, doubled, late, shortened, or stopped."""
    send = TcpSession._send
    held: WeakKeyDictionary[TcpSession, bytes] = WeakKeyDictionary()

    def late(session: TcpSession, kind: Kind) -> None:
        if (frame := held.pop(session, None)) is not None:
            send(session, kind, _whole(frame))

    def bent(self: TcpSession, kind: Kind, memory: Buffers) -> None:
        order = orders.take(
            "cut", *(("flip", "duplicate", "reorder", "truncate", "stop") if kind == Kind.WRITE else ())
        )
        if order is None and kind == Kind.WRITE:
            order = orders.take("cut", *_BENT, *ENDS, what=known.at("transferring", self._ticket))
        if order is None:
            send(self, kind, memory)
            late(self, kind)
            return
        random, frame, request = Random(order.seed), b"".join(memory._views), known.of(self._ticket)
        at = random.randrange(1, len(frame))
        if order.fault not in ("stop", *ENDS):
            orders.report(order, request, f"tcp {kind.name.lower()} byte {at} of {len(frame)}")
        if order.fault == "flip":
            send(self, kind, _whole(_flipped(frame, at, random)))
        elif order.fault == "duplicate":
            send(self, kind, _whole(frame))
            send(self, kind, _whole(frame))
        elif order.fault == "reorder":
            late(self, kind)
            held[self] = frame
        elif order.fault == "truncate":
            send(self, kind, _whole(frame[:at]))
        else:
            send(self, kind, _whole(frame[:at]))
            if order.fault == "cut":
                self._stream.shut_down()
            else:
                end_here(orders, order, request, f"tcp after byte {at} of {len(frame)}")
            send(self, kind, _whole(frame[at:]))

    TcpSession._send = bent  # type: ignore[method-assign]


def bend_copies(orders: Orders, known: Known) -> None:
    """Blocks that are copied into a peer's memory: flipped, doubled, left out in part, or stopped in the middle."""
    copy = ShmSession._copy

    def bent(self: ShmSession, target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        order = orders.take("flip", "duplicate", "truncate", "stop")
        order = order or orders.take(*ENDS, what=known.at("transferring", self._ticket))
        if order is None:
            copy(self, target, source)
            return
        random, request = Random(order.seed), known.of(self._ticket)
        part = random.randrange(len(target))
        if order.fault in ("stop", *ENDS):
            with self._copying:
                self._require_open()
                np.copyto(target[:part], source[:part])
                end_here(orders, order, request, f"shm after plane {part} of {len(target)}")
                np.copyto(target[part:], source[part:])
            return
        orders.report(order, request, f"shm plane {part} of {len(target)}")
        whole = len(target) if order.fault != "truncate" else part
        copy(self, target[:whole], source[:whole])
        if order.fault == "duplicate":
            copy(self, target, source)
        elif order.fault == "flip":
            with self._copying:
                place = tuple(random.randrange(size) for size in target.shape)
                target[place] ^= 1 << random.randrange(8)

    ShmSession._copy = bent  # type: ignore[method-assign]


def bend_words(orders: Orders, known: Known) -> None:
    """Small messages of a transfer (answers over TCP, all that is said over a local socket), at either end."""
    write, receive, take = Stream.write, Channel.receive, TcpReceiver._take

    def written(self: Stream, memory: Buffers, seconds: float) -> None:
        order = orders.take("garble", "cut word") if memory.left else None
        if order is None:
            write(self, memory, seconds)
            return
        random, data = Random(order.seed), b"".join(memory._views)
        at = random.randrange(len(data))
        orders.report(order, "", f"byte {at} of {len(data)}")
        if order.fault == "garble":
            write(self, _whole(_flipped(data, at, random)), seconds)
        else:
            write(self, _whole(data[:at]), seconds)
            self.shut_down()
            write(self, _whole(data[at:]), seconds)

    def received(self: Channel, seconds: float) -> Message | None:
        message = receive(self, seconds)
        _stall(orders)
        return message

    def taken(self: TcpReceiver, writer: Any, header: Header, admitted: Callable[[], None]) -> None:
        _stall(orders, known.written(header))
        take(self, writer, header, admitted)

    Stream.write = written  # type: ignore[method-assign]
    Channel.receive = received  # type: ignore[method-assign]
    TcpReceiver._take = taken  # type: ignore[method-assign]


def _stall(orders: Orders, at: str = "") -> None:
    if (order := orders.take("stall", what=at)) is not None:
        orders.report(order, "", f"{order.seconds:.1f} s")
        time.sleep(order.seconds)


def bend_messages(orders: Orders, known: Known) -> None:
    """Messages to peers: lost once or for good, said twice, or late, so that others overtake them."""
    send, answer = Peers.send, Peers.answer
    lost: set[tuple[str, str]] = set()

    def bent(post: Any, message: Any) -> None:
        kind, ticket = type(message).__name__, str(getattr(message, "ticket", ""))
        if (kind, ticket) in lost:
            return
        order = orders.take("lose", "repeat", "delay", what=kind) or orders.take("lose", what=known.at(kind, ticket))
        if order is None:
            post()
            return
        orders.report(order, known.of(ticket), kind)
        if order.fault == "repeat":
            post()
            post()
        elif order.fault == "delay":
            asyncio.get_running_loop().call_later(order.seconds, post)
        elif order.for_good:
            lost.add((kind, ticket))

    def sent(self: Peers, peer: PeerAddress, message: Any) -> None:
        bent(partial(send, self, peer, message), message)

    def answered(self: Peers, epoch: Any, message: Any) -> None:
        bent(partial(answer, self, epoch, message), message)

    Peers.send = sent  # type: ignore[method-assign]
    Peers.answer = answered  # type: ignore[method-assign]


class Filler:
    """Takes all KV memory that is not in use, for a while."""

    def __init__(self) -> None:
        self.orders: Orders | None = None
        self._worker: Worker | None = None
        init = Worker.__init__

        def made(worker: Worker, *args: Any, **kwargs: Any) -> None:
            init(worker, *args, **kwargs)
            self._worker = worker

        Worker.__init__ = made  # type: ignore[method-assign]

    def fill(self, order: Order) -> None:
        if self._worker is not None:
            self._worker._loop.call_soon_threadsafe(self._fill, self._worker, order)

    def _fill(self, worker: Worker, order: Order) -> None:
        counts, lease = worker._parts.books.counts, None
        wanted = counts.free + counts.cached
        while wanted > 0 and (lease := worker._parts.engine.borrow([], [], wanted)) is None:
            wanted -= 1
        if lease is None or self.orders is None:
            return
        self.orders.report(order, "", f"{wanted} blocks for {order.seconds:.1f} s")

        def give_back() -> None:
            lease.release()
            worker._decode.grant_promises()
            worker._steps.wake()

        worker._loop.call_later(order.seconds, give_back)


def _whole(data: bytes) -> Buffers:
    return Buffers([memoryview(data)])


def _flipped(data: bytes, at: int, random: Random) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def run() -> None:
    folder, worker = Path(sys.argv[1]), sys.argv[2]
    filler, known = Filler(), Known()
    orders = filler.orders = Orders(folder, worker, {"fill": filler.fill})
    learn_tickets(known)
    bend_tcp(orders, known)
    bend_copies(orders, known)
    bend_words(orders, known)
    bend_messages(orders, known)
    end_at_phases(orders)
    lose_on_the_way(orders)
    card.mock_card = partial(mock_card, layers=LAYERS)
    sys.argv = ["bascule", *sys.argv[3:]]
    main()


if __name__ == "__main__":
    run()
