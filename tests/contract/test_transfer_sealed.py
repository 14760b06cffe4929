"""KV over TCP with a cluster key: nobody on the way reads it, and nothing but what the sender sealed is taken."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_link import (
    ALL,
    BLOCKS,
    CLUSTER_KEY,
    LAYOUT,
    OTHER,
    SECRET,
    TICKET,
    WAIT,
    Link,
    make_link,
    moves,
    push_all_as,
    revoke_behind_the_last_byte,
    wait_until,
)

from bascule.kv.arena import Arena
from bascule.kv.transfer.base import Endpoint, TransferError
from bascule.kv.transfer.frames import (
    REPLY_BYTES,
    Header,
    Kind,
    Verdict,
    layout_digest,
    pack_reply,
    payload,
    ticket_key,
    unpack_reply,
)
from bascule.kv.transfer.sealing import SALT_BYTES, TAG_BYTES, Forged, Sealed, hello, seals
from bascule.kv.transfer.tcp_sender import TcpSender

Parts = list[bytes]
"""What a sender says, one by one: a header, or a batch of records (the first with its header)."""
FEW = (5, 8)
"""First block and number, of which two batches are made."""


@pytest.fixture
def sealed() -> Iterator[Link]:
    with ExitStack() as stack:
        yield make_link("sealed", stack)


def connect(link: Link) -> socket.socket:
    host, port = link.receiver.endpoint.address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def exactly(raw: socket.socket, count: int) -> bytes:
    data = raw.recv(count, socket.MSG_WAITALL)
    assert len(data) in (0, count)
    return data


def shake(raw: socket.socket, said: Header, secret: bytes = SECRET, cluster: bytes = CLUSTER_KEY) -> Sealed:
    """The sender's end of a connection that begins with `said`."""
    raw.sendall(said.pack())
    answer = exactly(raw, REPLY_BYTES + SALT_BYTES)
    assert unpack_reply(answer[:REPLY_BYTES]) is Verdict.DONE
    return seals(cluster, secret, said, answer[REPLY_BYTES:])[0]


def said_first() -> Header:
    return hello(ticket_key(TICKET), layout_digest(LAYOUT))


def header(kind: Kind, first: int = 0, count: int = 0) -> bytes:
    return Header(kind, ticket_key(TICKET), SECRET, layout_digest(LAYOUT), first, count).pack()


def handoff(end: Sealed, source: Arena) -> Parts:
    """All that the sender of a few blocks says, sealed."""
    first, count = FEW
    parts = [end.wrap(header(Kind.ANNOUNCE))]
    for buffers in end.outgoing(header(Kind.WRITE, first, count), payload(source, first, count)):
        parts.append(b"".join(buffers.pending()))
    return [*parts, end.wrap(header(Kind.FLUSH))]


def answers(raw: socket.socket, end: Sealed) -> list[Verdict]:
    """All that comes until the receiver hangs up, or waits for more than it will get."""
    raw.shutdown(socket.SHUT_WR)
    found = []
    while data := exactly(raw, REPLY_BYTES + TAG_BYTES):
        found.append(unpack_reply(end.unwrap(data)))
    return found


def test_what_is_sealed_as_it_should_be_arrives(sealed: Link) -> None:
    """So that the refusals below are not of everything."""
    _, source = sealed.sender()
    sealed.grant()
    with connect(sealed) as raw:
        end = shake(raw, said_first())
        parts = handoff(end, source)
        assert len(parts) == 4, "an announcement, a write in two parts, a flush"
        raw.sendall(b"".join(parts))
        assert answers(raw, end) == [Verdict.DONE, Verdict.DONE]
    first, count = FEW
    assert np.array_equal(sealed.arena.bytes[:, first : first + count], source.bytes[:, first : first + count])
    assert not sealed.receiver.refusals


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda parts: [parts[0], parts[2], parts[1], parts[3]], id="reordered"),
        pytest.param(lambda parts: [*parts[:3], *parts[1:]], id="repeated"),
        pytest.param(lambda parts: [parts[0], parts[0], *parts[1:]], id="announced twice"),
        pytest.param(lambda parts: [parts[0], *parts[2:]], id="left out"),
        pytest.param(lambda parts: [*parts[:2], parts[2][:-TAG_BYTES], parts[3]], id="shortened"),
        pytest.param(lambda parts: [*parts[:2], bytes(TAG_BYTES), *parts[2:]], id="put in between"),
        pytest.param(lambda parts: [*parts[:2], bytes(len(parts[2])), parts[3]], id="put in its place"),
    ],
)
def test_parts_that_come_otherwise_than_they_were_sealed_are_refused_and_counted(
    sealed: Link, change: Callable[[Parts], Parts], caplog: pytest.LogCaptureFixture
) -> None:
    _, source = sealed.sender()
    sealed.grant()
    with connect(sealed) as raw:
        end = shake(raw, said_first())
        raw.sendall(b"".join(change(handoff(end, source))))
        assert answers(raw, end) == [Verdict.DONE, Verdict.FORGED]
    first, count = FEW
    assert not np.delete(sealed.arena.bytes, range(first, first + count), axis=1).any()
    assert sealed.receiver.refusals == {"forged": 1}
    assert "not authentic" in caplog.text and "127.0.0.1:" in caplog.text
    push_all_as(OTHER, sealed)


@pytest.mark.parametrize("kept", [30, 80, 81, 1000, -81, -80, -1])
def test_a_handoff_that_is_cut_anywhere_is_not_called_done(sealed: Link, kept: int) -> None:
    _, source = sealed.sender()
    sealed.grant()
    with connect(sealed) as raw:
        end = shake(raw, said_first())
        raw.sendall(b"".join(handoff(end, source))[:kept])
        assert answers(raw, end) == ([] if kept == 30 else [Verdict.DONE]), "the announcement alone"
    push_all_as(OTHER, sealed)


def test_a_change_anywhere_is_never_taken(sealed: Link, caplog: pytest.LogCaptureFixture) -> None:
    """Any byte of a whole handoff, its beginning in clear included (but for two that mean nothing)."""
    caplog.set_level(logging.INFO)
    _, source = sealed.sender()
    sealed.grant()
    seen: set[str] = set()

    @given(
        place=st.integers(0, 1 << 20),
        flip=st.integers(1, 255),
        greet=st.none() | st.sampled_from([4, 5, *range(8, 64)]),
    )
    @settings(max_examples=60, deadline=None)
    def send(place: int, flip: int, greet: int | None) -> None:
        with connect(sealed) as raw:
            said = said_first()
            first_words = bytearray(said.pack())
            if greet is not None:
                first_words[greet] ^= flip
            raw.sendall(first_words)
            answer = exactly(raw, REPLY_BYTES)
            if (verdict := unpack_reply(answer)) is not Verdict.DONE:
                seen.add(verdict.words)
                return
            end = seals(CLUSTER_KEY, SECRET, said, exactly(raw, SALT_BYTES))[0]
            data = bytearray(b"".join(handoff(end, source)))
            if greet is None:
                data[place % len(data)] ^= flip
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            told = b""
            while more := raw.recv(1 << 16):
                told += more
        replies = len(told) // (REPLY_BYTES + TAG_BYTES)
        announced = greet is None and place % len(data) >= 80
        assert replies == 1 + announced, "the announcement, unless it was changed, and a refusal"
        if announced:
            assert unpack_reply(end.unwrap(told[: REPLY_BYTES + TAG_BYTES])) is Verdict.DONE
            assert unpack_reply(end.unwrap(told[REPLY_BYTES + TAG_BYTES :])) is Verdict.FORGED

    send()
    assert sealed.receiver.refusals["forged"] > 10
    assert seen <= {"malformed", "unknown ticket", "not sealed"}
    first, count = FEW
    assert not np.delete(sealed.arena.bytes, range(first, first + count), axis=1).any()
    assert "dropped a connection" not in caplog.text
    push_all_as(OTHER, sealed)


def test_a_handoff_that_was_listened_to_cannot_be_said_again(sealed: Link) -> None:
    """Word for word, its beginning included, while the ticket is still open."""
    _, source = sealed.sender()
    sealed.grant()
    said = said_first()
    with connect(sealed) as raw:
        end = shake(raw, said)
        parts = handoff(end, source)
        raw.sendall(b"".join(parts))
        assert answers(raw, end) == [Verdict.DONE, Verdict.DONE]
    sealed.arena.bytes[:] = 9
    with connect(sealed) as raw:
        again = shake(raw, said)
        raw.sendall(b"".join(parts))
        assert answers(raw, again) == [Verdict.FORGED]
    assert (sealed.arena.bytes == 9).all()


def test_what_one_end_says_cannot_be_sent_back_to_it() -> None:
    """Both directions have keys of their own: the first record of one does not open as the first of the other."""
    sender, receiver = seals(CLUSTER_KEY, SECRET, said_first(), bytes(SALT_BYTES))
    words = [end.wrap(bytes(64)) for end in (sender, receiver)]
    assert words[0] != words[1]
    for end, word in zip((sender, receiver), words, strict=True):
        with pytest.raises(Forged):
            end.unwrap(word)


@pytest.mark.parametrize(("secret", "cluster"), [(b"w" * 16, CLUSTER_KEY), (SECRET, b"w" * 32)])
def test_neither_the_secret_nor_the_cluster_key_alone_is_enough(sealed: Link, secret: bytes, cluster: bytes) -> None:
    sealed.grant()
    with connect(sealed) as raw:
        end = shake(raw, said_first(), secret, cluster)
        raw.sendall(end.wrap(header(Kind.ANNOUNCE)))
        raw.shutdown(socket.SHUT_WR)
        assert exactly(raw, REPLY_BYTES + TAG_BYTES)
        assert raw.recv(1) == b""
    assert sealed.receiver.refusals == {"forged": 1}


def test_connections_of_one_ticket_have_keys_of_their_own(sealed: Link) -> None:
    sealed.grant()
    said = said_first()
    words = []
    for each in (said, said, said_first()):
        with connect(sealed) as raw:
            words.append(shake(raw, each).wrap(header(Kind.ANNOUNCE)))
    assert len(set(words)) == 3


@pytest.mark.parametrize(("with_key", "refusal"), [("receiver", "not sealed"), ("sender", "no key")])
def test_a_sealed_end_and_one_in_clear_have_nothing_to_do_with_each_other(with_key: str, refusal: str) -> None:
    with ExitStack() as stack:
        link = make_link("sealed" if with_key == "receiver" else "tcp", stack)
        _, source = link.sender()
        link.grant()
        key = CLUSTER_KEY if with_key == "sender" else None
        sender = stack.enter_context(closing(TcpSender(source, key=key)))
        with pytest.raises(TransferError, match=f"{refusal}; give all workers the same --cluster-key-file"):
            sender.open(link.receiver.endpoint, TICKET, SECRET)
        assert link.receiver.refusals == {refusal: 1}


def test_an_answer_that_the_receiver_has_not_sealed_is_not_believed(sealed: Link) -> None:
    """Someone in between who lets the announcement through and answers the flush himself."""
    far = connect(sealed)

    def between(server: socket.socket) -> None:
        near, _ = server.accept()
        with near, far:
            far.sendall(exactly(near, 64))
            near.sendall(exactly(far, REPLY_BYTES + SALT_BYTES))
            far.sendall(exactly(near, 64 + TAG_BYTES))
            near.sendall(exactly(far, REPLY_BYTES + TAG_BYTES))
            near.recv(1 << 20)
            near.sendall(pack_reply(Verdict.DONE) + bytes(TAG_BYTES))

    _, source = sealed.sender()
    sealed.grant()
    with socket.create_server(("127.0.0.1", 0)) as server, closing(TcpSender(source, key=CLUSTER_KEY)) as sender:
        threading.Thread(target=between, args=(server,), daemon=True).start()
        endpoint = Endpoint("tcp", "{}:{}".format(*server.getsockname()), sealed.receiver.endpoint.machine)
        session = sender.open(endpoint, TICKET, SECRET)
        with pytest.raises(TransferError, match="not what the other end has sealed"):
            session.flush()


def test_nothing_of_the_kv_or_the_secret_can_be_read_on_the_way(sealed: Link) -> None:
    said: list[bytes] = []
    heard = TcpSender(sealed.sender(fill=7)[1], key=CLUSTER_KEY)
    sealed.grant()
    with closing(heard):
        session = heard.open(sealed.receiver.endpoint, TICKET, SECRET)
        send = session._send
        session._send = lambda kind, memory: (said.append(b"".join(memory.pending())), send(kind, memory))[1]  # type: ignore[method-assign]
        session.push(ALL)
        session.push(moves({0: 1, 2: 3}))
        session.flush()
    told = b"".join(said)
    assert len(told) > BLOCKS * LAYOUT.block_bytes
    assert bytes([7]) * 8 not in told and SECRET not in told
    assert (sealed.arena.bytes == 7).all()


def test_a_revocation_after_the_last_byte_and_before_it_is_opened_counts(
    sealed: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, _ = sealed.sender()
    sealed.grant()
    sealed.arena.bytes[:] = 9
    session = sender.open(sealed.receiver.endpoint, TICKET, SECRET)
    revoke_behind_the_last_byte(sealed, monkeypatch)
    with pytest.raises(TransferError):
        session.push(ALL[:1])
        session.flush()
    assert sealed.receiver.refusals == {"revoked": 1}
    assert (sealed.arena.bytes == 9).all()


def test_records_that_come_after_the_revocation_are_not_opened(sealed: Link) -> None:
    """All but the last byte of a batch has been received before."""
    _, source = sealed.sender()
    sealed.grant()
    with connect(sealed) as raw:
        end = shake(raw, said_first())
        data = b"".join(handoff(end, source)[:2])
        raw.sendall(data[:-1])
        push_all_as(OTHER, sealed)
        wait_until(lambda: sealed.receiver._grants[ticket_key(TICKET)].writers, "the announcement")  # type: ignore[attr-defined]
        assert sealed.receiver.revoke(TICKET)
        sealed.arena.bytes[:] = 9
        raw.sendall(data[-1:])
        wait_until(lambda: sealed.receiver.refusals.get("revoked"), "the refusal")
    assert (sealed.arena.bytes == 9).all()
