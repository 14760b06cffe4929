"""Coded blocks over every transport: what the codec makes of them arrives, only where and as long as it is granted."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
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
    moves,
    push_all_as,
    revoke_behind_the_last_byte,
    wait_until,
)

from bascule.kv.arena import Arena
from bascule.kv.codecs import NAMES, codec_named
from bascule.kv.transfer.base import Pushed, TransferError
from bascule.kv.transfer.coding import arriving, blocks_at_a_time
from bascule.kv.transfer.frames import (
    Buffers,
    Header,
    Kind,
    Verdict,
    layout_digest,
    payload,
    ticket_key,
    unpack_reply,
)
from bascule.kv.transfer.stream import Stream

LOSSY = NAMES[1:]
INT8 = codec_named("int8", LAYOUT)
GOOD: dict[str, Any] = {
    "said": "int8",
    "meant": "int8",
    "first": 8,
    "count": 6,
    "damage": [],
    "spoilt": None,
    "change": 0,
}
PAIRS = {3: 9, 4: 10, 5: 11, 20: 2, 40: 41, 7: 63}


@pytest.fixture(params=["loopback", "tcp", "sealed"])
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    with ExitStack() as stack:
        yield make_link(request.param, stack, LOSSY)


@pytest.fixture
def tcp() -> Iterator[Link]:
    with ExitStack() as stack:
        yield make_link("tcp", stack, LOSSY)


def numbers(arena: Arena) -> NDArray[np.float32]:
    """The same memory as numbers, [planes, blocks, n]."""
    return arena.bytes.view(np.float32)


def fill(arena: Arena, seed: int = 2) -> None:
    """Numbers that every codec can represent."""
    numbers(arena)[:] = np.random.default_rng(seed).standard_normal(numbers(arena).shape, np.float32)


def through(name: str, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    codec = codec_named(name, LAYOUT)
    return arriving(codec, codec.encode(blocks))


# ---------------------------------------------------------------- what arrives


@pytest.mark.parametrize("pairs", [PAIRS, {block: block for block in range(BLOCKS)}], ids=["few", "all"])
@pytest.mark.parametrize("name", LOSSY)
def test_what_the_codec_makes_of_the_blocks_arrives_and_nothing_else_changes(
    link: Link, name: str, pairs: dict[int, int]
) -> None:
    sender, source = link.sender()
    fill(source)
    link.arena.bytes[:] = 3
    link.grant(*pairs.values())
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    codec = codec_named(name, LAYOUT)
    pushed = session.push(moves(pairs), codec)
    session.flush()
    expected = np.full_like(link.arena.bytes, 3)
    expected[:, list(pairs.values())] = through(name, source.bytes[:, list(pairs)])
    assert np.array_equal(link.arena.bytes, expected)
    assert not np.array_equal(link.arena.bytes[:, list(pairs.values())], source.bytes[:, list(pairs)])
    assert pushed.wire_bytes == len(pairs) * codec.record_bytes < len(pairs) * LAYOUT.block_bytes
    assert list(pushed.coded) == list(range(len(pairs)))
    assert list(pushed.coded.values()) == link.arena.checksums(list(pairs.values()), LAYOUT.block_size)


def test_shared_memory_takes_blocks_as_they_are() -> None:
    with ExitStack() as stack:
        link = make_link("shm", stack)
        sender, source = link.sender()
        fill(source)
        link.grant()
        session = sender.open(link.receiver.endpoint, TICKET, SECRET)
        assert session.push(ALL, INT8) == Pushed(BLOCKS * LAYOUT.block_bytes)
        session.flush()
        assert np.array_equal(link.arena.bytes, source.bytes)
        session.close()


def test_what_a_codec_has_no_code_for_arrives_as_it_is_and_is_not_called_coded(link: Link) -> None:
    assert 1 < blocks_at_a_time(LAYOUT) < BLOCKS, "some pieces can be coded and one cannot"
    sender, source = link.sender()
    fill(source)
    numbers(source)[2, 30, 100] = np.nan
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    pushed = session.push(ALL, INT8)
    session.flush()
    assert 30 not in pushed.coded and 0 in pushed.coded and BLOCKS - 1 in pushed.coded
    for block in range(BLOCKS):
        sent = source.bytes[:, block : block + 1]
        arrived = through("int8", sent) if block in pushed.coded else sent
        assert np.array_equal(link.arena.bytes[:, block : block + 1], arrived)
    exact = BLOCKS - len(pushed.coded)
    assert pushed.wire_bytes == exact * LAYOUT.block_bytes + len(pushed.coded) * INT8.record_bytes


def test_blocks_as_they_are_may_follow_coded_ones(link: Link) -> None:
    sender, source = link.sender()
    fill(source)
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    session.push(moves({0: 0, 1: 1}), INT8)
    session.push(moves({2: 2}))
    session.flush()
    assert np.array_equal(link.arena.bytes[:, :2], through("int8", source.bytes[:, :2]))
    assert np.array_equal(link.arena.bytes[:, 2], source.bytes[:, 2])


def test_a_link_that_waits_for_the_codec_is_told_from_one_that_still_sends(tcp: Link) -> None:
    """Coding is idle time before there is anything to send, and not while bytes wait for a peer that reads none."""
    sender, source = tcp.sender()
    fill(source)
    tcp.grant()
    session = sender.open(tcp.receiver.endpoint, TICKET, SECRET)
    assert session.push(ALL[:1], INT8).idle_s > 0
    assert session.push(ALL[1:2]).idle_s == 0
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        stream = Stream(near)
        assert not stream.has_unsent()
        while stream.send_some(Buffers([memoryview(bytes(1 << 20))])):
            pass
        assert stream.has_unsent()
        with far:
            far.settimeout(WAIT)
            wait_until(lambda: far.recv(1 << 22) and not stream.has_unsent(), "the rest to be sent")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("transport", ["loopback", "tcp"])
def test_a_codec_that_the_receiver_does_not_allow_is_refused(transport: str) -> None:
    with ExitStack() as stack:
        link = make_link(transport, stack, ["int8"])
        sender, source = link.sender()
        fill(source)
        link.grant()
        session = sender.open(link.receiver.endpoint, TICKET, SECRET)
        with pytest.raises(TransferError, match="codec not allowed"):
            session.push(ALL, codec_named("int4", LAYOUT))
            session.flush()
        assert link.receiver.refusals["codec not allowed"] == 1
        assert not link.arena.bytes.any()


def test_coded_blocks_outside_the_grant_are_not_written(link: Link) -> None:
    sender, source = link.sender()
    fill(source)
    link.grant(4, 5, 6)
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    with pytest.raises(TransferError):
        session.push(moves({5: 5, 6: 6, 7: 7}), INT8)
        session.flush()
    assert not np.delete(link.arena.bytes, [4, 5, 6], axis=1).any()


def test_memory_reused_after_a_revocation_in_mid_push_of_coded_blocks_is_untouched(link: Link) -> None:
    sender, source = link.sender()
    numbers(source)[:] = 1.0
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    pushing = PushingThread(lambda: session.push(ALL, INT8))
    wait_until(lambda: link.arena.bytes[0, 0].any(), "the first block")
    assert link.receiver.revoke(TICKET)
    link.arena.bytes[:] = 9
    pushing.join()
    assert isinstance(pushing.error, TransferError)
    assert (link.arena.bytes == 9).all()


def test_records_whose_end_comes_after_the_revocation_are_not_decoded(tcp: Link) -> None:
    """All but the last byte of them has been received before."""
    _, source = tcp.sender()
    fill(source)
    tcp.grant(0, 1, 2)
    records = INT8.encode(source.bytes[:, :3]).tobytes()
    with connect(tcp) as raw:
        raw.sendall(header("int8", 0, 3) + records[:-1])
        push_all_as(OTHER, tcp)
        assert tcp.receiver.revoke(TICKET)
        tcp.arena.bytes[:] = 9
        raw.sendall(records[-1:])
        wait_until(lambda: tcp.receiver.refusals.get("revoked"), "the refusal")
    assert (tcp.arena.bytes == 9).all()


def test_a_revocation_after_the_last_byte_and_before_it_is_decoded_counts(
    tcp: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = tcp.sender()
    fill(source)
    tcp.grant(0)
    tcp.arena.bytes[:] = 9
    revoke_behind_the_last_byte(tcp, monkeypatch)
    with connect(tcp) as raw:
        raw.sendall(header("int8", 0, 1) + INT8.encode(source.bytes[:, :1]).tobytes())
        wait_until(lambda: tcp.receiver.refusals.get("revoked"), "the refusal")
    assert (tcp.arena.bytes == 9).all()


def test_a_coded_frame_arrives_whole_however_it_is_cut(tcp: Link) -> None:
    _, source = tcp.sender()
    fill(source)
    count = blocks_at_a_time(LAYOUT) + 3
    tcp.grant()
    data = header("int4", 5, count) + codec_named("int4", LAYOUT).encode(source.bytes[:, :count]).tobytes()
    data += header("none", 0, 1) + b"".join(payload(source, 0, 1)) + flush()
    draw = np.random.default_rng(0)
    with connect(tcp) as raw:
        while data:
            size = draw.choice([1, 7, 63, 4099, 60_000])
            raw.sendall(data[:size])
            data = data[size:]
        assert unpack_reply(raw.recv(100)) is Verdict.DONE
    assert np.array_equal(tcp.arena.bytes[:, 5 : 5 + count], through("int4", source.bytes[:, :count]))
    assert np.array_equal(tcp.arena.bytes[:, 0], source.bytes[:, 0])


def test_no_coded_frame_whatever_is_in_it_ends_the_receiver_or_is_written_outside_its_grant(
    tcp: Link, caplog: pytest.LogCaptureFixture
) -> None:
    """Frames with records that are cut, too long, damaged anywhere or of another codec, for blocks anywhere."""
    caplog.set_level(logging.INFO)
    _, source = tcp.sender()
    fill(source)
    granted = range(8, 14)
    tcp.grant(*granted)
    tcp.arena.bytes[:] = 3
    good = {name: codec_named(name, LAYOUT).encode(source.bytes[:, : len(granted)]).tobytes() for name in LOSSY}
    seen: set[str] = set()

    @given(
        said=st.sampled_from(LOSSY),
        meant=st.sampled_from(LOSSY),
        first=st.one_of(st.integers(6, 14), st.sampled_from([0, BLOCKS - 1, 2**32 - 1])),
        count=st.one_of(st.integers(0, 7), st.sampled_from([BLOCKS + 1, 2**32 - 1])),
        damage=st.lists(st.tuples(st.integers(0, 1 << 17), st.binary(min_size=1, max_size=64)), max_size=4),
        spoilt=st.none() | st.integers(0, 1 << 16),
        change=st.integers(-100, 100),
    )
    @example(**GOOD)
    @example(**GOOD | {"spoilt": 0})
    @example(**GOOD | {"change": -1})
    @example(**GOOD | {"change": 64})
    @example(**GOOD | {"count": 7})
    @settings(max_examples=150, deadline=None)
    def send(
        said: str,
        meant: str,
        first: int,
        count: int,
        damage: list[tuple[int, bytes]],
        spoilt: int | None,
        change: int,
    ) -> None:
        size = count * codec_named(said, LAYOUT).record_bytes if count < 8 else 1000
        records = bytearray(good[meant].ljust(size, b"\1")[:size])
        for place, data in damage:
            records[place : place + len(data)] = data
        if spoilt is not None:
            records[spoilt:] = b"\xff" * len(records[spoilt:])
        sent = bytes(records[:change]) if change < 0 else bytes(records) + b"\0" * change
        with connect(tcp) as raw:
            raw.sendall(header(said, first, count) + sent + (flush() if change == 0 else b""))
            raw.shutdown(socket.SHUT_WR)
            answer = b""
            while data := raw.recv(100):
                answer += data
        verdict = unpack_reply(answer[:8]) if answer else None
        within = count == 0 or (first in granted and first + count - 1 in granted)
        assert (verdict is Verdict.OUTSIDE_GRANT) == (not within)
        seen.add(verdict.words if verdict is not None else "cut")
        assert (np.delete(tcp.arena.bytes, granted, axis=1) == 3).all()
        assert np.isfinite(numbers(tcp.arena)[:, granted]).all()

    send()
    assert {"done", "cut", "malformed", "malformed records", "outside grant"} <= seen, seen
    assert "dropped a connection" not in caplog.text
    push_all_as(OTHER, tcp)


def connect(link: Link) -> socket.socket:
    host, port = link.receiver.endpoint.address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def header(codec: str, first: int, count: int) -> bytes:
    key, layout = ticket_key(TICKET), layout_digest(LAYOUT)
    return Header(Kind.WRITE, key, SECRET, layout, first, count, codec).pack()


def flush() -> bytes:
    return Header(Kind.FLUSH, ticket_key(TICKET), SECRET, layout_digest(LAYOUT)).pack()
