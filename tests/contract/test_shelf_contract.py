"""What an operator sees of any tier: every block and nothing else, told by what it says of itself, checked, removed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from shelf_rig import ONE, TOKENS, TWO, Ground
from store_rig import PATIENT, ROOM, file_of, name_of, run_child

from bascule.errors import ConfigError
from bascule.kv.hashing import salt_of
from bascule.kv.store import shelves
from bascule.kv.store.base import Fault
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.inventory import (
    NOBODY,
    Holding,
    audit,
    forget,
    models_called,
    take_stock,
    tenants_called,
)
from bascule.kv.store.record import HEAD_BYTES, Payload, pack, tenant_digest
from bascule.kv.store.remote import key_of
from bascule.kv.store.shelves import Room, disk_shelf, remote_shelves
from support.redis_server import RedisProcess, redis_process

ANN, BEN = tenant_digest(salt_of("ann")).hex(), tenant_digest(salt_of("ben")).hex()


def test_blocks_are_counted_by_model_and_codec(ground: Ground) -> None:
    sizes = [len(ground.put(1)), len(ground.put(2)), len(ground.put(3, codec="int8")), len(ground.put(4, model="two"))]
    ground.put_foreign()
    stock = take_stock(ground.shelf)
    expected = [
        Holding(ONE, "", "none", 2, sizes[0] + sizes[1]),
        Holding(ONE, "", "int8", 1, sizes[2]),
        Holding(TWO, "", "none", 1, sizes[3]),
    ]
    assert sorted(stock.holdings, key=str) == sorted(expected, key=str)
    assert (stock.blocks, stock.bytes, stock.faults) == (4, sum(sizes), {})


def test_what_is_no_record_is_counted_apart(ground: Ground) -> None:
    record = ground.put(1)
    ground.store.put({name_of(2): b"", name_of(3): bytes(1000), name_of(4): record[:-1]})
    stock = take_stock(ground.shelf)
    assert stock.faults == {"format": 1, "length": 2}
    assert (stock.blocks, stock.bytes) == (4, 2 * len(record) - 1 + 1000)
    assert [holding.blocks for holding in stock.holdings] == [1]


def test_an_empty_place_has_nothing(ground: Ground) -> None:
    assert [name for page in ground.shelf.names() for name in page] == []
    assert take_stock(ground.shelf).blocks == audit(ground.shelf, drop=True).blocks == forget(ground.shelf) == 0
    assert ground.shelf.tier is ground.store.tier


def test_all_of_many_blocks_are_seen_some_at_a_time(ground: Ground) -> None:
    names = {name_of(number % 256 << 120 | number) for number in range(2500)}
    assert ground.store.put(dict.fromkeys(names, b"x")) == 2500
    pages = list(ground.shelf.names())
    assert {name for page in pages for name in page} == names
    assert max(map(len, pages)) < 2000
    assert forget(ground.shelf) == 2500


def test_blocks_are_read_whole_and_by_their_heads(ground: Ground) -> None:
    record = ground.put(1)
    ground.store.put({name_of(2): b"short", name_of(3): b""})
    names = [name_of(number) for number in (1, 2, 3, 4)]
    assert [ground.shelf.read(name) for name in names] == [record, b"short", b"", None]
    heads = ground.shelf.heads(names)
    assert [head if head is None or isinstance(head, Fault) else (head.data, head.size) for head in heads] == [
        (record[:HEAD_BYTES], len(record)),
        (b"short", 5),
        (b"", 0),
        None,
    ]
    assert ground.shelf.heads([]) == []
    assert ground.shelf.drop([]) == 0


DAMAGE = {
    "length": lambda record, other: record[:-1],
    "format": lambda record, other: b"?" + record[1:],
    "version": lambda record, other: record[:4] + b"\x09" + record[5:],
    "checksum": lambda record, other: record[:3000] + bytes([record[3000] ^ 1]) + record[3001:],
    "name": lambda record, other: other,
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_each_damage_is_found_and_only_the_damaged_are_dropped(ground: Ground, reason: str) -> None:
    record, other = ground.put(1), ground.put(2)
    ground.put_foreign()
    ground.store.put({name_of(1): DAMAGE[reason](record, other)})
    found = audit(ground.shelf, drop=False)
    assert (found.blocks, found.valid, found.faults, found.dropped, found.left) == (2, 1, {reason: 1}, 0, 1)
    assert ground.store.holds([name_of(1), name_of(2)]) == [True, True]
    found = audit(ground.shelf, drop=True)
    assert (found.blocks, found.valid, found.faults, found.dropped, found.left) == (2, 1, {reason: 1}, 1, 0)
    assert ground.store.get([name_of(1), name_of(2)]) == [None, other]
    assert audit(ground.shelf, drop=False).faults == {}
    assert ground.foreign_is_whole()


def test_clearing_takes_every_block_and_nothing_else(ground: Ground) -> None:
    for number in range(20):
        ground.put(number)
    ground.store.put({name_of(30): b"no record"})
    ground.put_foreign()
    assert forget(ground.shelf) == 21
    assert ground.store.holds([name_of(number) for number in range(31)]) == [False] * 31
    assert ground.foreign_is_whole()


def test_clearing_a_model_leaves_the_others(ground: Ground) -> None:
    damaged = bytearray(ground.put(1))
    damaged[3000] ^= 1
    ground.store.put({name_of(1): damaged})
    ground.put(2, codec="int4")
    ground.put(3, model="two")
    ground.store.put({name_of(4): b"no record"})
    assert forget(ground.shelf, {ONE}) == 2
    assert ground.store.holds([name_of(number) for number in (1, 2, 3, 4)]) == [False, False, True, True]


def test_a_model_is_found_by_its_fingerprint_or_eight_digits_of_its_digest(ground: Ground) -> None:
    ground.put(1)
    ground.put(2, model="two")
    stocks = [take_stock(ground.shelf)]
    for text in ("one", ONE, ONE[:8], ONE[:8].upper()):
        assert models_called(stocks, text) == {ONE}
    assert models_called(stocks, TWO[:20]) == {TWO}
    for text in ("", "three", ONE[:7], "0" * 32):
        assert models_called(stocks, text) == set()


def test_a_tenants_blocks_are_counted_found_and_forgotten_by_themselves(ground: Ground) -> None:
    sizes = [len(ground.put(number, secret=secret)) for number, secret in enumerate(["", "ann", "ann", "ben"])]
    ground.put(4, model="two", secret="ann")
    stocks = [take_stock(ground.shelf)]
    holdings = stocks[0].holdings
    assert Holding(ONE, ANN, "none", 2, sizes[1] + sizes[2]) in holdings
    counts = {(ONE, ""): 1, (ONE, ANN): 2, (ONE, BEN): 1, (TWO, ANN): 1}
    assert {(each.model, each.tenant): each.blocks for each in holdings} == counts
    assert tenants_called(stocks, "ann") == tenants_called(stocks, ANN[:8].upper()) == {ANN}
    nobody = ("", "cat", "0" * 32, ANN[:7])
    assert [tenants_called(stocks, text) for text in nobody] == 4 * [set()], "what all share is nobody's"
    assert forget(ground.shelf, {ONE}, {ANN}) == 2
    names = [name_of(number) for number in range(5)]
    assert ground.store.holds(names) == [True, False, False, True, True]
    assert forget(ground.shelf, tenants={ANN}) == 1
    assert ground.store.holds(names) == [True, False, False, True, False]
    assert forget(ground.shelf, tenants={NOBODY}) == 1
    assert ground.store.holds(names) == [False, False, False, True, False]


def test_looking_changes_nothing(ground: Ground) -> None:
    ground.put(1)
    ground.put(2)

    def state() -> object:
        if ground.directory is not None:
            paths = sorted(ground.directory.rglob("*"))
            return [(path, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths]
        assert ground.server is not None
        client = ground.server.client()
        return [(key, client.pexpiretime(key)) for key in sorted(client.keys("*"))]

    if ground.directory is not None:
        ground.store.close()  # its keeper looks after the folder
        for path in ground.directory.glob("v1/??/*"):
            os.utime(path, (1, 1))
    before = state()
    take_stock(ground.shelf)
    audit(ground.shelf, drop=True)
    ground.shelf.room()
    assert state() == before


def test_the_room_of_a_place_is_told_where_it_is_known(ground: Ground) -> None:
    room = ground.shelf.room()
    if ground.kind == "remote":
        assert room == Room(None, None)
    else:
        assert room.capacity_bytes is not None and room.free_bytes is not None
        assert 0 < room.free_bytes <= room.capacity_bytes


# ---------------------------------------------------------------- directories


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DirectoryStore]:
    with closing(DirectoryStore(tmp_path, ROOM, timeout_s=PATIENT)) as store:
        yield store


DENIED = """
import os, sys
from pathlib import Path
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.inventory import audit, take_stock
from bascule.kv.store.record import Payload, pack
from bascule.kv.store.shelves import disk_shelf

directory = Path(sys.argv[1])
if os.getuid() == 0:
    os.chown(directory, 65534, 65534)
    os.setgid(65534), os.setuid(65534)
store = DirectoryStore(directory, 1 << 20, timeout_s=20)
store.put({bytes(16): pack(bytes(16), "model", (), Payload("none", b"x")), b"\\1" * 16: b"no record"})
store.close()
os.chmod(directory / "v1" / "00" / ("00" * 16), 0)
shelf = disk_shelf(directory)
print(take_stock(shelf).faults)
found = audit(shelf, drop=True)
print(found.blocks, found.valid, found.faults, found.dropped, found.left)
os.chmod(directory / "v1" / "01", 0)
try:
    take_stock(shelf)
except Exception as error:
    print(type(error).__name__, "--disk" in str(error))
os.chmod(directory / "v1" / "01", 0o700)
"""


def test_a_block_that_may_not_be_read_is_told_and_kept() -> None:
    with tempfile.TemporaryDirectory(prefix="bascule-test-") as directory:
        assert run_child(DENIED, directory).splitlines() == [
            "{'denied': 1, 'length': 1}",
            "2 0 {'denied': 1, 'length': 1} 1 1",
            "ConfigError True",
        ]


def test_more_blocks_than_a_worker_would_keep_are_not_evicted(tmp_path: Path, disk: DirectoryStore) -> None:
    disk.put({name_of(number): b"x" * 1000 for number in range(50)})
    disk.close()
    assert audit(disk_shelf(tmp_path), drop=False).blocks == 50
    assert len(list(tmp_path.glob("v1/??/*"))) == 50


def test_a_file_that_is_larger_than_any_block_is_told_and_dropped(tmp_path: Path, disk: DirectoryStore) -> None:
    """It may lie in no memory at all: a hole of the disk."""
    disk.put({name_of(1): b"x"})
    disk.close()
    os.truncate(file_of(tmp_path, 1), 1 << 40)
    shelf = disk_shelf(tmp_path)
    assert take_stock(shelf).faults == audit(shelf, drop=False).faults == {"broken": 1}
    assert audit(shelf, drop=True).dropped == 1
    assert not file_of(tmp_path, 1).exists()


def test_a_directory_that_vanishes_is_not_taken_for_an_empty_one(tmp_path: Path, disk: DirectoryStore) -> None:
    shelf = disk_shelf(tmp_path)
    disk.put({name_of(number << 120): b"x" for number in range(3)})
    pages = shelf.names()
    next(pages)
    (tmp_path / "v1").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"--disk.*not there.*--kv-disk"):
        list(pages)


# ---------------------------------------------------------------- servers


def test_blocks_are_seen_on_whichever_server_they_lie(server: RedisProcess) -> None:
    """A block that an older ring has left is found by no worker, and lies there until it expires."""
    with redis_process() as other, ExitStack() as stack:
        for process in (server, other):
            process.client().flushall()
            process.client().set(key_of(name_of(1)), pack(name_of(1), "one", TOKENS, Payload("none", b"x")))
        both = remote_shelves(f"{server.url},{other.url}")
        for shelf in both:
            stack.callback(shelf.close)
        assert [audit(shelf, drop=False).valid for shelf in both] == [1, 1]
        assert [forget(shelf) for shelf in both] == [1, 1]


def test_a_value_of_another_type_is_told_and_dropped(server: RedisProcess) -> None:
    server.client().flushall()
    server.client().lpush(key_of(name_of(1)), "not a string")
    [shelf] = remote_shelves(server.url)
    with closing(shelf):
        assert take_stock(shelf).faults == audit(shelf, drop=False).faults == {"broken": 1}
        assert audit(shelf, drop=True).dropped == 1
    assert server.client().dbsize() == 0


def test_a_servers_bound_is_its_room() -> None:
    with redis_process("--maxmemory", "50mb") as process:
        [shelf] = remote_shelves(process.url)
        with closing(shelf):
            room = shelf.room()
    assert room.capacity_bytes == 50 << 20
    assert room.free_bytes is not None and 40 << 20 < room.free_bytes < 50 << 20


def test_a_user_who_may_do_less_is_told_so(server: RedisProcess) -> None:
    client = server.client()
    client.flushall()
    client.set(key_of(name_of(1)), b"x")
    url = server.url.replace("//", "//reader:hunter2@")
    client.execute_command("ACL", "SETUSER", "reader", "on", ">hunter2", "~*", "+@read", "+ping")
    [shelf] = remote_shelves(url)
    with closing(shelf):
        assert shelf.room() == Room(None, None)
        assert audit(shelf, drop=False).left == 1
        with pytest.raises(ConfigError, match=r"--remote.*denied.*unlink"):
            forget(shelf)
        client.execute_command("ACL", "SETUSER", "reader", "-get", "-getrange")
        assert take_stock(shelf).faults == audit(shelf, drop=False).faults == {"denied": 1}
        client.execute_command("ACL", "SETUSER", "reader", "-scan")
        with pytest.raises(ConfigError, match=r"--remote.*denied"):
            take_stock(shelf)
    client.execute_command("ACL", "DELUSER", "reader")
    [shelf] = remote_shelves(url)
    with closing(shelf), pytest.raises(ConfigError, match=r"--remote.*denied.*password") as caught:
        shelf.check()
    assert "hunter2" not in str(caught.value)


def test_a_server_that_dies_or_hangs_meanwhile_is_not_taken_for_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "_TIMEOUT_S", 0.5)
    with redis_process() as process:
        [shelf] = remote_shelves(process.url)
        with closing(shelf):
            process.pause()
            with pytest.raises(ConfigError, match=r"--remote.*slow"):
                take_stock(shelf)
            process.stop()
            for work in (take_stock, forget, lambda shelf: audit(shelf, drop=False), lambda shelf: shelf.room()):
                with pytest.raises(ConfigError, match=r"--remote.*gone.*start it"):
                    work(shelf)
