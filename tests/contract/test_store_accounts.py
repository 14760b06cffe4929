"""The audit of a folder's accounts: what is left over in them is found, and nobody at work is accused."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

import pytest
from store_rig import PATIENT, ROOM, name_of, value_of

from bascule.kv.store import keeper
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.folder import Folder
from bascule.kv.store.keeper import Keeper
from bascule.kv.store.memory import MemoryStore
from bascule.types import BlockHash
from support.redis_server import wait_until

SIZE = 1000
LOOKED_S = 1.5
"""How long somebody who is at work is looked at."""
ANOTHER = """
import random, sys, time
from pathlib import Path
from bascule.kv.store.directory import DirectoryStore
store = DirectoryStore(Path(sys.argv[1]), int(sys.argv[2]))
print("begun", flush=True)
while True:
    name = random.randrange(100, 400).to_bytes(16, "big")
    if random.random() < 0.7:
        store.put({name: bytes(random.randrange(500, 1500))})
    else:
        store.drop([name])
    time.sleep(0.002)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LEFT_OVER_S", 0.2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DirectoryStore]:
    with closing(DirectoryStore(tmp_path, ROOM, timeout_s=PATIENT)) as store:
        yield store


def looks(store: DirectoryStore, seconds: float = LOOKED_S, every_s: float = 0.05) -> list[str]:
    """All that an audit says in that time."""
    said, end = list[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        said += store.check_integrity()
        time.sleep(every_s)
    return said


def filled(store: DirectoryStore, count: int = 10) -> None:
    assert store.put({name_of(number): value_of(number, SIZE) for number in range(count)}) == count


def test_a_reservation_that_nobody_ends_is_found_and_gone_with_its_end(disk: DirectoryStore) -> None:
    filled(disk)
    assert looks(disk, 0.3) == []
    assert disk._keeper.reserve("lost", 77, time.monotonic() + 1)
    assert disk.check_integrity() == [], "it may be on its way"
    time.sleep(keeper.LEFT_OVER_S)
    [said] = disk.check_integrity()
    assert said.startswith("77 bytes are reserved")
    assert disk.check_integrity() == [said], "for as long as it is so"
    disk._keeper.failed("lost", 77)
    assert looks(disk, 0.3) == []


def test_figures_that_measuring_does_not_mend_are_found(disk: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Keeper._account

    def one_too_many(self: Keeper, entries: list[keeper.Entry]) -> None:
        account(self, entries)
        self._blocks += 1

    monkeypatch.setattr(Keeper, "_account", one_too_many)
    filled(disk)
    with disk._keeper._changed:
        disk._keeper._ask()
    wait_until(lambda: disk.stats().blocks == 11, "it to be measured")
    assert disk.check_integrity() == [], "another may have put it there"
    wait_until(lambda: bool(disk.check_integrity()), "the block too many to be found")
    assert disk.check_integrity() == [f"11 blocks of {10 * SIZE} bytes are in the accounts, 10 of {10 * SIZE} there"]
    monkeypatch.undo()
    wait_until(lambda: not disk.check_integrity(), "it to be mended")


def test_what_others_took_away_or_put_there_is_measured_anew_and_no_fault_of_ours(
    disk: DirectoryStore, tmp_path: Path
) -> None:
    filled(disk)
    other = Folder(tmp_path, ROOM)
    other.remove(name_of(3).hex())
    other.write(name_of(50), bytes(3 * SIZE))
    assert looks(disk, 0.5) == []
    assert disk.stats().blocks == 10 and disk.stats().bytes == 12 * SIZE


def test_a_store_that_is_looked_at_while_it_works_is_not_accused(tmp_path: Path) -> None:
    """Its bound is that of some forty blocks, so that writers wait for room, and the keeper evicts all the time."""
    stopping, draw = Event(), random.Random(1)
    with closing(DirectoryStore(tmp_path, 40 * SIZE, timeout_s=PATIENT)) as store:

        def work() -> None:
            while not stopping.is_set():
                names = [name_of(draw.randrange(200)) for _ in range(draw.randint(1, 16))]
                if draw.random() < 0.8:
                    store.put(dict.fromkeys(names, value_of(1, SIZE)))
                else:
                    store.drop(names)

        threads = [Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: store.stats().evictions, "room to be made")
            assert looks(store) == []
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        assert looks(store, 0.5) == []


def test_a_write_that_hangs_keeps_its_room_and_is_no_fault(
    disk: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, go_on = Folder.write, Event()

    def hang(self: Folder, name: BlockHash, data: bytes) -> int | None:
        go_on.wait(30)
        return write(self, name, data)

    monkeypatch.setattr(Folder, "write", hang)
    monkeypatch.setattr(disk._writes, "_timeout_s", 0.1)
    assert disk.put({name_of(1): value_of(1)}) == 0
    assert disk._keeper._flying
    assert looks(disk, 0.6) == []
    go_on.set()
    wait_until(lambda: not disk._keeper._flying, "the write to end")
    assert looks(disk, 0.5) == []


def test_two_processes_on_one_directory_are_not_accused(disk: DirectoryStore, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ANOTHER, str(tmp_path), str(ROOM)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as another:
        try:
            assert another.stdout is not None and another.stdout.readline() == "begun\n"
            filled(disk)
            said = looks(disk, LOOKED_S / 2)
            disk.drop([name_of(number) for number in range(5)])
            said += looks(disk, LOOKED_S / 2)
        finally:
            another.kill()
        assert said == []
    disk.drop([name_of(9)])
    assert looks(disk, 0.5) == [] and disk._keeper._clean == disk._keeper._changes


def test_a_folder_is_measured_only_after_changes_of_our_own(
    disk: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(disk)
    assert looks(disk, 0.3) == []
    monkeypatch.setattr(DirectoryStore, "_measure", lambda _: pytest.fail("nothing has changed"))
    Folder(tmp_path, ROOM).write(name_of(60), b"another's")
    assert looks(disk, 0.2) == []


def test_a_folder_that_cannot_be_read_through_says_nothing(
    disk: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(disk)

    def breaks_off(self: Folder) -> Iterator[list[keeper.Entry]]:
        yield self.scan()[:3]
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "pages", breaks_off)
        assert disk._measure() is None


def test_a_dict_whose_bytes_are_miscounted_is_found() -> None:
    store = MemoryStore(ROOM)
    store.put({name_of(1): value_of(1, SIZE)})
    assert store.check_integrity() == []
    store._bytes -= 1
    assert store.check_integrity() == [f"{SIZE - 1} bytes are in the accounts, {SIZE} there"]


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DirectoryStore]:
    """A store of ten blocks that looks at its folder all the time, and has nothing to do."""
    monkeypatch.setattr(keeper, "_REST_S", 0.01)
    monkeypatch.setattr(keeper, "_GRAIN_S", 0.1)
    with closing(DirectoryStore(tmp_path, ROOM, timeout_s=PATIENT)) as store:
        filled(store)
        yield store


def at_rest(store: DirectoryStore) -> None:
    wait_until(lambda: not store._keeper._recent and store._keeper._settled, "nothing to change any more")


def test_what_another_process_clears_is_seen_by_one_that_does_nothing(idle: DirectoryStore, tmp_path: Path) -> None:
    at_rest(idle)
    other = Folder(tmp_path, ROOM)
    for entry in other.scan():
        other.remove(entry.name)
    wait_until(lambda: idle.stats().blocks == idle.stats().bytes == 0, "the others' removals to be seen")
    at_rest(idle)
    other.write(name_of(0), value_of(0, SIZE))
    other.write(name_of(0), value_of(0, 3 * SIZE))
    wait_until(lambda: idle.stats().blocks == 1 and idle.stats().bytes == 3 * SIZE, "the other's block to be seen")


def test_a_folder_that_nobody_changes_is_not_measured(idle: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    at_rest(idle)
    looked: list[int] = []
    marks = Folder.marks

    def count(self: Folder) -> dict[str, int]:
        looked.append(1)
        return marks(self)

    monkeypatch.setattr(Folder, "marks", count)
    begun = idle._keeper._begun
    wait_until(lambda: len(looked) >= 5, "it to be looked at")
    assert idle._keeper._begun == begun


def test_changes_that_leave_no_mark_are_seen_until_enough_time_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system whose clock has not gone on since the latest measurement."""
    monkeypatch.setattr(keeper, "_REST_S", 0.01)
    monkeypatch.setattr(keeper, "_GRAIN_S", 3600.0)
    monkeypatch.setattr(Folder, "marks", lambda _: {})
    with closing(DirectoryStore(tmp_path, ROOM, timeout_s=PATIENT)) as store:
        filled(store)
        wait_until(lambda: not store._keeper._recent, "it to be measured")
        Folder(tmp_path, ROOM).remove(name_of(3).hex())
        wait_until(lambda: store.stats().blocks == 9, "the removal to be seen")


def test_figures_are_audited_again_once_others_have_changed_the_folder(
    idle: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_rest(idle)
    wait_until(lambda: not idle.check_integrity() and idle._keeper._clean == idle._keeper._changes, "a clean audit")
    account = Keeper._account

    def one_too_many(self: Keeper, entries: list[keeper.Entry]) -> None:
        account(self, entries)
        self._blocks += 1

    monkeypatch.setattr(Keeper, "_account", one_too_many)
    Folder(tmp_path, ROOM).remove(name_of(3).hex())
    wait_until(lambda: bool(idle.check_integrity()), "the block too many to be found")
