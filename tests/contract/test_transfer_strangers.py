"""Connections that nobody proves to need: slow and silent ones end, and they keep out none that has a ticket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from transfer_link import ALL, LAYOUT, OTHER, SECRET, TICKET, WAIT, Link, make_link, push_all_as, wait_until

from bascule.kv.transfer import listener, stream, tcp
from bascule.kv.transfer.frames import (
    REPLY_BYTES,
    Header,
    Kind,
    Verdict,
    layout_digest,
    pack_reply,
    ticket_key,
)
from bascule.kv.transfer.sealing import SALT_BYTES


@pytest.fixture
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    with ExitStack() as stack:
        yield make_link(request.param, stack)


class Seconds:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


@pytest.mark.parametrize("link", ["tcp", "sealed"], indirect=True)
def test_a_greeting_byte_by_byte_ends_when_its_time_is_over(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = Seconds()
    for module in (tcp, stream):
        monkeypatch.setattr(module, "monotonic", seconds)
    link.grant()
    with connect(link) as raw:
        wait_until(lambda: seconds.asked, "the connection")
        if link.receiver._key:  # type: ignore[attr-defined]
            raw.sendall(header(Kind.SEAL))
            assert len(raw.recv(REPLY_BYTES + SALT_BYTES, socket.MSG_WAITALL)) == REPLY_BYTES + SALT_BYTES
        for byte in header(Kind.ANNOUNCE)[:-1]:
            seconds.now += 1.0
            try:
                raw.sendall(bytes([byte]))
            except ConnectionError:
                break
        assert ended(raw)
    push_all_as(OTHER, link)


@pytest.mark.parametrize("link", ["shm", "tcp", "sealed"], indirect=True)
def test_strangers_close_the_oldest_of_them_and_nobody_with_a_ticket(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_MOST_STRANGERS", 2)
    sender, _ = link.sender()
    link.grant()
    with closing(sender.open(link.receiver.endpoint, TICKET, SECRET)) as session, ExitStack() as stack:
        strangers = [stack.enter_context(connect(link)) for _ in range(3)]
        assert ended(strangers[0])
        push_all_as(OTHER, link)
        assert ended(strangers[1])
        session.push(ALL)
        session.flush()
        strangers[2].settimeout(0)
        with pytest.raises(BlockingIOError):
            strangers[2].recv(1)


@pytest.mark.parametrize("link", ["tcp"], indirect=True)
@pytest.mark.parametrize("kind", [Kind.ANNOUNCE, Kind.WRITE])
def test_a_revocation_ends_the_connection_of_a_writer_that_is_stopped(link: Link, kind: Kind) -> None:
    """Between two frames, and in the middle of one."""
    with stopped_writer(link, kind) as raw:
        assert link.receiver.revoke(TICKET)
        assert raw.recv(REPLY_BYTES) == pack_reply(Verdict.REVOKED)
        assert ended(raw)
    assert link.receiver.refusals == {"revoked": 1}
    wait_until(lambda: not connections(), "its thread")


@pytest.mark.parametrize("link", ["tcp"], indirect=True)
def test_the_normal_end_ends_the_connection_and_refuses_nothing(link: Link) -> None:
    with stopped_writer(link, Kind.ANNOUNCE) as raw:
        link.receiver.finish(TICKET)
        assert ended(raw)
        wait_until(lambda: not connections(), "its thread")
    assert not link.receiver.refusals


@pytest.mark.parametrize("link", ["tcp"], indirect=True)
def test_a_frame_that_stands_still_for_too_long_ends(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_STALL_SECONDS", 0.05)
    with stopped_writer(link, Kind.WRITE) as raw:
        assert ended(raw)


def stopped_writer(link: Link, kind: Kind) -> socket.socket:
    """One that has announced itself, and sent a part of a frame if `kind` is `WRITE`."""
    link.grant()
    raw = connect(link)
    raw.sendall(header(Kind.ANNOUNCE))
    assert raw.recv(REPLY_BYTES, socket.MSG_WAITALL) == pack_reply(Verdict.DONE)
    if kind is Kind.WRITE:
        raw.sendall(header(kind, 3) + b"\1" * 1000)
        wait_until(lambda: link.arena.bytes[0, 0, 999] == 1, "the part that was sent")
    return raw


def ended(raw: socket.socket) -> bool:
    """Waits for it."""
    try:
        return raw.recv(1) == b""
    except ConnectionError:
        return True


def connections() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kv-tcp-connection"]


def connect(link: Link) -> socket.socket:
    endpoint = link.receiver.endpoint
    if endpoint.transport == "shm":
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(WAIT)
        local.connect(endpoint.address)
        return local
    host, port = endpoint.address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def header(kind: Kind, count: int = 0) -> bytes:
    return Header(kind, ticket_key(TICKET), SECRET, layout_digest(LAYOUT), 0, count).pack()
