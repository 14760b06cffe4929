"""The decision log: a line of JSON for every request that has ended, written by a thread of its own.

A line holds what a simulator needs to replay the request, and neither text nor token ids. Blocks and sessions are named
by digests under a random key that is kept nowhere: equal names within one run of the router mean equal beginnings and
the same conversation, and nothing can be looked up by them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, Queue
from queue import Full as QueueFull

import msgspec

from bascule.errors import ConfigError
from bascule.observe.decision_fields import record_fields
from bascule.observe.decisions import Record
from bascule.types import BlockHash

log = logging.getLogger(__name__)

WAITING = 10_000
"""Lines that may wait for a slow disk; those beyond are counted and lost."""
_BATCH = 500
_CLOSE_S = 5.0
_NAME_BYTES = 8

_Entry = tuple[Record, tuple[BlockHash, ...]]


def opened(path: Path) -> int:
    """The descriptor of a log to append to; raises ConfigError, which names the key, where it cannot be written."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"decision-log: cannot write to {path}: {error.strerror}; choose a file in a directory that exists and "
            "is writable"
        ) from error


class DecisionLog:
    """Appends to one file. A disk that is full or slow costs lines, never requests."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError, which names the key, for a file that cannot be written."""
        self.lost = 0
        """Requests that could not be written."""
        self._path = path
        self._key = secrets.token_bytes(16)
        self._encode = msgspec.json.Encoder().encode
        self._entries: Queue[_Entry | None] = Queue(WAITING)
        self._torn = False
        """The file ends within a line."""
        self._file = opened(path)
        self._thread = threading.Thread(target=self._write_all, name="decision-log", daemon=True)
        self._thread.start()

    def write(self, record: Record, blocks: Sequence[BlockHash]) -> None:
        """Log a request that has ended; never waits. The record must not change any more."""
        try:
            self._entries.put_nowait((record, tuple(blocks)))
        except QueueFull:
            self._lose(1, "the disk is too slow")

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        try:
            self._entries.put(None, timeout=_CLOSE_S)
        except QueueFull:
            return
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            os.close(self._file)

    def _write_all(self) -> None:
        while True:
            entries = [self._entries.get()]
            while len(entries) < _BATCH and entries[-1] is not None:
                try:
                    entries.append(self._entries.get_nowait())
                except Empty:
                    break
            batch = [entry for entry in entries if entry is not None]
            try:
                self._append(b"".join(self._line(*entry) for entry in batch))
            except OSError as error:
                self._lose(len(batch), error.strerror or str(error))
            except Exception as error:  # what a plug-in has put there, say; the thread must live on
                self._lose(len(batch), f"{type(error).__name__}: {error}")
            if entries[-1] is None:
                return

    def _append(self, data: bytes) -> None:
        """Append whole lines; what an earlier failure cut off is closed by a line end of its own."""
        rest = memoryview(b"\n" + data if self._torn and data else data)
        while rest:
            written = os.write(self._file, rest)
            if written == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            rest = rest[written:]
            self._torn = bool(rest)

    def _line(self, record: Record, blocks: tuple[BlockHash, ...]) -> bytes:
        fields = record_fields(record)
        fields["session"] = self._name(record.session.encode()) if record.session else ""
        fields["blocks"] = [self._name(block) for block in blocks]
        return self._encode(fields) + b"\n"

    def _name(self, value: bytes) -> str:
        return hashlib.blake2s(value, digest_size=_NAME_BYTES, key=self._key).hexdigest()

    def _lose(self, count: int, why: str) -> None:
        if self.lost == 0:
            log.error("decision log %s: %s; requests go on, and lines that are lost are counted", self._path, why)
        self.lost += count
