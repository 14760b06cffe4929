"""What a worker says of its model in a tier: there while the model's blocks are, and never taken for one of them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace
from store_rig import PATIENT, ROOM, Place, file_of, make_place, name_of

from bascule.clock import VirtualClock
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.base import Store, Use
from bascule.kv.store.description import MOST_BYTES, describe, description_name, is_description, read
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.forms import Forms
from bascule.kv.store.record import inspect, model_digest
from bascule.kv.store.tiers import Tiers, Wanted
from bascule.types import BlockHash, KVLayout, ModelCard, Tier
from support.redis_server import RedisProcess

LAYOUT = KVLayout("float32", 1, 1, 4, 4, 2, 16)
CARD = ModelCard(name="org/small (v2)", fingerprint="5" * 64 + "+int8", context=100, vocab=100, layout=LAYOUT)
NAME = description_name(model_digest(CARD.fingerprint))
TOKENS = tuple(range(4 * LAYOUT.block_size))
HASHES = BlockHasher(CARD.fingerprint, LAYOUT.block_size).chain(TOKENS)


@pytest.fixture(params=["memory", "host", "disk", "remote"])
def place(request: pytest.FixtureRequest, server: RedisProcess) -> Iterator[Place]:
    with ExitStack() as stack:
        yield make_place(request.param, stack, lambda: server)


@dataclass
class Worker:
    """Four computed blocks above a tier, by a clock of its own."""

    tiers: Tiers
    store: Store
    clock: VirtualClock
    books: Books

    def save(self, *numbers: int) -> None:
        names = [HASHES[number] for number in numbers]
        assert list(self.tiers.save(self.store.tier, names).taken) == names

    def use(self, *numbers: int) -> None:
        self.tiers.use(self.store.tier, [Use(HASHES[number], self.clock.now(), again=True) for number in numbers])

    def told(self) -> list[BlockHash]:
        return sorted(name for page in self.tiers.names(self.store.tier) for name in page)

    def says(self) -> str | None:
        """What the model is called."""
        [record] = self.store.get([NAME])
        found = read(NAME, record) if record is not None else None
        return found.name if found is not None else None


def worker(store: Store, stack: ExitStack, card: ModelCard = CARD) -> Worker:
    arena = stack.enter_context(Arena.create(LAYOUT, 8))
    books, clock = Books(8, LAYOUT.block_size), VirtualClock()
    told = describe(card)
    tiers = Tiers([store], arena, books, card.fingerprint, Forms("none", LAYOUT), clock.now, told)
    lease = stack.enter_context(books.acquire([], [], 4) or pytest.fail("no blocks"))
    lease.seal(0, HASHES, TOKENS)
    return Worker(tiers, store, clock, books)


def test_who_saves_blocks_says_whose_they_are(place: Place) -> None:
    with ExitStack() as stack:
        one = worker(place.open(), stack)
        assert one.says() is None, "where there are no blocks there is nothing to be said"
        one.save(0, 1)
        assert one.says() == "org/small (v2)"
        assert one.told() == sorted(HASHES[:2]), "the router hears of blocks only"
        wanted = [Wanted(NAME, (), 7)]
        assert one.tiers.load(wanted, [one.store.tier]) == [], "nobody takes it for KV"
        assert one.tiers.figures[one.store.tier].saved_blocks == 2


def test_what_is_cleared_is_said_again_with_the_next_blocks(place: Place) -> None:
    with ExitStack() as stack:
        one = worker(place.open(), stack)
        one.save(0)
        one.store.clear()
        assert one.says() is None
        one.clock.advance(61.0)
        one.save(0)
        assert one.says() == "org/small (v2)"
        one.store.drop([NAME])
        one.clock.advance(61.0)
        one.use(0)
        assert one.says() == "org/small (v2)", "using what is there keeps it, too"


def test_what_was_said_before_this_start_is_replaced(place: Place) -> None:
    """The same weights under another name."""
    with ExitStack() as stack:
        store = place.open()
        worker(store, stack, replace(CARD, name="older")).save(0)
        one = worker(store, stack)
        assert one.says() == "older"
        one.save(1)
        assert one.says() == "org/small (v2)"


def test_it_stays_as_long_as_the_blocks_are_used(tmp_path: Path) -> None:
    """What is used least goes first, and it would if nobody used it."""
    with ExitStack() as stack:
        store = stack.enter_context(closing(DirectoryStore(tmp_path, ROOM, timeout_s=PATIENT)))
        one = worker(store, stack)
        one.save(0)
        path = tmp_path / "v1" / NAME.hex()[:2] / NAME.hex()
        os.utime(path, (1, 1))
        one.clock.advance(61.0)
        one.use(0)
        assert path.stat().st_mtime > 1e9


def test_a_release_that_does_not_know_it_finds_a_block_like_any_other(place: Place) -> None:
    """It checks records, and drops those that are not whole."""
    with ExitStack() as stack:
        one = worker(place.open(), stack)
        one.save(0)
        [record] = one.store.get([NAME])
        assert record is not None and len(record) < MOST_BYTES
        label = inspect(NAME, record)
        assert (label.name, label.model, label.tenant) == (NAME, model_digest(CARD.fingerprint), bytes(16))
        if one.store.tier is not Tier.REMOTE:
            assert one.tiers.scrub(100) == {} and one.says() is not None


@pytest.mark.parametrize("name", ["", "x" * 201, "a\x1b[31m", "a\nb", "a\u202eb", "\udcff"])
def test_a_name_that_is_not_fit_to_be_shown_is_not_said(name: str) -> None:
    assert describe(replace(CARD, name=name)) is None


def test_no_block_is_taken_for_it() -> None:
    assert is_description(NAME)
    assert not any(is_description(name) for name in HASHES)
    assert not any(is_description(BlockHash(secrets.token_bytes(16))) for _ in range(1000))


def test_the_background_check_drops_a_file_that_is_larger_than_any_block(tmp_path: Path) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(closing(DirectoryStore(tmp_path, 50 << 30, timeout_s=PATIENT)))
        one = worker(store, stack)
        one.save(0, 1)
        planted = file_of(tmp_path, 77)
        planted.parent.mkdir(exist_ok=True)
        planted.touch()
        os.truncate(planted, 1 << 40)
        assert store.holds([name_of(77)]) == [True]
        one.tiers.scrub(100)
        assert not planted.exists()
        assert one.told() == sorted(HASHES[:2])
