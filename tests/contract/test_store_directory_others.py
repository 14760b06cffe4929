"""A directory among others' doings: hosts with other clocks share it, and others' files fill its file system."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from time import monotonic

import pytest
from store_rig import PATIENT, ROOM, file_of, files_in, name_of, value_of

from bascule.errors import ConfigError
from bascule.kv.store.base import Fault, Use
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.folder import Entry, Folder
from bascule.kv.store.places import DiskPlace, disk_store
from support.redis_server import wait_until

A, B = (name_of(number) for number in (1, 2))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_the_time_is_what_the_file_system_says(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts that share it may each have another."""
    monkeypatch.setattr(Folder, "now_ns", lambda _: time.time_ns() + 7200 * 10**9)
    store = stack.enter_context(closing(DirectoryStore(tmp_path, ROOM, timeout_s=PATIENT)))
    store.put({A: b"a"})
    assert store.touch([Use(A, monotonic() - 3600, again=False)]) == [True]
    assert abs(file_of(tmp_path, 1).stat().st_mtime - time.time() - 3600) < 600
    (left := tmp_path / "v1" / "tmp" / f"{A.hex()}.{'0' * 16}").write_bytes(b"half")
    store._folder.remove_abandoned()
    assert not left.exists(), "for the file system it is two hours old"


def test_a_file_system_that_others_have_filled_costs_a_sixteenth_and_that_once(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stack.enter_context(closing(DirectoryStore(tmp_path, 50 << 30, timeout_s=PATIENT)))
    assert store.put({name_of(number): value_of(number) for number in range(100, 164)}) == 64

    def evicted() -> int:
        keeper = store._keeper
        for _ in range(2):  # the first may have been under way
            with keeper._changed:
                before = keeper._begun
                keeper._ask()
            wait_until(lambda before=before: keeper._accounted > before, "a measurement")  # type: ignore[misc]
        wait_until(lambda: len(files_in(tmp_path)) == store.stats().blocks, "what is evicted to be gone")
        return 64 - len(files_in(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        assert store.put({A: value_of(1)}) == 0
        assert evicted() == 5, "one for the block, and four more"
        for _ in range(3):
            assert store.put({A: value_of(1)}) == 0
            assert evicted() == 5, "that did not help, so more would not, either"
    assert store.put({A: value_of(1)}) == 1
    monkeypatch.setattr(Folder, "write", full)
    assert store.put({B: value_of(1)}) == 0
    assert evicted() == 9, "a write has succeeded since, so it may help again"


def test_a_block_that_others_use_while_the_folder_is_measured_is_not_evicted(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stack.enter_context(closing(DirectoryStore(tmp_path, 50_000, timeout_s=PATIENT)))
    scan, uses = Folder.scan, count(1)

    def scan_and_use(folder: Folder) -> list[Entry]:
        """By the times found, A is always the next to go; when that is done, it has been used since."""
        found = scan(folder)
        folder.touch(A, next(uses), again=False)
        return found

    assert store.put({A: value_of(1)}) == 1
    monkeypatch.setattr(Folder, "scan", scan_and_use)
    for number in range(100, 200):
        assert store.put({name_of(number): value_of(number)}) == 1
    assert store.holds([A, name_of(100)]) == [True, False]


def test_the_protected_stay_where_a_measurement_has_not_seen_what_was_written_since(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stack.enter_context(closing(DirectoryStore(tmp_path, 50_000, timeout_s=PATIENT)))
    scan, hot = Folder.scan, [name_of(number) for number in range(10)]

    def slow_scan(folder: Folder) -> list[Entry]:
        found = scan(folder)
        for _ in range(20):
            if store._keeper._waiting:  # a writer has no room left
                break
            time.sleep(0.01)
        return found

    assert store.put({name: value_of(1) for name in hot}) == 10
    assert all(store.touch([Use(name, monotonic(), again=True) for name in hot]))
    monkeypatch.setattr(Folder, "scan", slow_scan)
    for number in range(100, 200):
        assert store.put({name_of(number): value_of(number)}) == 1
    assert store.holds(hot) == [True] * 10


def test_a_file_that_is_larger_than_any_block_is_not_read_but_removed(tmp_path: Path, stack: ExitStack) -> None:
    """It may lie in no memory at all: a hole of the disk."""
    store = stack.enter_context(closing(DirectoryStore(tmp_path, 50 << 30, timeout_s=PATIENT)))
    for look in (store.get, store.peek):
        store.put({A: b"a", B: b"b"})
        os.truncate(file_of(tmp_path, 1), (256 << 20) + 1)
        assert look([A, B]) == [None, b"b"]
        assert not file_of(tmp_path, 1).exists()
    assert store.stats().errors == {Fault.BROKEN: 2}
    store.put({A: b"a"})
    os.truncate(file_of(tmp_path, 1), (256 << 20) + 1)
    assert store.put({A: b"again"}) == 1
    assert store.get([A]) == [b"again"]


@pytest.mark.parametrize("what", ["pipe", "link"])
def test_a_name_of_the_directory_that_is_no_file_is_told_at_once(tmp_path: Path, what: str) -> None:
    (tmp_path / "v1").mkdir()
    name = tmp_path / "v1" / "id"
    if what == "pipe":
        os.mkfifo(name)
    else:
        name.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"--kv-disk.*v1/id"):
        disk_store(DiskPlace(tmp_path, 1 << 20))
