"""Live processes take whatever comes through their sockets: none crashes, hangs, grows, or forgets what it does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from bascule.kv.codecs import NAMES
from bascule.kv.transfer import channel
from bascule.kv.transfer.frames import Header, Kind, layout_digest, ticket_key
from bascule.peer_wire import Abort, PeerMessage, Prepare, Reserved, from_peer
from bascule.types import RequestId, SamplingParams, TicketId
from bascule.wire import (
    VERSION,
    Goodbye,
    Leaving,
    PeerAddress,
    Register,
    Registered,
    RegistrationRefusal,
    RouterMessage,
    Stop,
    WireError,
    WorkerMessage,
    encode,
    from_router,
    from_worker,
)
from fuzz.inputs import fuzzing, messages, nested
from fuzz.live import PROMPT, WAIT_S, WORKER, Live

pytestmark = pytest.mark.timeout(3600)

REQUESTS = [f"fuzz-{number}" for number in range(6)]
EPOCHS = [f"fuzz-{number}" for number in range(40)]
TICKETS = [f"ticket-{number}" for number in range(12)]
SECRET = b"s" * 16


def known(target: Live) -> dict[str, st.SearchStrategy[Any]]:
    """Values that get a message past the first check."""
    offer = target.offer
    tokens = st.one_of(st.lists(st.integers(0, 40), min_size=1, max_size=70), st.sampled_from([PROMPT[:32], PROMPT]))
    builtins = msgspec.to_builtins
    return {
        "worker": st.sampled_from(["fuzz", "fuzz-b", WORKER]),
        "epoch": st.sampled_from([*EPOCHS, offer.epoch]),
        "request": st.sampled_from(REQUESTS),
        "attempt": st.integers(0, 3),
        "ticket": st.sampled_from(TICKETS),
        "secret": st.just(SECRET),
        "card": st.just(builtins(offer.card)),
        "layout": st.just(builtins(offer.card.layout)),
        "fingerprint": st.just(offer.card.fingerprint),
        "version": st.just(VERSION),
        "cost": st.just(builtins(offer.cost)),
        "prompt": tokens,
        "generated": st.just([]),
        "tokens": tokens,
        "max_tokens": st.integers(1, 60),
        "have_blocks": st.integers(0, 2),
        "blocks": st.lists(st.integers(0, 9), max_size=4),
        "target_epoch": st.just(offer.epoch),
        "source": st.just(builtins(PeerAddress(WORKER, EPOCHS[0], offer.peer.address))),
        "address": st.sampled_from(
            ["tcp://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:99999", "/nowhere", "tcp://x:99999"]
        ),
    }


def words(target: Live) -> list[str]:
    return [*REQUESTS[:2], *EPOCHS[:4], *TICKETS[:2], WORKER, "device", "host", "shm", "tcp", target.offer.machine]


def ends(read: Any, data: bytes, kinds: tuple[type, ...]) -> Any:
    """The message, if it is one of those."""
    with contextlib.suppress(WireError):
        if isinstance(message := read(data), kinds):
            return message
    return None


def test_the_router_takes_whatever_workers_say(target: Live) -> None:
    own = target.offer.epoch

    @fuzzing(0.15, shrink=False)
    @given(messages(words(target), WorkerMessage, known(target)), st.sampled_from([*EPOCHS[:2], own, ""]))
    def check(data: bytes, sender: str) -> None:
        message = ends(from_worker, data, (Register, Goodbye, Leaving))
        if message is not None and (message.worker == WORKER or sender == own):
            return  # to replace or end a worker is what these are for
        if not sender:
            sender = epoch if (epoch := _epoch_in(data)) in EPOCHS else EPOCHS[0]
        target.tell_router(sender, data)

    check()
    target.tell_router(own, nested("KvEvents"))
    target.check_unharmed()


def _epoch_in(data: bytes) -> str:
    with contextlib.suppress(Exception):
        return str(msgspec.msgpack.decode(data)["epoch"])
    return ""


def test_a_worker_takes_whatever_its_router_says(target: Live) -> None:
    @fuzzing(0.15, shrink=False)
    @given(messages(words(target), RouterMessage, known(target)))
    def check(data: bytes) -> None:
        if ends(from_router, data, (Stop, RegistrationRefusal, Registered)) is None:
            target.tell_worker(data)

    check()
    target.tell_worker(nested("Submit"))
    target.check_unharmed()


@contextlib.contextmanager
def peer_of(target: Live, epoch: str) -> Iterator[zmq.Socket[bytes]]:
    """A connection to the worker as one of its peers."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        peer.setsockopt(zmq.ROUTING_ID, epoch.encode())
        peer.connect(target.offer.peer.address)
        yield peer
        for ticket in TICKETS:
            peer.send(encode(Abort(TicketId(ticket))))
        # The answer to this comes behind all of it.
        last = TicketId(f"the last of {epoch}")
        reserved(peer, target, last, epoch)
        peer.send(encode(Abort(last)))


def reserved(peer: zmq.Socket[bytes], target: Live, ticket: TicketId, epoch: str) -> Reserved:
    """Have blocks reserved, as a prefill worker does."""
    card = target.offer.card
    prepare = Prepare(
        ticket=ticket,
        secret=SECRET,
        source=PeerAddress(target.offer.worker, epoch, "tcp://127.0.0.1:1"),
        request=RequestId(f"of {ticket}"),
        attempt=0,
        prompt=tuple(range(70)),
        generated=(),
        sampling=SamplingParams(max_tokens=4),
        fingerprint=card.fingerprint,
        layout=card.layout,
    )
    peer.send(encode(prepare))
    while not (isinstance(answer := from_peer(peer.recv()), Reserved) and answer.ticket == ticket):
        pass
    return answer


def test_a_worker_takes_whatever_peers_say(target: Live) -> None:
    with peer_of(target, EPOCHS[0]) as peer:

        @fuzzing(0.15, shrink=False)
        @given(messages(words(target), PeerMessage, known(target)))
        def check(data: bytes) -> None:
            target.note("worker, as a peer", data)
            peer.send(data)

        check()
        peer.send(nested("Prepare"))
    target.check_unharmed()


def frames(target: Live, ticket: TicketId, blocks: tuple[int, ...]) -> st.SearchStrategy[bytes]:
    """What a writer with a ticket may send: headers that are nearly right, and payloads of any length."""
    card = target.offer.card
    header = st.builds(
        Header,
        st.sampled_from([Kind.WRITE, Kind.WRITE, *Kind]),
        st.sampled_from([ticket_key(ticket)] * 4 + [b"k" * 16]),
        st.sampled_from([SECRET] * 4 + [b"x" * 16]),
        st.sampled_from([layout_digest(card.layout)] * 4 + [b"l" * 16]),
        st.one_of(st.sampled_from(blocks), st.integers(0, 2**32 - 1)),
        st.one_of(st.integers(0, 6), st.integers(0, 2**32 - 1)),
        st.sampled_from(["none", "none", *NAMES]),
    ).map(Header.pack)
    payload = st.one_of(
        st.binary(max_size=64), st.integers(0, 5).map(lambda count: b"\xa5" * (count * card.layout.block_bytes))
    )
    return st.lists(st.one_of(header, header, payload), max_size=6).map(b"".join)


def words_of_a_writer(target: Live) -> st.SearchStrategy[bytes]:
    """What somebody may say to the receiver for shared memory, most often of `CURRENT`: messages behind their lengths,
    right or not."""
    said = messages([CURRENT], channel.Message, known(target) | {"ticket": st.just(CURRENT)})
    length = st.integers(0, 2**32 - 1)
    framed = said.map(lambda data: len(data).to_bytes(4, "little") + data)
    wrong = st.builds(lambda data, size: size.to_bytes(4, "little") + data, said, length)
    return st.lists(st.one_of(framed, framed, framed, wrong, st.binary(max_size=20)), max_size=4).map(b"".join)


CURRENT = "granted-0000"
"""Stands for the name, as long, of the ticket that is granted now."""


def test_a_tcp_receiver_takes_whatever_writers_send(target: Live) -> None:
    ticket = TicketId("granted")
    with peer_of(target, "writer-tcp") as peer:
        granted = reserved(peer, target, ticket, "writer-tcp")
        host, _, port = address_of(granted, "tcp").rpartition(":")

        @fuzzing(0.1, shrink=False)
        @given(frames(target, ticket, granted.blocks))
        def check(data: bytes) -> None:
            target.note("the tcp receiver", data)
            with socket.create_connection((host, int(port))) as connection, contextlib.suppress(ConnectionError):
                connection.settimeout(WAIT_S)
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):  # it closes: nothing more can come
                    pass

        check()
        peer.send(encode(Abort(ticket)))
    target.check_unharmed()


def test_a_shm_receiver_takes_whatever_writers_send(target: Live) -> None:
    """A writer that was admitted and breaks off may still write, as long as its process lives, which is this one. It is
    waited for until the ticket's end; so one in a while ends."""
    with peer_of(target, "writer-shm") as peer:
        ticket = TicketId(CURRENT)
        address = address_of(reserved(peer, target, ticket, "writer-shm"), "shm")

        @fuzzing(0.1, shrink=False)
        @given(words_of_a_writer(target))
        def check(data: bytes) -> None:
            nonlocal ticket
            data = data.replace(CURRENT.encode(), ticket.encode())
            target.note("the shm receiver", data)
            with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
                connection.connect(address)
                connection.sendall(data)
            if target.sent % 100 == 0:
                peer.send(encode(Abort(ticket)))
                ticket = TicketId(f"granted-{target.sent // 100:04}")
                reserved(peer, target, ticket, "writer-shm")

        check()
        peer.send(encode(Abort(ticket)))
    target.check_unharmed()


def address_of(granted: Reserved, transport: str) -> str:
    [address] = [each.address for each in granted.endpoints if each.transport == transport]
    return address
