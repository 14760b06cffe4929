"""Whatever bytes come, a decoder makes a value of its type of them or raises its own error, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.kv.codecs import NAMES
from bascule.kv.store.record import HEAD_BYTES, InvalidRecord, Payload, inspect, label, pack, unpack
from bascule.kv.transfer import channel
from bascule.kv.transfer.frames import (
    HEADER_BYTES,
    REPLY_BYTES,
    Header,
    Kind,
    Malformed,
    Verdict,
    pack_reply,
    unpack_reply,
)
from bascule.peer_wire import PeerMessage, from_peer
from bascule.types import BlockHash
from bascule.wire import RouterMessage, WireError, WorkerMessage, encode, from_router, from_worker
from fuzz.inputs import Made, bent, fuzzing, messages, nested, tags_of

WORDS = ["worker-0", "device", "host", "shm", "tcp", "prefill"]
READERS: dict[str, tuple[Callable[[bytes], Any], Any, type[Exception]]] = {
    "from_worker": (from_worker, WorkerMessage, WireError),
    "from_router": (from_router, RouterMessage, WireError),
    "from_peer": (from_peer, PeerMessage, WireError),
    "channel": (channel.decode, channel.Message, Malformed),
}
EVERY = pytest.mark.parametrize("name", READERS)
MOST_BYTES = 8 << 20
"""Of memory for an input of a few hundred bytes."""


@EVERY
def test_an_input_is_a_message_of_its_type_or_refused(name: str) -> None:
    read, kind, refusal = READERS[name]

    @fuzzing(0.04)
    @given(messages(WORDS, kind))
    def check(data: bytes) -> None:
        with suppress(refusal):
            message = read(data)
            assert read(encode(message)) == message or "nan" in repr(message)

    check()


@EVERY
def test_a_header_that_promises_much_costs_no_memory(name: str) -> None:
    read, kind, refusal = READERS[name]
    tracemalloc.start()

    @fuzzing(0.01)
    @given(bent(Made(WORDS).of(kind)))
    def check(data: bytes) -> None:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with suppress(refusal):
            read(data)
        assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES

    try:
        check()
    finally:
        tracemalloc.stop()


@EVERY
def test_nesting_deeper_than_any_stack_is_refused(name: str) -> None:
    read, kind, refusal = READERS[name]
    for tag in tags_of(kind):
        with pytest.raises(refusal):
            read(nested(tag))


@fuzzing(0.05)
@given(
    st.one_of(
        st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES),
        st.builds(
            lambda kind, first, count, codec, at, bit: _flipped(
                Header(kind, b"k" * 16, b"s" * 16, b"l" * 16, first, count, codec).pack(), at, bit
            ),
            st.sampled_from(Kind),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
            st.sampled_from(NAMES),
            st.integers(0, HEADER_BYTES - 1),
            st.integers(0, 8),
        ),
    )
)
def test_a_frame_s_header_is_read_or_malformed(data: bytes) -> None:
    with suppress(Malformed):
        header = Header.unpack(data)
        assert Header.unpack(header.pack()) == header


@fuzzing(0.01)
@given(st.one_of(st.binary(min_size=REPLY_BYTES, max_size=REPLY_BYTES), st.sampled_from(Verdict).map(pack_reply)))
def test_a_reply_is_a_verdict_or_malformed(data: bytes) -> None:
    with suppress(Malformed):
        assert pack_reply(unpack_reply(data))[:5] == data[:5]


@st.composite
def records(draw: st.DrawFn) -> tuple[bytes, bool]:
    """Bytes that lie in a store, and whether they are the record as it was packed."""
    good = pack(NAME, "model", TOKENS, Payload(draw(st.sampled_from([*NAMES, "é"])), draw(st.binary(max_size=64))))
    how = draw(st.sampled_from(["good", "flip", "cut", "more", "random"]))
    at = draw(st.integers(0, len(good) - 1))
    if how == "flip":
        return _flipped(good, at, draw(st.integers(0, 7))), False
    if how == "cut":
        return good[:at], False
    if how == "more":
        return good + draw(st.binary(min_size=1, max_size=32)), False
    if how == "random":
        return good[: draw(st.integers(0, 48))] + draw(st.binary(max_size=300)), False
    return good, True


NAME, TOKENS = BlockHash(b"0123456789abcdef"), [1, 2, 3, 2**32 - 1]


@fuzzing(0.05)
@given(records())
def test_a_stored_record_is_what_was_packed_or_invalid(drawn: tuple[bytes, bool]) -> None:
    data, good = drawn
    for read in (
        lambda: unpack(NAME, "model", TOKENS, data),
        lambda: inspect(NAME, data),
    ):
        if good:
            read()
        else:
            with pytest.raises(InvalidRecord):
                read()
    with suppress(InvalidRecord):
        label(data[:HEAD_BYTES], len(data))


def _flipped(data: bytes, at: int, bit: int) -> bytes:
    """Bit 8 is none."""
    return data[:at] + bytes([data[at] ^ (1 << bit & 0xFF)]) + data[at + 1 :]


@EVERY
def test_inputs_that_keep_every_bound_are_read(name: str) -> None:
    """Else nothing that lies behind a decoder would ever see one."""
    read, kind, refusal = READERS[name]
    seen: set[str] = set()

    @fuzzing(0.01)
    @given(Made(WORDS).of(kind))
    def check(value: dict[str, Any]) -> None:
        with suppress(refusal):
            seen.add(type(read(msgspec.msgpack.encode(value))).__name__)

    check()
    assert len(seen) > len(tags_of(kind)) / 3
