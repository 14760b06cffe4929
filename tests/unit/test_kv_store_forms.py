"""Blocks in tiers by codec: smaller, found again by those who allow the same, and never taken for exact ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from bascule.clock import VirtualClock
from bascule.errors import ConfigError
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.codecs.base import EXACT
from bascule.kv.codecs.choice import AUTO, AUTOMATIC, fingerprint_with
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.forms import Forms
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.record import InvalidRecord, Payload, label
from bascule.kv.store.tiers import Tiers, Wanted
from bascule.types import BlockHash, CodecCost, KVLayout, Tier

SIZE = 16
LAYOUT = KVLayout("float32", 2, 1, 64, SIZE, 4, 256)
TOKENS = tuple(range(2 * SIZE))
NEAR, FAR = 1e12, 1e5
"""Bytes a second."""


def blocks(count: int = 2) -> np.ndarray:
    numbers = np.random.default_rng(1).standard_normal((LAYOUT.planes, count, LAYOUT.plane_block_bytes // 4))
    return numbers.astype(np.float32).view(np.uint8)


@pytest.mark.parametrize("codec", ["none", "fp8", "int8", "int4"])
def test_a_tier_holds_smaller_records_and_gives_nearly_the_same_kv(codec: str) -> None:
    store = MemoryStore(1 << 20)
    names = BlockHasher("m", SIZE).chain(TOKENS)
    fingerprint = fingerprint_with("m", codec)
    whole = blocks()
    with Arena.create(LAYOUT, 4) as arena:
        books = Books(4, SIZE)
        tiers = Tiers([store], arena, books, fingerprint, Forms(codec, LAYOUT))
        with books.acquire([], [], 2) or pytest.fail("no blocks") as lease:
            arena.bytes[:, lease.blocks] = whole
            lease.seal(0, names, TOKENS)
            taken = tiers.save(Tier.HOST, names).taken
            assert list(taken) == names and sum(taken.values()) == tiers.figures[Tier.HOST].saved_bytes
            assert store.stats().bytes < 2 * LAYOUT.block_bytes / {"none": 0.9, "fp8": 3, "int8": 3, "int4": 4.5}[codec]
            [data] = store.get(names[:1])
            assert data is not None and label(data[:256], len(data)).codec == codec
            wanted = [Wanted(name, TOKENS[at * SIZE : (at + 1) * SIZE], 2 + at) for at, name in enumerate(names)]
            assert tiers.load(wanted, [Tier.HOST] * 2) == [Tier.HOST] * 2
            difference = np.abs(arena.bytes[:, 2:].copy().view(np.float32) - whole.view(np.float32))
            assert difference.max() <= {"none": 0, "fp8": 0.3, "int8": 0.05, "int4": 0.6}[codec]
            assert (difference.max() == 0) == (codec == "none")


def test_auto_takes_a_smaller_form_where_the_tier_is_slow() -> None:
    forms = Forms(AUTO, LAYOUT)
    near, _ = forms.encode(blocks(), NEAR)
    far, _ = forms.encode(blocks(), FAR)
    assert near == EXACT
    assert far in AUTOMATIC and far != EXACT


class Steady(MemoryStore):
    """A tier that gives `bytes_per_s` of whatever lies there, by a clock of its own."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(1 << 24, Tier.REMOTE)
        self.clock = VirtualClock(100.0)
        self.bytes_per_s = bytes_per_s

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        answers = super().get(names)
        self.clock.advance(sum(len(data) for data in answers if data is not None) / self.bytes_per_s)
        return answers


@pytest.mark.parametrize(("bytes_per_s", "expected"), [(1e8, "int4"), (3e9, "none")])
@pytest.mark.parametrize("count", [1, 12])
def test_auto_settles_on_one_form_for_a_tier_of_one_speed(bytes_per_s: float, expected: str, count: int) -> None:
    """What was loaded is quicker by the codec, and is no reason to do without it, nor the other way round."""
    store, chosen = Steady(bytes_per_s), list[str]()
    forms, tokens = Forms(AUTO, LAYOUT), range(count * SIZE)
    forms._costs = [
        CodecCost(name="none", ratio=1.0, encode_bytes_per_s=1e11, decode_bytes_per_s=1e11),
        CodecCost(name="int8", ratio=3.9, encode_bytes_per_s=2e9, decode_bytes_per_s=2e9),
        CodecCost(name="int4", ratio=7.1, encode_bytes_per_s=2e9, decode_bytes_per_s=2e9),
    ]
    names = BlockHasher("m", SIZE).chain(tokens)
    with Arena.create(LAYOUT, 2 * count) as arena:
        books = Books(2 * count, SIZE)
        tiers = Tiers([store], arena, books, "m", forms, store.clock.now)
        with books.acquire([], [], count) or pytest.fail("no blocks") as lease:
            arena.bytes[:, lease.blocks] = blocks(count)
            lease.seal(0, names, tokens)
            wanted = [Wanted(name, tuple(tokens[at * SIZE :][:SIZE]), count + at) for at, name in enumerate(names)]
            for _ in range(30):
                store.drop(names)
                assert list(tiers.save(Tier.REMOTE, names).taken) == names
                [data] = store.peek(names[:1])
                assert data is not None
                chosen.append(label(data[:256], len(data)).codec)
                for _ in range(30):
                    assert len(tiers.load(wanted, [Tier.REMOTE] * count)) == count
    assert chosen[-1] == expected
    assert sum(one != other for one, other in pairwise(chosen)) <= 1, "it does not go to and fro"


def test_what_a_codec_has_no_code_for_stays_as_it_is() -> None:
    whole = blocks()
    whole.view(np.float32)[0, 0, 0] = np.inf
    codec, records = Forms("int8", LAYOUT).encode(whole, FAR)
    assert codec == EXACT
    out = np.zeros_like(whole[:, :1])
    Forms("int8", LAYOUT).decode(Payload(codec, records[0].data), out)
    assert (out == whole[:, :1]).all()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (Payload("int8", bytes(10)), "layout"),
        (Payload("int4", bytes(LAYOUT.block_bytes)), "codec"),
        (Payload("zip", b""), "codec"),
    ],
)
def test_forms_that_were_not_allowed_or_have_the_wrong_size_are_invalid(payload: Payload, reason: str) -> None:
    with pytest.raises(InvalidRecord, match=reason):
        Forms("int8", LAYOUT).decode(payload, blocks(1))


def test_who_allows_a_lossy_codec_shares_with_nobody_who_does_not() -> None:
    assert fingerprint_with("m", "none") == "m"
    assert len({fingerprint_with("m", codec) for codec in ("none", "fp8", "int8", "int4", "auto")}) == 5


def test_a_codec_that_cannot_represent_the_kv_is_refused() -> None:
    odd = KVLayout("int32", 2, 1, 64, SIZE, 4, 256)
    Forms("none", odd)
    with pytest.raises(ConfigError, match="int8"):
        Forms("int8", odd)
