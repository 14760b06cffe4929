"""The pure parts of transfers: joined moves, headers, replies and buffers that are cut anywhere."""

from __future__ import annotations

import os

import pytest

from bascule.kv.codecs import NAMES
from bascule.kv.transfer.base import Move, spans
from bascule.kv.transfer.frames import (
    HEADER_BYTES,
    Buffers,
    Header,
    Kind,
    Malformed,
    Verdict,
    layout_digest,
    pack_reply,
    ticket_key,
    unpack_reply,
)
from bascule.types import KVLayout, TicketId


def test_only_moves_adjacent_on_both_sides_are_joined() -> None:
    joined = spans([Move(s, t) for s, t in [(1, 4), (2, 5), (3, 7), (8, 8), (9, 9), (4, 10)]])
    assert [(span.source, span.target, span.count) for span in joined] == [(1, 4, 2), (3, 7, 1), (8, 8, 2), (4, 10, 1)]
    assert spans([]) == []


def test_buffers_survive_any_cut() -> None:
    data = [bytes([index]) * index for index in range(1, 9)]
    buffers = Buffers([memoryview(part) for part in data])
    taken = b""
    for size in [1, 0, 2, 5, 9, 3]:
        taken += b"".join(buffers.pending())[:size]
        buffers.advance(size)
    taken += b"".join(buffers.pending())
    assert taken == b"".join(data)
    assert buffers.left == len(taken) - 20


def test_one_call_never_gets_more_buffers_than_the_system_takes() -> None:
    buffers = Buffers([memoryview(b"x")] * 3000)
    calls = 0
    while buffers.left:
        assert len(buffers.pending()) <= os.sysconf("SC_IOV_MAX")
        buffers.advance(len(buffers.pending()))
        calls += 1
    assert calls >= 3


def test_a_header_comes_back_as_it_was() -> None:
    for codec in NAMES:
        header = Header(Kind.WRITE, ticket_key(TicketId("a" * 300)), b"s" * 16, b"l" * 16, 2**32 - 1, 7, codec)
        data = header.pack()
        assert len(data) == HEADER_BYTES == 64
        assert Header.unpack(data) == header


def test_codecs_keep_their_places_on_the_wire() -> None:
    """A peer of another build must read the same codec."""
    headers = [Header(Kind.WRITE, b"k" * 16, b"s" * 16, b"l" * 16, 0, 1, codec).pack() for codec in NAMES]
    assert [(codec, header[5]) for codec, header in zip(NAMES, headers, strict=True)] == [
        ("none", 0),
        ("fp8", 1),
        ("int8", 2),
        ("int4", 3),
    ]


@pytest.mark.parametrize(("kind", "codec"), [(Kind.WRITE, 4), (Kind.WRITE, 255), (Kind.FLUSH, 2), (Kind.ANNOUNCE, 1)])
def test_an_unknown_codec_or_one_where_nothing_is_written_is_malformed(kind: Kind, codec: int) -> None:
    data = bytearray(Header(kind, b"k" * 16, b"s" * 16, b"l" * 16).pack())
    data[5] = codec
    with pytest.raises(Malformed):
        Header.unpack(bytes(data))


@pytest.mark.parametrize("damage", [(0, b"B"), (3, b"2"), (4, b"\x00"), (4, b"\x09")])
def test_a_header_of_another_protocol_version_or_kind_is_malformed(damage: tuple[int, bytes]) -> None:
    position, byte = damage
    data = bytearray(Header(Kind.FLUSH, b"k" * 16, b"s" * 16, b"l" * 16).pack())
    data[position : position + 1] = byte
    with pytest.raises(Malformed):
        Header.unpack(bytes(data))


def test_replies_come_back_and_others_are_malformed() -> None:
    for verdict in Verdict:
        assert unpack_reply(pack_reply(verdict)) is verdict
    for data in (b"HTTP/1.1", pack_reply(Verdict.DONE)[:4] + b"\xff\0\0\0"):
        with pytest.raises(Malformed):
            unpack_reply(data)


def test_layouts_that_differ_anywhere_have_different_digests() -> None:
    layout = KVLayout("float32", 3, 2, 64, 16, 6, 512)
    same = KVLayout("float32", 3, 2, 64, 16, 6, 512)
    assert layout_digest(layout) == layout_digest(same)
    others = [KVLayout("bfloat16", 3, 2, 64, 16, 6, 512), KVLayout("float32", 3, 2, 64, 32, 6, 512)]
    assert layout_digest(layout) not in [layout_digest(other) for other in others]
