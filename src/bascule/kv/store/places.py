"""Where the tiers are, as asked for on the command line: parsed, checked against the machine, and opened."""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from bascule.config import StoreConfig, parse_size
from bascule.errors import ConfigError
from bascule.kv.store.base import Fault, Store
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.folder import Folder, fault_of
from bascule.kv.store.host import HostStore
from bascule.kv.store.remote import RemoteStore
from bascule.kv.store.targets import parse_remote
from bascule.machine import memory_bytes

HOST_KEY, DISK_KEY = "--kv-host", "--kv-disk"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class DiskPlace:
    """A directory and the most bytes of blocks in it."""

    directory: Path
    capacity: int


def open_stores(config: StoreConfig) -> list[Store]:
    """The tiers asked for, the fastest first; raises ConfigError, naming the key, if one of them cannot be used.

    Servers of the remote tier need not be there yet.
    """
    if config.kv_disk is not None:
        check_disk(parse_disk(config.kv_disk))  # before the host tier is opened, which may be in the same place
    stores: list[Store] = []
    if config.kv_host is not None:
        stores.append(host_store(parse_host(config.kv_host)))
    if config.kv_disk is not None:
        stores.append(disk_store(parse_disk(config.kv_disk)))
    if config.kv_remote is not None:
        stores.append(RemoteStore(parse_remote(config.kv_remote)))
    return stores


def check_stores(config: StoreConfig) -> None:
    """Raises ConfigError as `open_stores` does, before any worker is started, and leaves what is stored alone."""
    if config.kv_host is not None:
        check_host(parse_host(config.kv_host))
    if config.kv_disk is not None:
        check_disk(parse_disk(config.kv_disk))
    if config.kv_remote is not None:
        parse_remote(config.kv_remote)


def parse_host(text: str) -> int:
    """Bytes of the host tier from `4GiB`; raises ConfigError that names the key."""
    return _positive(parse_size(text, HOST_KEY), text, HOST_KEY)


def parse_disk(text: str) -> DiskPlace:
    """The disk tier from `DIR:50GiB`; raises ConfigError that names the key."""
    directory, colon, size = text.rpartition(":")
    if not colon or not directory:
        raise ConfigError(f"{DISK_KEY}: {text!r} is not a directory and a size; write for example /var/cache/kv:50GiB")
    if re.search(r":[0-9.]+[A-Za-z]*,", directory):
        raise ConfigError(f"{DISK_KEY}: {text!r} names more than one directory; give one, and its size")
    if "\0" in directory:
        raise ConfigError(f"{DISK_KEY}: {text!r} has a null byte, which no directory's name has; write it without")
    try:
        path = Path(directory).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{DISK_KEY}: nobody has the home that {text!r} begins with; write the whole path") from error
    return DiskPlace(path, _positive(parse_size(size, DISK_KEY), size, DISK_KEY))


def host_store(capacity: int, shared_memory: Path = SHARED_MEMORY) -> HostStore:
    """The host tier: a folder in shared memory that all workers of this user on this machine share.

    Raises ConfigError as `check_host` does.
    """
    directory = check_host(capacity, shared_memory)
    try:
        return HostStore(directory, capacity)
    except OSError as error:
        raise _unusable(HOST_KEY, directory, error, "leave the key out, or mend the permissions there") from error


def check_host(capacity: int, shared_memory: Path = SHARED_MEMORY) -> Path:
    """Where the host tier is; it is made if need be.

    Raises ConfigError if the machine does not have `capacity` bytes to give, or the folder is not ours.
    """
    if capacity > (memory := memory_bytes()):
        raise ConfigError(f"{HOST_KEY}: {capacity} bytes are more than this machine's memory of {memory}; ask for less")
    directory = host_directory(shared_memory)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        check_private(directory)
        room = shutil.disk_usage(shared_memory).free + _held(directory)
    except OSError as error:
        raise _unusable(HOST_KEY, directory, error, "leave the key out, or mend the permissions there") from error
    if capacity > room:
        raise ConfigError(
            f"{HOST_KEY}: {capacity} bytes are more than the {room} that {shared_memory} has free; ask for less, "
            "or give that file system more"
        )
    return directory


def disk_store(place: DiskPlace) -> DirectoryStore:
    """The disk tier. Raises ConfigError as `check_disk` does."""
    check_disk(place)
    try:
        return DirectoryStore(place.directory, place.capacity)
    except OSError as error:
        raise _unusable(DISK_KEY, place.directory, error, "give a directory that this user can write to") from error


def check_disk(place: DiskPlace) -> None:
    """Make the directory if need be, and evict nothing there.

    Raises ConfigError if it cannot be written to, is the host tier's, or its file system is smaller than what is asked
    for.
    """
    if _is_one(place.directory, host_directory()):
        raise ConfigError(
            f"{DISK_KEY}: {place.directory} is the folder of {HOST_KEY}, which the last worker to end clears; give "
            "another directory"
        )
    try:
        place.directory.mkdir(parents=True, exist_ok=True)
        total = shutil.disk_usage(place.directory).total
        folder = Folder(place.directory, place.capacity)
        folder.prepare()
        folder.identity()
    except OSError as error:
        raise _unusable(DISK_KEY, place.directory, error, "give a directory that this user can write to") from error
    if place.capacity > total:
        raise ConfigError(
            f"{DISK_KEY}: {place.capacity} bytes are more than the whole file system of {place.directory}, which has "
            f"{total}; ask for less"
        )


def _positive(size: int, text: str, key: str) -> int:
    if size < 1:
        raise ConfigError(f"{key}: {text!r} leaves no room for a block; ask for more, or leave the key out")
    return size


def host_directory(shared_memory: Path = SHARED_MEMORY) -> Path:
    """Where the host tier of this user is."""
    return shared_memory / f"bascule-{os.getuid()}"


def _is_one(one: Path, other: Path) -> bool:
    """Whether both are the same directory, which need not be there yet."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one cannot be looked at
        return os.path.realpath(one) == os.path.realpath(other)


def check_private(directory: Path) -> None:
    """Anyone may make folders in shared memory, so ours might be somebody else's; raises PermissionError."""
    facts = directory.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise PermissionError("it is not a folder of this user alone")


def _held(directory: Path) -> int:
    """Bytes of blocks that are there from before."""
    try:
        return sum(entry.size for entry in Folder(directory, 0).scan())
    except FileNotFoundError:
        return 0


def _unusable(key: str, directory: Path, error: OSError, advice: str) -> ConfigError:
    if fault_of(error) is Fault.FULL:
        advice = "make room there"
    return ConfigError(f"{key}: {directory} cannot be used ({error.strerror or error}); {advice}")
