"""KV that leaves over TCP: gathered straight from the arena, or coded piece by piece; the other end is `tcp.py`."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator, Sequence
from threading import Lock
from time import perf_counter
from weakref import WeakSet

from bascule.kv.arena import Arena
from bascule.kv.codecs.base import EXACT, Bytes, CannotEncode, Codec
from bascule.kv.transfer.base import (
    Endpoint,
    Move,
    Pushed,
    Span,
    TransferError,
    spans,
)
from bascule.kv.transfer.coding import arriving, arriving_checksums, blocks_at_a_time, cut
from bascule.kv.transfer.frames import (
    REPLY_BYTES,
    Buffers,
    Header,
    Kind,
    Malformed,
    Verdict,
    layout_digest,
    payload,
    ticket_key,
    unpack_reply,
)
from bascule.kv.transfer.sealing import CLEAR, SALT_BYTES, hello, seals
from bascule.kv.transfer.stream import Stream
from bascule.kv.transfer.tcp import NAME
from bascule.types import TicketId


class TcpSession:
    """Writes of one ticket over a connection of their own; see `base.Session`."""

    transport = NAME

    def __init__(
        self,
        connection: socket.socket,
        arena: Arena,
        ticket: TicketId,
        secret: bytes,
        patience: float,
        cluster_key: bytes | None = None,
    ) -> None:
        """Announces the ticket, sealed where there is a key; raises TransferError if it is refused."""
        self._connection = connection
        self._stream, self._form = Stream(connection), CLEAR
        self._peer = self._stream.peer()
        self._arena = arena
        self._ticket = ticket
        self._key = ticket_key(ticket)
        self._secret = secret
        self._layout = layout_digest(arena.layout)
        self._patience = patience
        self._using = Lock()
        self._closed = False
        if cluster_key is not None:
            self._seal(cluster_key)
        self._ask(Kind.ANNOUNCE)

    def _seal(self, cluster_key: bytes) -> None:
        with self._failing_well("seal"):
            said = hello(self._key, self._layout)
            self._send(Kind.SEAL, Buffers([memoryview(said.pack())]))
            self._read_reply()
            if not (salt := self._stream.read(SALT_BYTES, self._patience)):
                raise ConnectionError("the receiver closed the connection")
            self._form = seals(cluster_key, self._secret, said, salt)[0]

    def push(self, moves: Sequence[Move], codec: Codec | None = None) -> Pushed:
        with self._failing_well("push"):
            if codec is not None:
                return self._push_coded(moves, codec)
            for span in spans(moves):
                self._write(span)
        return Pushed(len(moves) * self._arena.layout.block_bytes)

    def _push_coded(self, moves: Sequence[Move], codec: Codec) -> Pushed:
        wire_bytes, idle_s, place = 0, 0.0, 0
        coded: dict[int, bytes] = {}
        for span in cut(spans(moves), blocks_at_a_time(codec.layout)):
            begun = perf_counter()
            try:
                records = codec.encode(self._arena.bytes[:, span.source : span.source + span.count])
            except CannotEncode:
                idle_s += self._idle_since(begun)
                self._write(span)
                wire_bytes += span.count * codec.layout.block_bytes
            else:
                idle_s += self._idle_since(begun)
                self._write(span, codec.name, records)
                wire_bytes += records.nbytes
                begun = perf_counter()
                coded.update(enumerate(arriving_checksums(arriving(codec, records)), place))
                idle_s += self._idle_since(begun)
            place += span.count
        return Pushed(wire_bytes, idle_s, coded)

    def _write(self, span: Span, codec: str = EXACT, records: Bytes | None = None) -> None:
        """One frame: the blocks as they lie in the arena, or `records` of them."""
        blocks = payload(self._arena, span.source, span.count) if records is None else [records.reshape(-1).data]
        for part in self._form.outgoing(self._header(Kind.WRITE, span.target, span.count, codec), blocks):
            self._send(Kind.WRITE, part)

    def _idle_since(self, begun: float) -> float:
        """Seconds since `begun` if the link has run out of bytes meanwhile, though perhaps only just now."""
        return 0.0 if self._stream.has_unsent() else perf_counter() - begun

    def flush(self) -> None:
        self._ask(Kind.FLUSH)

    def _ask(self, kind: Kind) -> None:
        with self._failing_well(kind.name.lower()):
            self._send(kind, Buffers([memoryview(self._form.wrap(self._header(kind)))]))
            self._read_reply()

    def _header(self, kind: Kind, first: int = 0, count: int = 0, codec: str = EXACT) -> bytes:
        return Header(kind, self._key, self._secret, self._layout, first, count, codec).pack()

    def _send(self, _: Kind, memory: Buffers) -> None:
        """Send all of such a frame or a part of one, but stop when the receiver says anything before it takes more:
        during a write that is a refusal."""
        while memory.left:
            if self._stream.send_some(memory):
                continue
            if self._stream.wait(select.POLLIN | select.POLLOUT, self._patience) & ~select.POLLOUT:
                self._read_reply()
                raise Malformed("an answer that nothing asked for")

    def _read_reply(self) -> None:
        reply = self._stream.read(REPLY_BYTES + self._form.extra, self._patience)
        if not reply:
            raise ConnectionError("the receiver closed the connection")
        verdict = unpack_reply(self._form.unwrap(reply))
        if verdict is not Verdict.DONE:
            raise TransferError(
                f"the receiver at {self._peer} refused ticket {self._ticket}: {verdict.words}; {verdict.remedy}"
            )

    @contextlib.contextmanager
    def _failing_well(self, doing: str) -> Iterator[None]:
        """One use of the connection at a time; after a failure, which may be in mid-frame, there is no other."""
        with self._using:
            if self._closed:
                raise TransferError(f"cannot {doing}: the session for ticket {self._ticket} is closed")
            try:
                yield
            except TransferError:
                self._end()
                raise
            except (OSError, Malformed) as error:
                self._end()
                raise TransferError(
                    f"cannot {doing} ticket {self._ticket} over tcp to {self._peer}: {error}; "
                    "check that the worker there lives, then prepare the handoff again"
                ) from error

    def _end(self) -> None:
        self._closed = True
        self._stream.shut_down()

    def close(self) -> None:
        self._end()
        with self._using:
            self._connection.close()


class TcpSender:
    """Sends blocks of `arena`, sealed where there is a `key`; gives a receiver up that takes nothing for `patience`
    seconds. See `base.Sender`."""

    transport = NAME

    def __init__(self, arena: Arena, patience: float = 20.0, key: bytes | None = None) -> None:
        self._arena = arena
        self._patience = patience
        self._key = key
        self._lock = Lock()
        self._sessions: WeakSet[TcpSession] = WeakSet()

    def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> TcpSession:
        host, _, port = endpoint.address.rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=self._patience)
        except (OSError, ValueError, OverflowError) as error:  # the last one of a port that is none
            raise TransferError(
                f"cannot reach the KV receiver at {endpoint.address} over tcp: {error}; "
                "check that the worker lives and that no firewall is between"
            ) from error
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = TcpSession(connection, self._arena, ticket, secret, self._patience, self._key)
        except (TransferError, OSError) as error:
            connection.close()
            raise TransferError(str(error)) from error
        with self._lock:
            self._sessions.add(session)
        return session

    def close(self) -> None:
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
