"""The places of the tiers as their operator looks at them: nothing is made, evicted, touched or given a longer life.

A store hides what fails, because a miss is enough for it; here it is told. Workers may use the places meanwhile.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from msgspec import Struct
from redis.exceptions import ResponseError

from bascule.errors import ConfigError
from bascule.kv.store import folder, server
from bascule.kv.store.base import Fault
from bascule.kv.store.directory import LARGEST
from bascule.kv.store.folder import Folder, Head
from bascule.kv.store.places import check_private, host_directory
from bascule.kv.store.record import HEAD_BYTES
from bascule.kv.store.remote import PREFIX, key_of, name_in
from bascule.kv.store.server import Command, Server, Walk
from bascule.kv.store.targets import Target, parse_remote
from bascule.types import BlockHash, Tier

HOST_FLAG, DISK_FLAG, REMOTE_FLAG = "--host", "--disk", "--remote"
_CONNECT_S, _TIMEOUT_S = 2.0, 10.0
_ADVICE = {
    Fault.DENIED: "give its password in a URL of its own, and let its user read, scan and unlink",
    Fault.GONE: "start it, or leave it out (then its own blocks stay)",
    Fault.SLOW: "try again when it answers",
}


class Room(Struct, frozen=True):
    """The most bytes that a place may hold and those that are free, None where it knows no bound.

    A folder knows its file system's; how much of that is for blocks, each worker is told.
    """

    capacity_bytes: int | None
    free_bytes: int | None


class Shelf(Protocol):
    """A folder or a server. Every method raises ConfigError, which names the flag and what to do, if the place fails;
    a Fault in an answer is that of one block."""

    @property
    def tier(self) -> Tier: ...

    @property
    def label(self) -> str:
        """What to call it; no password."""
        ...

    def check(self) -> None:
        """Whether the place is there and may be used; changes nothing."""
        ...

    def names(self) -> Iterator[list[BlockHash]]:
        """All blocks, some at a time. What comes or goes meanwhile may be left out; a server may tell one twice."""
        ...

    def heads(self, names: Sequence[BlockHash]) -> list[Head | Fault | None]:
        """The first `record.HEAD_BYTES` of each block; None for one that is not there."""
        ...

    def read(self, name: BlockHash) -> bytes | Fault | None:
        """A block, None if it is not there."""
        ...

    def drop(self, names: Sequence[BlockHash]) -> int:
        """Forget blocks; returns how many were there."""
        ...

    def room(self) -> Room: ...

    def close(self) -> None:
        """Idempotent."""
        ...


def host_shelf() -> FolderShelf:
    """This user's folder in shared memory."""
    advice = "a worker with --kv-host makes it; without one there is nothing to see"
    return FolderShelf(host_directory(), Tier.HOST, HOST_FLAG, advice)


def disk_shelf(directory: Path) -> FolderShelf:
    """A directory that workers have as --kv-disk; raises ConfigError if it is below a home that nobody has."""
    try:
        directory = directory.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{DISK_FLAG}: nobody has the home of {directory}; write the whole path") from error
    bare = Path(str(directory).rpartition(":")[0])
    sized = bare != Path() and bare.is_dir() and not directory.exists()
    advice = (
        f"write {bare}, without a size"
        if sized
        else "give the directory that the workers have as --kv-disk, and see that it is mounted"
    )
    return FolderShelf(directory, Tier.DISK, DISK_FLAG, advice)


def remote_shelves(text: str) -> list[ServerShelf]:
    """The servers of --kv-remote; raises ConfigError if the text is malformed."""
    return [ServerShelf(target) for target in parse_remote(text, REMOTE_FLAG)]


class FolderShelf:
    """The host or the disk tier."""

    def __init__(self, directory: Path, tier: Tier, flag: str, advice: str) -> None:
        """`advice` says what to do if the directory cannot be used."""
        self.tier = tier
        self.label = str(directory)
        self._flag = flag
        self._advice = advice
        self._directory = directory
        self._folder = Folder(directory, LARGEST)

    def check(self) -> None:
        with self._told():
            if self.tier is Tier.HOST:
                check_private(self._directory)
            self._check()

    def _check(self) -> None:
        """Raises OSError if there are no folders of a store."""
        try:
            self._folder.check()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "it is not there, or there is no store in it") from None

    def names(self) -> Iterator[list[BlockHash]]:
        with self._told():
            for page in self._folder.pages():
                yield [BlockHash(bytes.fromhex(entry.name)) for entry in page]
            self._check()  # a directory that vanishes looks like an empty one

    def heads(self, names: Sequence[BlockHash]) -> list[Head | Fault | None]:
        return [self._head(name, HEAD_BYTES) for name in names]

    def read(self, name: BlockHash) -> bytes | Fault | None:
        found = self._head(name, LARGEST)
        return found.data if isinstance(found, Head) else found

    def drop(self, names: Sequence[BlockHash]) -> int:
        with self._told():
            return sum(self._folder.remove(name.hex()) is not None for name in names)

    def room(self) -> Room:
        with self._told():
            usage = shutil.disk_usage(self.label)
        return Room(usage.total, usage.free)

    def close(self) -> None:
        pass

    @contextmanager
    def _told(self) -> Iterator[None]:
        """OSError as ConfigError."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self._flag}: {self.label} cannot be used ({error.strerror or error}); {self._advice}"
            ) from error

    def _head(self, name: BlockHash, length: int) -> Head | Fault | None:
        try:
            return self._folder.head(name, length)
        except OSError as error:
            return folder.fault_of(error)


class ServerShelf:
    """One server of the remote tier: what lies there, whether or not the ring would look for it there."""

    tier = Tier.REMOTE

    def __init__(self, target: Target) -> None:
        self.label = target.label
        self._server = Server(target, connections=1, connect_s=_CONNECT_S, timeout_s=_TIMEOUT_S)

    def check(self) -> None:
        with self._told():
            if _first(self._server.pipeline([("PING",)])) not in (True, b"PONG"):
                raise ResponseError("not an answer to PING")

    def names(self) -> Iterator[list[BlockHash]]:
        walk = Walk()
        while not walk.ended:
            with self._told():
                found = [name_in(key) for key in self._server.scan(PREFIX, walk)]
            yield [name for name in found if name is not None]

    def heads(self, names: Sequence[BlockHash]) -> list[Head | Fault | None]:
        # EXISTS, because an empty value and none have the same length.
        commands: list[Command] = []
        for key in map(key_of, names):
            commands += [("STRLEN", key), ("GETRANGE", key, 0, HEAD_BYTES - 1), ("EXISTS", key)]
        with self._told():
            replies = self._server.pipeline(commands) if commands else []
        return [_head(*replies[start : start + 3]) for start in range(0, len(replies), 3)]

    def read(self, name: BlockHash) -> bytes | Fault | None:
        with self._told():
            [reply] = self._server.pipeline([("GET", key_of(name))])
        if isinstance(reply, ResponseError):
            return server.fault_of(reply)
        return reply if reply is None or isinstance(reply, bytes) else Fault.BROKEN

    def drop(self, names: Sequence[BlockHash]) -> int:
        if not names:
            return 0
        with self._told():
            match _first(self._server.pipeline([("UNLINK", *map(key_of, names))])):
                case int(dropped):
                    return dropped
                case _:
                    raise ResponseError("not an answer to UNLINK")

    def room(self) -> Room:
        with self._told():
            try:
                facts = self._server.facts()
            except ResponseError:  # servers for hire do not tell everyone
                return Room(None, None)
        if not facts.capacity_bytes:
            return Room(None, None)
        return Room(facts.capacity_bytes, max(0, facts.capacity_bytes - facts.bytes))

    def close(self) -> None:
        self._server.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong with a server, as ConfigError."""
        try:
            yield
        except Exception as error:
            fault = server.fault_of(error)
            advice = _ADVICE.get(fault, "is it Redis 6.2 or later, or Valkey, and has it that database?")
            raise ConfigError(f"{REMOTE_FLAG}: {self.label} is {fault} ({str(error)[:200]}); {advice}") from error


def _first(replies: Sequence[object]) -> object:
    """The only reply; raises it if it is a refusal."""
    [reply] = replies
    if isinstance(reply, ResponseError):
        raise reply
    return reply


def _head(size: object, data: object, there: object) -> Head | Fault | None:
    for reply in (size, data, there):
        if isinstance(reply, ResponseError):
            return server.fault_of(reply)
    if there == 0:
        return None
    return Head(data, size) if isinstance(data, bytes) and isinstance(size, int) else Fault.BROKEN
