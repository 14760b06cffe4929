"""Blocks as files: one each under 256 subfolders, whole or not there, safe among processes and hosts that share them.

DIR/v1/ab/ab54...      a block, named by its hash in hex
DIR/v1/tmp/ab54....x   one being written, renamed when it is complete
DIR/v1/id              a random name, by which those who share the directory know that they do
DIR/v1/lock            held by whoever measures and evicts
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct

from bascule.kv.store.base import Blob, Fault
from bascule.locks import lock
from bascule.types import BlockHash

_FORMAT = "v1"
_BLOCK_NAME = re.compile(r"[0-9a-f]{32}")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}")
_SUBFOLDER_NAME = re.compile(r"[0-9a-f]{2}")
_ABANDONED_AFTER_NS = 900 * 10**9
_ID_BYTES = 32
_ID_PATIENCE_S = 2.0
_ID_PAUSE_S = 0.01
_USED_AGAIN = stat.S_IXUSR
"""Of a block's mode: a mark that lasts, that all who share the directory see, and that no content carries. Where a file
system keeps no modes, all blocks are alike."""
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

Marks: TypeAlias = dict[str, int]
"""When each subfolder was last changed, in nanoseconds by the file system's clock."""

_FAULTS = {
    Fault.FULL: (errno.ENOSPC, errno.EDQUOT),
    Fault.DENIED: (errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    Fault.GONE: (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENOTCONN),
}
_FAULT_OF = {number: fault for fault, numbers in _FAULTS.items() for number in numbers}


def fault_of(error: Exception) -> Fault:
    """What an operation on files has failed of."""
    return _FAULT_OF.get(getattr(error, "errno", None) or 0, Fault.BROKEN)


class TooLarge(OSError):
    """A file that has the name of a block and more bytes than any has."""


class Entry(Struct, frozen=True):
    """A block's file: when it was written or last used, by the file system's clock, its bytes, and whether it was used
    again since it was written."""

    name: str
    used_ns: int
    size: int
    again: bool


class Head(Struct, frozen=True):
    """The beginning of a block, and the size of the whole."""

    data: bytes
    size: int


class Folder:
    """The files of one directory. Every method but `prepare` and `locked` raises OSError as the system does, and those
    that read `TooLarge`.

    Nothing but `prepare` makes the upper folders: where a mount has vanished, its mount point must not be filled.
    """

    def __init__(self, directory: Path, largest: int) -> None:
        """No block has more than `largest` bytes."""
        self._largest = largest
        self._top = str(directory / _FORMAT)
        self._temporaries = f"{self._top}/tmp"

    def prepare(self) -> None:
        """Make the folders in the directory, for this user only, and try whether they can be written to.

        A file system that has no room now may have some later, so that is no error once the folders are there.
        """
        for folder in (self._top, self._temporaries):
            Path(folder).mkdir(mode=0o700, exist_ok=True)
        with _unless_full(), self._trial():
            pass

    def identity(self) -> str:
        """A name that this directory alone has; the first who asks gives it one. Where there is no room for it, it is
        known to this process alone."""
        path, name = f"{self._top}/id", secrets.token_hex(_ID_BYTES // 2).encode()
        with _unless_full():
            if not os.path.exists(path):
                self._name(path, name)
            deadline = time.monotonic() + _ID_PATIENCE_S
            while len(found := _beginning(path, _ID_BYTES)) < _ID_BYTES:
                if time.monotonic() > deadline:  # whoever began it is gone, or it was damaged
                    with self._trial(name) as trial:
                        os.replace(trial, path)
                time.sleep(_ID_PAUSE_S)
            name = found[:_ID_BYTES]
        return name.decode("ascii", "replace")

    def _name(self, path: str, name: bytes) -> None:
        """Write the file of the name, unless another has done so."""
        with suppress(FileExistsError), self._trial(name) as trial:
            try:
                os.link(trial, path)  # whole or not there, and never over another's
            except FileExistsError:
                raise
            except OSError:  # some file systems have no links: the next one may see it before it is whole
                with open(path, "xb", opener=_private) as file:
                    file.write(name)

    def check(self) -> None:
        """Raises OSError if the folders cannot be reached."""
        os.stat(self._temporaries)

    def now_ns(self) -> int:
        """What time it is by the file system's clock, which need not be this machine's."""
        with self._trial() as path:
            return os.stat(path).st_mtime_ns

    def read(self, name: BlockHash) -> bytes | None:
        """The block, None if it is not there."""
        head = self.head(name, self._largest)
        return None if head is None else head.data

    def head(self, name: BlockHash, length: int) -> Head | None:
        """The first `length` bytes of a block; None if it is not there."""
        with self._opened(name) as file:
            if file is None:
                return None
            size = os.fstat(file).st_size
            return Head(_read_all(file, min(length, size)), size)

    def touch(self, name: BlockHash, used_ns: int, again: bool) -> bool:
        """Note when a block was used, by the file system's clock, and for good if it was used `again`; whether it is
        there."""
        with self._opened(name) as file:
            if file is None:
                return False
            os.utime(file, ns=(used_ns, used_ns))
            mode = os.fstat(file).st_mode
            if again and not mode & _USED_AGAIN:
                os.fchmod(file, stat.S_IMODE(mode) | _USED_AGAIN)
            return True

    @contextmanager
    def _opened(self, name: BlockHash) -> Iterator[int | None]:
        """A block's file, None if it is not there."""
        try:
            file = os.open(self._path(name.hex()), _READ_FLAGS)
        except FileNotFoundError:
            yield None
            return
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "not a block")
            if facts.st_size > self._largest:
                raise TooLarge(errno.EINVAL, "larger than any block")
            yield file
        finally:
            os.close(file)

    @contextmanager
    def _trial(self, content: bytes = b"") -> Iterator[str]:
        """A file that has just been written, for a moment."""
        path = f"{self._temporaries}/{secrets.token_hex(16)}.{secrets.token_hex(8)}"
        try:
            with open(path, "xb", opener=_private) as file:
                file.write(content)
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def write(self, name: BlockHash, data: Blob) -> int | None:
        """Keep a block; returns the size of the one that it replaces."""
        path = self._path(name.hex())
        temporary = f"{self._temporaries}/{name.hex()}.{secrets.token_hex(8)}"
        try:
            file = os.open(temporary, _WRITE_FLAGS, 0o600)
            try:
                _write_all(file, data)
            finally:
                os.close(file)
            replaced = _size(path)
            try:
                os.rename(temporary, path)
            except FileNotFoundError:
                with suppress(FileExistsError):
                    os.mkdir(os.path.dirname(path), 0o700)
                os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        return replaced

    def holds(self, name: BlockHash) -> bool:
        return _size(self._path(name.hex())) is not None

    def remove(self, name: str) -> int | None:
        """Delete a block by the name of its file; returns its size, None if it was not there."""
        path = self._path(name)
        size = _size(path)
        with suppress(FileNotFoundError):
            os.unlink(path)
        return size

    def evict(self, entry: Entry) -> bool:
        """Delete a block if it is as it was found: neither used, replaced nor removed since; whether it was."""
        path = self._path(entry.name)
        try:
            if _entry(entry.name, os.stat(path, follow_symlinks=False)) != entry:
                return False
            os.unlink(path)
        except FileNotFoundError:
            return False
        return True

    def scan(self) -> list[Entry]:
        """All blocks, in no order. What comes and goes meanwhile may be in it or not."""
        return [entry for page in self.pages() for entry in page]

    def marks(self) -> Marks:
        """Others than before if a block has come, gone or been replaced, at the cost of one look at each subfolder;
        but for changes that fall into one tick of the file system's clock with the latest that they tell of."""
        marks: Marks = {}
        with os.scandir(self._top) as subfolders:
            for each in subfolders:
                if _SUBFOLDER_NAME.fullmatch(each.name):
                    with suppress(FileNotFoundError):
                        marks[each.name] = each.stat().st_mtime_ns
        return marks

    def pages(self) -> Iterator[list[Entry]]:
        """What `scan` finds, one subfolder after the other."""
        with os.scandir(self._top) as subfolders:
            names = [each.name for each in subfolders if _SUBFOLDER_NAME.fullmatch(each.name)]
        for subfolder in names:
            found: list[Entry] = []
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(f"{self._top}/{subfolder}") as files:
                for file in files:
                    if _BLOCK_NAME.fullmatch(file.name) and file.name.startswith(subfolder):
                        with suppress(FileNotFoundError):
                            facts = file.stat(follow_symlinks=False)
                            if stat.S_ISREG(facts.st_mode):
                                found.append(_entry(file.name, facts))
            yield found

    def remove_abandoned(self) -> None:
        """Delete what was being written by processes that must be dead by now."""
        with os.scandir(self._temporaries) as files:
            left = [file for file in files if _TEMPORARY_NAME.fullmatch(file.name)]
        before_ns = self.now_ns() - _ABANDONED_AFTER_NS if left else 0
        for file in left:
            with suppress(FileNotFoundError):
                if file.stat(follow_symlinks=False).st_mtime_ns < before_ns:
                    os.unlink(file.path)

    @contextmanager
    def locked(self, patience_s: float) -> Iterator[bool]:
        """Hold the directory's lock; False if another holds it for longer than `patience_s`.

        Where the file system has no locks, it is as good as held: two that evict at once remove the same files.
        """
        try:
            file = os.open(f"{self._top}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield True
            return
        try:
            yield _lock(file, patience_s)
        finally:
            os.close(file)

    def _path(self, name: str) -> str:
        return f"{self._top}/{name[:2]}/{name}"


@contextmanager
def _unless_full() -> Iterator[None]:
    """What has no room is left undone."""
    try:
        yield
    except OSError as error:
        if fault_of(error) is not Fault.FULL:
            raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _lock(file: int, patience_s: float) -> bool:
    try:
        return lock(file, fcntl.LOCK_EX, patience_s)
    except OSError:
        return True


def _entry(name: str, facts: os.stat_result) -> Entry:
    return Entry(name, facts.st_mtime_ns, facts.st_size, again=bool(facts.st_mode & _USED_AGAIN))


def _beginning(path: str, size: int) -> bytes:
    """At most so many bytes of a file; of what is none, a pipe or a link say, nothing is waited for."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, f"{path} is no file", path)
    file = os.open(path, _READ_FLAGS)
    try:
        return _read_all(file, size)
    finally:
        os.close(file)


def _size(path: str) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except FileNotFoundError:
        return None


def _read_all(file: int, size: int) -> bytes:
    """`size` bytes, or as many as there are."""
    data = os.read(file, size)
    while len(data) < size:
        more = os.read(file, size - len(data))
        if not more:
            break
        data += more
    return data


def _write_all(file: int, data: Blob) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
