"""What the real transports must survive: stopped and killed writers, silent peers, garbage, frames cut anywhere."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from time import sleep

import msgspec
import numpy as np
import pytest
from transfer_link import (
    ALL,
    BLOCKS,
    LAYOUT,
    OTHER,
    SECRET,
    TICKET,
    WAIT,
    Link,
    PushingThread,
    make_link,
    push_all_as,
    start_writer,
    wait_until,
)

from bascule.kv.transfer.base import Endpoint, TransferError
from bascule.kv.transfer.channel import Announce, Channel, Closing, Flush, Welcome
from bascule.kv.transfer.frames import (
    HEADER_BYTES,
    Header,
    Kind,
    Verdict,
    layout_digest,
    pack_reply,
    payload,
    ticket_key,
)
from bascule.kv.transfer.shm import ShmSender, _answers
from bascule.kv.transfer.tcp_sender import TcpSender

WRITER_WITH_HEIR = """
import socket, subprocess, sys, msgspec
from bascule.kv.transfer.base import Endpoint
from bascule.kv.transfer.channel import Announce, Channel
from bascule.types import KVLayout

connection = socket.socket(socket.AF_UNIX)
connection.connect(msgspec.json.decode(sys.argv[1], type=Endpoint).address)
channel = Channel(connection)
channel.send(Announce("ticket", b"s" * 16, msgspec.json.decode(sys.argv[2], type=KVLayout)), 10)
channel.receive(10)
heir = subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL, pass_fds=[connection.fileno()])
print(heir.pid, flush=True)
heir.wait()
"""

GARBLED_WRITER = """
import socket, sys, msgspec
from bascule.kv.transfer.base import Endpoint
from bascule.kv.transfer.channel import Announce, Channel, Closing
from bascule.types import KVLayout

connection = socket.socket(socket.AF_UNIX)
connection.connect(msgspec.json.decode(sys.argv[1], type=Endpoint).address)
channel = Channel(connection)
channel.send(Announce("ticket", b"s" * 16, msgspec.json.decode(sys.argv[2], type=KVLayout)), 10)
channel.receive(10)
message = msgspec.msgpack.encode(Closing())[:-1] + bytes([0xE6])
connection.sendall(len(message).to_bytes(4, "little") + message)
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def shm() -> Iterator[Link]:
    with ExitStack() as stack:
        yield make_link("shm", stack)


@pytest.fixture
def tcp() -> Iterator[Link]:
    with ExitStack() as stack:
        yield make_link("tcp", stack)


# ---------------------------------------------------------------- shm


def test_a_writer_that_closes_amid_a_flush_is_safe_though_its_process_lives_on(shm: Link) -> None:
    """It shuts its reading side before its last word, so that the answer to its flush finds nobody."""
    shm.grant()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(shm.receiver.endpoint.address)
        channel = Channel(connection)
        channel.send(Announce(TICKET, SECRET, LAYOUT), WAIT)
        assert isinstance(channel.receive(WAIT), Welcome)
        connection.shutdown(socket.SHUT_RD)
        channel.send(Flush(), WAIT)
        sleep(0.05)
        assert not shm.receiver.revoke(TICKET)
        channel.send(Closing(), WAIT)
        wait_until(lambda: shm.safe == [TICKET], "on_safe")
        os.close(channel.take_fd())


def test_a_writer_that_said_it_has_closed_makes_a_revoked_ticket_safe(shm: Link) -> None:
    sender, _ = shm.sender()
    shm.grant()
    session = sender.open(shm.receiver.endpoint, TICKET, SECRET)
    assert not shm.receiver.revoke(TICKET)
    assert not shm.receiver.revoke(TICKET)
    assert shm.safe == []
    session.close()
    wait_until(lambda: shm.safe, "on_safe")
    assert shm.safe == [TICKET]
    assert shm.receiver.revoke(TICKET)


def test_a_writer_that_closed_before_the_revocation_leaves_nothing_to_wait_for(shm: Link) -> None:
    sender, _ = shm.sender()
    shm.grant(1)
    sender.open(shm.receiver.endpoint, TICKET, SECRET).close()
    wait_until(lambda: shm.receiver.revoke(TICKET), "the writer's last word")


def test_the_word_of_a_writer_by_other_means_counts(shm: Link) -> None:
    sender, _ = shm.sender()
    shm.grant()
    session = sender.open(shm.receiver.endpoint, TICKET, SECRET)
    assert not shm.receiver.revoke(TICKET)
    shm.receiver.closed(TICKET)
    assert shm.receiver.revoke(TICKET)
    session.close()
    assert shm.safe == []


def test_two_writers_of_one_ticket_must_both_be_gone(shm: Link) -> None:
    shm.grant()
    sessions = [shm.sender()[0].open(shm.receiver.endpoint, TICKET, SECRET) for _ in range(2)]
    assert not shm.receiver.revoke(TICKET)
    sessions[0].close()
    sleep(0.1)
    assert shm.safe == []
    sessions[1].close()
    wait_until(lambda: shm.safe, "on_safe")


def test_a_revoked_ticket_admits_no_further_writer(shm: Link) -> None:
    sender, _ = shm.sender()
    shm.grant()
    session = sender.open(shm.receiver.endpoint, TICKET, SECRET)
    assert not shm.receiver.revoke(TICKET)
    with pytest.raises(TransferError, match="revoked"):
        sender.open(shm.receiver.endpoint, TICKET, SECRET)
    session.close()


def test_a_lost_connection_is_not_a_writers_last_word(shm: Link) -> None:
    shm.grant()
    announce(shm).close()
    sleep(0.1)
    assert not shm.receiver.revoke(TICKET)
    sleep(0.1)
    assert shm.safe == []
    shm.receiver.closed(TICKET)
    assert shm.receiver.revoke(TICKET)


def test_a_dead_writer_whose_connection_another_process_keeps_open_is_gone(shm: Link) -> None:
    shm.grant()
    arguments = [msgspec.json.encode(value).decode() for value in (shm.receiver.endpoint, LAYOUT)]
    writer = subprocess.Popen([sys.executable, "-c", WRITER_WITH_HEIR, *arguments], stdout=subprocess.PIPE, text=True)
    shm.stack.callback(writer.kill)
    assert writer.stdout is not None
    with writer.stdout:
        heir = int(writer.stdout.readline())
        shm.stack.callback(os.kill, heir, signal.SIGKILL)
        assert not shm.receiver.revoke(TICKET)
        writer.kill()
        writer.wait(WAIT)
        wait_until(lambda: shm.safe, "on_safe")


def test_a_writer_whose_word_was_garbled_is_under_suspicion_until_its_process_is_gone(shm: Link) -> None:
    """The word may have been its last. One bit of it makes a text that is none."""
    shm.grant()
    arguments = [msgspec.json.encode(shm.receiver.endpoint).decode(), msgspec.json.encode(LAYOUT).decode()]
    command = [sys.executable, "-c", GARBLED_WRITER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        shm.stack.callback(writer.kill)
        assert writer.stdout is not None and writer.stdout.readline() == "sent\n"
        sleep(0.1)
        assert not shm.receiver.revoke(TICKET)
        assert shm.safe == []
        writer.kill()
    wait_until(lambda: shm.safe == [TICKET], "on_safe")


def test_a_stopped_writer_keeps_its_blocks_unsafe_until_it_is_killed(shm: Link) -> None:
    shm.grant()
    writer = start_writer(shm)
    os.kill(writer.pid, signal.SIGSTOP)
    assert not shm.receiver.revoke(TICKET)
    sleep(0.1)
    assert shm.safe == []
    writer.kill()
    writer.wait(WAIT)
    wait_until(lambda: shm.safe, "on_safe")
    assert shm.safe == [TICKET]


def test_shared_memory_is_refused_between_hosts(shm: Link) -> None:
    sender, _ = shm.sender()
    here = shm.receiver.endpoint
    with pytest.raises(TransferError, match="another host"):
        sender.open(Endpoint(here.transport, here.address, "elsewhere"), TICKET, SECRET)


def test_the_socket_lies_in_a_private_directory_that_goes_with_the_receiver(shm: Link) -> None:
    directory = os.path.dirname(shm.receiver.endpoint.address)
    assert os.stat(directory).st_mode & 0o777 == 0o700
    shm.receiver.close()
    assert not os.path.exists(directory)


def test_a_sender_forgets_the_memory_of_receivers_that_are_gone(shm: Link) -> None:
    sender, _ = shm.sender()
    assert isinstance(sender, ShmSender)
    shm.grant()
    sender.open(shm.receiver.endpoint, TICKET, SECRET).close()
    shm.receiver.close()
    with ExitStack() as stack:
        successor = make_link("shm", stack)
        successor.grant()
        sender.open(successor.receiver.endpoint, TICKET, SECRET).close()
        assert list(sender._mapped) == [successor.receiver.endpoint.address]


def test_a_receiver_that_is_stopped_and_has_no_room_for_a_connection_is_not_gone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        stopped = stack.enter_context(socket.socket(socket.AF_UNIX))
        stopped.bind(str(tmp_path / "kv"))
        stopped.listen(0)
        kind, failed = socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0
        while not failed:
            failed = stack.enter_context(socket.socket(socket.AF_UNIX, kind)).connect_ex(stopped.getsockname())
        assert _answers(stopped.getsockname())
    assert not _answers(str(tmp_path / "kv"))


# ---------------------------------------------------------------- processes and raw bytes


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_receiver_outlives_a_writer_killed_in_mid_push(transport: str, request: pytest.FixtureRequest) -> None:
    link: Link = request.getfixturevalue(transport)
    link.grant()
    writer = start_writer(link)
    writer.kill()
    writer.wait(WAIT)
    if not link.receiver.revoke(TICKET):
        wait_until(lambda: link.safe, "on_safe")
    push_all_as(OTHER, link)


def test_garbage_is_refused_and_counted(tcp: Link) -> None:
    with connect(tcp) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: kv\r\n" + b"x" * 4096)
        wait_until(lambda: tcp.receiver.refusals.get("malformed"), "the refusal")
        raw.settimeout(WAIT)
        assert raw.recv(1 << 16)
        assert raw.recv(1 << 16) == b""
    push_all_as(OTHER, tcp)


def test_a_connection_that_says_nothing_ends_with_the_receiver(tcp: Link) -> None:
    names = [f"kv-tcp{part}" for part in ("", "-connection")]
    with connect(tcp):
        wait_until(lambda: {thread.name for thread in threading.enumerate()}.issuperset(names), "the connection")
        tcp.receiver.close()
        assert not [thread for thread in threading.enumerate() if thread.name in names]


@pytest.mark.parametrize(("first", "count"), [(0, BLOCKS + 1), (BLOCKS - 1, 2), (2**32 - 1, 2**32 - 1), (3, 1)])
def test_a_frame_that_reaches_outside_the_grant_is_refused(tcp: Link, first: int, count: int) -> None:
    tcp.grant(*(block for block in range(BLOCKS) if block != 3))
    with connect(tcp) as raw:
        raw.sendall(header(Kind.WRITE, first, count) + b"x" * 4096)
        wait_until(lambda: tcp.receiver.refusals.get("outside grant"), "the refusal")
    assert not tcp.arena.bytes.any()


def test_a_writer_that_stalls_in_mid_frame_blocks_no_other_ticket(tcp: Link) -> None:
    tcp.grant(0, 1, 2)
    with connect(tcp) as raw:
        raw.sendall(header(Kind.WRITE, 0, 3) + b"\1" * 1000)
        wait_until(lambda: tcp.arena.bytes[0, 0, 999] == 1, "the part that was sent")
        push_all_as(OTHER, tcp)
        assert tcp.receiver.revoke(TICKET)
        tcp.arena.bytes[:] = 9
        raw.sendall(b"\1" * (3 * LAYOUT.block_bytes - 1000))
        wait_until(lambda: tcp.receiver.refusals.get("revoked"), "the refusal")
    assert (tcp.arena.bytes == 9).all()


def test_a_frame_arrives_whole_however_it_is_cut(tcp: Link) -> None:
    _, source = tcp.sender()
    tcp.grant(5, 6)
    data = header(Kind.WRITE, 5, 2) + b"".join(payload(source, 5, 2)) + header(Kind.FLUSH, 0, 0)
    draw = random.Random(0)
    with connect(tcp) as raw:
        while data:
            size = draw.choice([1, 7, 63, 4099, 60_000])
            raw.sendall(data[:size])
            data = data[size:]
        raw.settimeout(WAIT)
        assert raw.recv(100)
    assert np.array_equal(tcp.arena.bytes[:, 5:7], source.bytes[:, 5:7])


def test_a_push_that_is_stuck_can_be_closed_from_another_thread(tcp: Link) -> None:
    """The peer welcomes the sender and then reads no more."""
    accepted: list[socket.socket] = []

    def welcome_only(server: socket.socket) -> None:
        accepted.append(server.accept()[0])
        accepted[0].recv(HEADER_BYTES)
        accepted[0].sendall(pack_reply(Verdict.DONE))

    with socket.create_server(("127.0.0.1", 0)) as server, closing(TcpSender(tcp.arena, patience=1000)) as sender:
        threading.Thread(target=welcome_only, args=(server,), daemon=True).start()
        endpoint = Endpoint("tcp", "{}:{}".format(*server.getsockname()), tcp.receiver.endpoint.machine)
        session = sender.open(endpoint, TICKET, SECRET)
        pushing = PushingThread(lambda: session.push(ALL))
        sleep(0.3)
        closer = threading.Thread(target=session.close, daemon=True)
        closer.start()
        closer.join(WAIT)
        assert not closer.is_alive()
        pushing.join()
        assert isinstance(pushing.error, TransferError)
        accepted[0].close()


def test_a_receiver_that_takes_nothing_is_given_up(tcp: Link) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = Endpoint("tcp", "{}:{}".format(*silent.getsockname()), tcp.receiver.endpoint.machine)
        with closing(TcpSender(tcp.arena, patience=0.1)) as sender, pytest.raises(TransferError, match="0 of 8 bytes"):
            sender.open(endpoint, TICKET, SECRET)


def announce(link: Link) -> Channel:
    """An admitted writer that is no sender."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(link.receiver.endpoint.address)
    channel = Channel(connection)
    channel.send(Announce(TICKET, SECRET, LAYOUT), WAIT)
    assert isinstance(channel.receive(WAIT), Welcome)
    return channel


def connect(link: Link) -> socket.socket:
    host, port = link.receiver.endpoint.address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def header(kind: Kind, first: int, count: int) -> bytes:
    return Header(kind, ticket_key(TICKET), SECRET, layout_digest(LAYOUT), first, count).pack()
