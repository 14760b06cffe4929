"""KV within one host: the sender maps the receiver's arena and writes each block with a single copy."""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import select
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from bascule.kv.arena import Arena, ArenaError
from bascule.kv.codecs.base import Codec
from bascule.kv.transfer.base import (
    Endpoint,
    Grant,
    Move,
    OnSafe,
    Pushed,
    TransferError,
    check_grant,
    machine_id,
    spans,
)
from bascule.kv.transfer.channel import (
    Announce,
    Channel,
    Closing,
    Flush,
    Flushed,
    Message,
    Refused,
    Welcome,
    peer_process,
)
from bascule.kv.transfer.folder import SocketFolder
from bascule.kv.transfer.frames import Malformed
from bascule.kv.transfer.listener import Listener
from bascule.types import TicketId

log = logging.getLogger(__name__)

NAME = "shm"
_ANSWER_SECONDS = 10.0
"""How long the other side, on the same host, may take to say what it is asked."""
_PIECE_BYTES = 4 << 20
"""A push is copied in pieces of about this size, whole planes of a span; `close` is seen between two of them."""


class _Refusal(Exception):
    """Why a writer is not admitted."""


class _Writer:
    """A connection whose process can write to the arena, until it says that it has stopped or is gone."""

    def __init__(self) -> None:
        self.settled = os.eventfd(0, os.EFD_CLOEXEC)
        """Readable when nobody waits for this writer any more."""


class _Ticket:
    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.revoked = False
        self.writers: set[_Writer] = set()


class ShmReceiver:
    """Hands the arena's memory to whoever announces a granted ticket; see `base.Receiver`.

    Listens on a socket in a new private directory within `directory` (default: the system's for temporary files).
    What was handed over cannot be taken back, so a revoked ticket is safe only when every writer that announced
    itself has said that it has stopped, or its process is gone.
    """

    def __init__(self, arena: Arena, on_safe: OnSafe, directory: Path | None = None) -> None:
        self.refusals: Counter[str] = Counter()
        self._arena = arena
        self._on_safe = on_safe
        self._lock = Lock()
        self._tickets: dict[TicketId, _Ticket] = {}
        self._folder = SocketFolder(directory)
        self._path = str(self._folder.path / "kv")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(self._path)
        except OSError as error:
            listening.close()
            self._folder.remove()
            raise TransferError(
                f"cannot listen on {self._path}: {error}; choose a shorter, writable directory"
            ) from error
        self._listener = Listener(listening, self._serve, "kv-shm")

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(NAME, self._path, machine_id())

    def open(self, grant: Grant) -> None:
        check_grant(grant, self._arena.num_blocks)
        with self._lock:
            if grant.ticket in self._tickets:
                raise ValueError(f"ticket {grant.ticket} is open already")
            self._tickets[grant.ticket] = _Ticket(grant)

    def revoke(self, ticket: TicketId) -> bool:
        with self._lock:
            known = self._tickets.get(ticket)
            if known is None:
                return True
            known.revoked = True
            return self._forget_if_safe(known)

    def closed(self, ticket: TicketId) -> None:
        with self._lock:
            if known := self._tickets.get(ticket):
                self._settle(known)
                self._forget_if_safe(known)

    def finish(self, ticket: TicketId) -> None:
        with self._lock:
            if known := self._tickets.pop(ticket, None):
                self._settle(known)

    def close(self) -> None:
        with self._lock:
            for known in self._tickets.values():
                self._settle(known)
            self._tickets.clear()
        self._listener.close()
        self._folder.remove()

    def _settle(self, known: _Ticket) -> None:
        """Wait for none of the ticket's writers any more."""
        for writer in known.writers:
            os.eventfd_write(writer.settled, 1)
        known.writers.clear()

    def _forget_if_safe(self, known: _Ticket) -> bool:
        """True if the ticket is revoked and nobody can write for it; then nothing is left of it."""
        safe = known.revoked and not known.writers
        if safe:
            self._tickets.pop(known.grant.ticket, None)
        return safe

    def _serve(self, connection: socket.socket, admitted: Callable[[], None]) -> None:
        channel = Channel(connection)
        try:
            with peer_process(connection) as process:
                self._attend(channel, process, admitted)
        finally:
            channel.close()

    def _attend(self, channel: Channel, process: int, admitted: Callable[[], None]) -> None:
        """Serve one writer until it has stopped for good, or until nobody waits for it any more."""
        try:
            announce = channel.receive(_ANSWER_SECONDS)
            if announce is None:
                return
            known, writer = self._admit(announce)
            admitted()
        except (_Refusal, Malformed) as error:
            with self._lock:
                self.refusals[str(error) if isinstance(error, _Refusal) else "malformed"] += 1
            channel.send(Refused(str(error)), _ANSWER_SECONDS)
            return
        if not self._stopped(channel, known, writer, process):
            _first_readable(process, writer.settled)
        self._left(known, writer)

    def _stopped(self, channel: Channel, known: _Ticket, writer: _Writer, process: int) -> bool:
        """Converse with an admitted writer. True only on its own word; any failure leaves it under suspicion."""
        try:
            channel.send(Welcome(self._arena.num_blocks, known.grant.blocks), _ANSWER_SECONDS, self._arena.fd)
            return self._converse(channel, known, writer, process)
        except (OSError, Malformed) as error:
            log.warning("lost the writer of ticket %s, now waiting for its process: %s", known.grant.ticket, error)
            return False

    def _admit(self, announce: Message) -> tuple[_Ticket, _Writer]:
        if not isinstance(announce, Announce):
            raise Malformed("a writer announces itself first")
        with self._lock:
            known = self._tickets.get(announce.ticket)
            if known is None or known.revoked:
                raise _Refusal("unknown or revoked ticket")
            if not hmac.compare_digest(known.grant.secret, announce.secret):
                raise _Refusal("wrong secret")
            if announce.layout != self._arena.layout:
                raise _Refusal("other layout")
            writer = _Writer()
            known.writers.add(writer)
            return known, writer

    def _converse(self, channel: Channel, known: _Ticket, writer: _Writer, process: int) -> bool:
        """Answer the writer; True once it says that it has stopped, False when it is gone or nobody waits for it."""
        while _first_readable(channel.fileno(), process, writer.settled) == channel.fileno():
            message = channel.receive(_ANSWER_SECONDS)
            if not isinstance(message, Flush):
                return isinstance(message, Closing)
            refused = known.revoked or writer not in known.writers
            # One that is closing reads no more, but its last word is still to come.
            with contextlib.suppress(OSError):
                channel.send(Refused("revoked") if refused else Flushed(), _ANSWER_SECONDS)
        return False

    def _left(self, known: _Ticket, writer: _Writer) -> None:
        with self._lock:
            waited_for = writer in known.writers
            known.writers.discard(writer)
            safe = waited_for and self._forget_if_safe(known)
            os.close(writer.settled)
        if safe:
            self._on_safe(known.grant.ticket)


class ShmSession:
    """Writes of one ticket into the peer's mapped arena; see `base.Session`."""

    transport = NAME

    def __init__(self, channel: Channel, arena: Arena, peer: Arena, ticket: TicketId, granted: frozenset[int]) -> None:
        self._channel = channel
        self._source = arena.bytes
        self._target = peer.bytes
        self._ticket = ticket
        self._granted = granted
        self._block_bytes = arena.layout.block_bytes
        self._copying = Lock()
        self._asking = Lock()
        self._closed = False
        """No more pushes."""
        self._ended = False
        """The receiver has been told."""

    def push(self, moves: Sequence[Move], codec: Codec | None = None) -> Pushed:
        """See `base.Session.push`; nothing is coded, because nothing crosses a link."""
        if not self._granted.issuperset(move.target for move in moves):
            raise TransferError(f"ticket {self._ticket} does not grant all of the blocks to be written; none was")
        for span in spans(moves):
            source = self._source[:, span.source : span.source + span.count]
            target = self._target[:, span.target : span.target + span.count]
            few = max(1, _PIECE_BYTES // source[0].nbytes)
            for plane in range(0, len(source), few):
                self._copy(target[plane : plane + few], source[plane : plane + few])
        return Pushed(len(moves) * self._block_bytes)

    def _copy(self, target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        with self._copying:
            self._require_open()
            np.copyto(target, source)

    def flush(self) -> None:
        with self._asking:
            self._require_open()
            try:
                self._channel.send(Flush(), _ANSWER_SECONDS)
                answer = self._channel.receive(_ANSWER_SECONDS)
            except (OSError, Malformed) as error:
                self._closed = True
                raise TransferError(
                    f"the KV receiver of ticket {self._ticket} does not answer: {error}; prepare it again"
                ) from error
        if not isinstance(answer, Flushed):
            reason = answer.reason if isinstance(answer, Refused) else "it was closed"
            raise TransferError(f"the receiver refused ticket {self._ticket}: {reason}; prepare the handoff again")

    def _require_open(self) -> None:
        if self._closed:
            raise TransferError(f"the session for ticket {self._ticket} is closed")

    def close(self) -> None:
        self._closed = True
        self._channel.interrupt()
        with self._copying, self._asking:
            if not self._ended:
                self._ended = True
                with contextlib.suppress(OSError):
                    self._channel.send(Closing(), _ANSWER_SECONDS)
                self._channel.close()


class ShmSender:
    """Writes blocks of `arena` into arenas of the same host; keeps one mapping a receiver. See `base.Sender`."""

    transport = NAME

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._lock = Lock()
        self._mapped: dict[str, Arena] = {}
        self._sessions: WeakSet[ShmSession] = WeakSet()

    def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> ShmSession:
        if endpoint.machine != machine_id():
            raise TransferError(f"the KV receiver at {endpoint.address} is on another host; use tcp")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_ANSWER_SECONDS)
            connection.connect(endpoint.address)
            channel = Channel(connection)
        except OSError as error:
            connection.close()
            raise TransferError(
                f"cannot reach the KV receiver at {endpoint.address}: {error}; check that the worker lives and shares "
                "its runtime directory with this one, or use tcp"
            ) from error
        try:
            session = self._announce(channel, endpoint, ticket, secret)
        except (OSError, Malformed, ArenaError) as error:
            channel.close()
            raise TransferError(f"the KV receiver at {endpoint.address} cannot be used: {error}; use tcp") from error
        except TransferError:
            channel.close()
            raise
        with self._lock:
            self._sessions.add(session)
        return session

    def _announce(self, channel: Channel, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> ShmSession:
        channel.send(Announce(ticket, secret, self._arena.layout), _ANSWER_SECONDS)
        answer = channel.receive(_ANSWER_SECONDS)
        if isinstance(answer, Refused):
            raise TransferError(f"the receiver refused ticket {ticket}: {answer.reason}; prepare the handoff again")
        if not isinstance(answer, Welcome):
            raise ConnectionError("it closed the connection")
        peer = self._map(endpoint.address, channel.take_fd(), answer.num_blocks)
        return ShmSession(channel, self._arena, peer, ticket, frozenset(answer.blocks))

    def _map(self, address: str, fd: int, num_blocks: int) -> Arena:
        """The mapping of the arena that `fd` names: the one kept from before, or a new one."""
        with self._lock:
            kept = self._mapped.get(address)
            if kept is not None and os.path.sameopenfile(kept.fd, fd):
                os.close(fd)
                return kept
            for other in [known for known in self._mapped if known == address or not _answers(known)]:
                self._mapped.pop(other).close()
            self._mapped[address] = Arena.attach(fd, self._arena.layout, num_blocks)
            return self._mapped[address]

    def close(self) -> None:
        with self._lock:
            sessions, mapped = list(self._sessions), list(self._mapped.values())
            self._mapped.clear()
        for session in sessions:
            session.close()
        for arena in mapped:
            arena.close()


def _first_readable(*files: int) -> int:
    """Wait, without bound, until one of the files is readable or ended."""
    poller = select.poll()
    for file in files:
        poller.register(file, select.POLLIN)
    return poller.poll()[0][0]


def _answers(address: str) -> bool:
    """False for a receiver that is gone, so that its memory need not be kept mapped."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # one that is stopped would let wait
        return probe.connect_ex(address) not in (errno.ENOENT, errno.ECONNREFUSED)
