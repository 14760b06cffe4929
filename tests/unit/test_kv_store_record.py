"""A stored block says what it is, and nothing that is not it is taken for it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.kv.hashing import salt_of
from bascule.kv.store.record import (
    HEAD_BYTES,
    InvalidRecord,
    Label,
    Payload,
    inspect,
    label,
    model_digest,
    pack,
    tenant_digest,
    unpack,
)
from bascule.types import BlockHash

NAME = BlockHash(bytes(range(16)))
OTHER = BlockHash(bytes(range(1, 17)))
TOKENS = (1, 2, 3, 2**32 - 1)
PAYLOAD = Payload("int8", bytes(range(256)) * 4)
RECORD = pack(NAME, "model", TOKENS, PAYLOAD)


LABEL = Label(NAME, model_digest("model"), bytes(16), "int8", 4)


def reason(name: BlockHash = NAME, model: str = "model", tokens: tuple[int, ...] = TOKENS, data: bytes = RECORD) -> str:
    with pytest.raises(InvalidRecord) as caught:
        unpack(name, model, tokens, data)
    assert caught.value.reason in str(caught.value)
    if caught.value.reason not in ("fingerprint", "tenant", "tokens"):
        with pytest.raises(InvalidRecord, match=caught.value.reason):
            inspect(name, data)
    return caught.value.reason


@given(
    st.binary(min_size=16, max_size=16),
    st.text(max_size=80),
    st.lists(st.integers(0, 2**32 - 1), max_size=64),
    st.text(max_size=20),
    st.binary(max_size=2000),
)
def test_what_was_packed_is_unpacked(name: bytes, model: str, tokens: list[int], codec: str, data: bytes) -> None:
    record = pack(BlockHash(name), model, tokens, Payload(codec, data))
    assert unpack(BlockHash(name), model, tokens, record) == Payload(codec, data)
    assert unpack(BlockHash(name), model, tuple(tokens), memoryview(bytearray(record))) == Payload(codec, data)


def test_each_way_of_being_another_block_has_its_reason() -> None:
    assert reason(name=OTHER) == "name"
    assert reason(model="model2") == "fingerprint"
    assert reason(tokens=(1, 2, 3, 4)) == "tokens"
    assert reason(tokens=TOKENS[:3]) == "tokens"
    assert reason(data=b"") == "length"
    assert reason(data=bytes(1000)) == "format"
    assert reason(data=RECORD[:4] + b"\x01" + RECORD[5:]) == "version"
    assert reason(data=RECORD + b"\0") == "length"
    assert reason(data=RECORD[:-1]) == "length"
    assert reason(data=RECORD[:-20] + b"?" + RECORD[-19:]) == "checksum"


def test_a_block_of_the_same_hash_but_other_tokens_is_refused() -> None:
    collision = pack(NAME, "model", (9, 9, 9, 9), PAYLOAD)
    assert reason(data=collision) == "tokens"


def test_a_tenants_block_is_for_those_who_have_its_salt() -> None:
    one, two = salt_of("one"), salt_of("two")
    records = {salt: pack(NAME, "model", TOKENS, PAYLOAD, salt) for salt in (b"", one, two)}
    for whose, record in records.items():
        assert unpack(NAME, "model", TOKENS, record, whose) == PAYLOAD
        assert label(record[:HEAD_BYTES], len(record)).tenant == tenant_digest(whose)
        for other in records.keys() - {whose}:
            with pytest.raises(InvalidRecord, match="tenant"):
                unpack(NAME, "model", TOKENS, record, other)
    assert len({tenant_digest(salt) for salt in records}) == 3
    assert one not in records[one] and b"one" not in records[one]


def test_what_has_no_room_in_a_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        pack(BlockHash(b"short"), "model", TOKENS, PAYLOAD)
    with pytest.raises(OverflowError):
        pack(NAME, "model", (2**32,), PAYLOAD)
    with pytest.raises(ValueError, match="at most 188 bytes"):
        pack(NAME, "model", TOKENS, Payload("x" * 189, b""))


def test_a_record_says_what_it_is_without_model_and_tokens() -> None:
    assert inspect(NAME, RECORD) == label(RECORD[:HEAD_BYTES], len(RECORD)) == LABEL
    assert LABEL.model != model_digest("model2")


def test_the_longest_name_of_a_codec_fits_into_the_head() -> None:
    record = pack(NAME, "model", TOKENS, Payload("x" * 188, b"data"))
    assert label(record[:HEAD_BYTES], len(record)).codec == "x" * 188
    assert unpack(NAME, "model", TOKENS, record) == Payload("x" * 188, b"data")
    longer = b"".join([record[:6], (189).to_bytes(2, "little"), record[8:68], b"x", record[68:]])
    assert reason(data=longer) == "format"


def test_a_head_shorter_than_its_record_should_have_is_refused() -> None:
    for cut in (0, 10, HEAD_BYTES - 1):
        with pytest.raises(InvalidRecord, match="length"):
            label(RECORD[:cut], len(RECORD))


def test_the_head_of_a_damaged_record_still_says_what_it_was() -> None:
    damaged = RECORD[:-20] + b"?" + RECORD[-19:]
    assert label(damaged[:HEAD_BYTES], len(damaged)) == LABEL
    with pytest.raises(InvalidRecord, match="checksum"):
        inspect(NAME, damaged)


def test_the_payload_is_a_view_and_no_copy() -> None:
    data = bytearray(RECORD)
    payload = unpack(NAME, "model", TOKENS, data)
    data[-20] ^= 1
    assert payload.data != PAYLOAD.data


@settings(max_examples=300)
@given(st.data())
def test_a_record_changed_in_any_way_is_refused(data: st.DataObject) -> None:
    record = bytearray(RECORD)
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        place = data.draw(st.integers(0, max(0, len(record) - 1)), label="place")
        match data.draw(st.sampled_from(["flip", "truncate", "extend", "cut", "insert", "zero"]), label="change"):
            case "flip" if record:
                record[place] ^= 1 << data.draw(st.integers(0, 7))
            case "truncate":
                del record[place:]
            case "extend":
                record += data.draw(st.binary(min_size=1, max_size=40))
            case "cut":
                del record[place : place + data.draw(st.integers(1, 40))]
            case "insert":
                record[place:place] = data.draw(st.binary(min_size=1, max_size=40))
            case "zero":
                record[place : place + 64] = bytes(len(record[place : place + 64]))
    if record != RECORD:
        reason(data=bytes(record))


@given(st.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    reason(data=data)
    reason(data=RECORD[:60] + data)
