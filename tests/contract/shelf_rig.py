"""A place that a store has filled, and what an operator sees of it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from store_rig import PATIENT, ROOM, SHARED_MEMORY, file_of, name_of

from bascule.kv.hashing import salt_of
from bascule.kv.store import shelves
from bascule.kv.store.base import Store
from bascule.kv.store.description import describe, description_name
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.record import Payload, model_digest, pack
from bascule.kv.store.remote import RemoteStore, key_of
from bascule.kv.store.shelves import Shelf, disk_shelf, host_shelf, remote_shelves
from bascule.kv.store.targets import parse_remote
from bascule.types import BlockHash, KVLayout, ModelCard, Tier
from support.redis_server import RedisProcess

TOKENS = tuple(range(16))
ONE, TWO = model_digest("one").hex(), model_digest("two").hex()
LAYOUT = KVLayout("float32", 2, 1, 4, 16, 4, 16)


@dataclass
class Ground:
    """A place that a store has filled, and a shelf to look at it."""

    kind: str
    store: Store
    shelf: Shelf
    directory: Path | None = None
    server: RedisProcess | None = None

    def put(self, number: int, model: str = "one", codec: str = "none", size: int = 5000, secret: str = "") -> bytes:
        """Store a block as a worker does; returns its record."""
        data = random.Random(number).randbytes(size)
        record = pack(name_of(number), model, TOKENS, Payload(codec, data), salt_of(secret))
        assert self.store.put({name_of(number): record}) == 1
        return record

    def describe(self, model: str = "one", name: str = "small") -> BlockHash:
        """Store what a worker says of its model; returns under which name."""
        card = ModelCard(name=name, fingerprint=model, context=100, vocab=100, layout=LAYOUT)
        at, record = description_name(model_digest(model)), describe(card)
        assert record is not None and self.store.put({at: record}) == 1
        return at

    def put_foreign(self) -> None:
        if self.directory is not None:
            for path in self._foreign(self.directory):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"mine")
        if self.server is not None:
            self.server.client().mset(dict.fromkeys(self._foreign_keys(), b"mine"))

    def foreign_is_whole(self) -> bool:
        if self.directory is not None:
            return all(path.read_bytes() == b"mine" for path in self._foreign(self.directory))
        assert self.server is not None
        return set(self.server.client().mget(self._foreign_keys())) == {b"mine"}

    def _foreign(self, directory: Path) -> list[Path]:
        near = file_of(directory, 1).parent
        return [directory / "readme", directory / "v2" / "x", near / "notes", near / ("ff" * 16), near / ("0" * 31)]

    def _foreign_keys(self) -> list[bytes]:
        key = key_of(name_of(1))
        return [b"mine", b"bascule:1:notes", key + b"0", key[:-1], key[:-1] + b"X", b"x" + key, key + b"\n"]


@contextmanager
def ground_of(kind: str, server: RedisProcess, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """An empty place of one kind: `server`, emptied; `directory`; or one in shared memory."""
    with ExitStack() as stack:
        if kind == "remote":
            server.client().flushall()
            remote = stack.enter_context(closing(RemoteStore(parse_remote(server.url), timeout_s=PATIENT)))
            [shelf] = remote_shelves(server.url)
            stack.callback(shelf.close)
            yield Ground(kind, remote, shelf, server=server)
            return
        if kind == "host":
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="bascule-test-", dir=SHARED_MEMORY))
            )
            monkeypatch.setattr(shelves, "host_directory", lambda: directory)
        store = stack.enter_context(closing(DirectoryStore(directory, ROOM, Tier(kind), timeout_s=PATIENT)))
        yield Ground(kind, store, host_shelf() if kind == "host" else disk_shelf(directory), directory=directory)
