"""KV over TCP: scattered straight from one arena's memory into the other's, never past a revocation.

Full blocks may be coded on the way, by pieces: the sender encodes one while the kernel sends the one before, and the
receiver decodes each from memory of its own into the arena.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from time import perf_counter
from weakref import WeakSet

import numpy as np

from bascule.kv.arena import Arena
from bascule.kv.codecs.base import EXACT, Bytes, CannotDecode, CannotEncode, Codec
from bascule.kv.transfer.base import (
    Endpoint,
    Grant,
    Move,
    OnSafe,
    Pushed,
    Span,
    TransferError,
    check_grant,
    machine_id,
    spans,
)
from bascule.kv.transfer.coding import arriving, arriving_checksums, blocks_at_a_time, cut
from bascule.kv.transfer.frames import (
    HEADER_BYTES,
    REPLY_BYTES,
    Buffers,
    Header,
    Kind,
    Malformed,
    Verdict,
    layout_digest,
    pack_reply,
    payload,
    ticket_key,
    unpack_reply,
)
from bascule.kv.transfer.listener import Listener
from bascule.kv.transfer.stream import DRAIN_SECONDS, Stream
from bascule.types import TicketId

NAME = "tcp"
_GREETING_SECONDS = 10.0
"""How long a new connection may take to send its first header."""


class _Refusal(Exception):
    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.words)
        self.verdict = verdict


class _OpenGrant:
    """A grant and the lock under which its blocks are written: who holds the lock knows that nobody writes."""

    def __init__(self, grant: Grant) -> None:
        self.secret = grant.secret
        self.blocks = frozenset(grant.blocks)
        self.lock = Lock()
        self.revoked = False


class TcpReceiver:
    """Listens on `host` (which is also what peers connect to) and `port` (0: a free one); see `base.Receiver`.

    Blocks may come as they are, or through one of `codecs`. Bytes go into the arena by calls that wait for no peer,
    each under its grant's lock after a look at whether it is still open. So once `revoke` has had that lock no late
    write is possible, whatever the writer does.
    """

    def __init__(
        self, arena: Arena, on_safe: OnSafe, host: str, port: int = 0, codecs: Mapping[str, Codec] = {}
    ) -> None:
        self.refusals: Counter[str] = Counter()
        self._arena = arena
        self._codecs = codecs
        self._layout = layout_digest(arena.layout)
        self._lock = Lock()
        self._grants: dict[bytes, _OpenGrant] = {}
        try:
            listening = _listen(host, port)
        except OSError as error:
            raise TransferError(f"cannot listen on {host}:{port} for KV: {error}; choose another address") from error
        self._address = f"{host}:{listening.getsockname()[1]}"
        self._listener = Listener(listening, self._serve, "kv-tcp")

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(NAME, self._address, machine_id())

    def open(self, grant: Grant) -> None:
        check_grant(grant, self._arena.num_blocks)
        with self._lock:
            if self._grants.setdefault(ticket_key(grant.ticket), opened := _OpenGrant(grant)) is not opened:
                raise ValueError(f"ticket {grant.ticket} is open already")

    def revoke(self, ticket: TicketId) -> bool:
        with self._lock:
            grant = self._grants.pop(ticket_key(ticket), None)
        if grant is not None:
            with grant.lock:
                grant.revoked = True
        return True

    def closed(self, ticket: TicketId) -> None:
        """Nothing to wait for: a write is over when `revoke` returns."""

    def finish(self, ticket: TicketId) -> None:
        self.revoke(ticket)

    def close(self) -> None:
        with self._lock:
            grants = list(self._grants.values())
            self._grants.clear()
        for grant in grants:
            with grant.lock:
                grant.revoked = True
        self._listener.close()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that loses power says no goodbye: without this its connection would stay for good.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
        stream = Stream(connection)
        try:
            patience: float | None = _GREETING_SECONDS
            while header := stream.read(HEADER_BYTES, patience):
                self._take(stream, Header.unpack(header))
                patience = None
        except (_Refusal, Malformed) as error:
            verdict = error.verdict if isinstance(error, _Refusal) else Verdict.MALFORMED
            with self._lock:
                self.refusals[verdict.words] += 1
            stream.write(Buffers([memoryview(pack_reply(verdict))]), DRAIN_SECONDS)
            stream.drain()

    def _take(self, stream: Stream, header: Header) -> None:
        """Do what a frame asks; everything before it on this connection lies in the arena."""
        grant = self._admit(header)
        if header.kind is Kind.WRITE:
            if header.codec == EXACT:
                self._receive(stream, grant, Buffers(payload(self._arena, header.first, header.count)))
            else:
                self._receive_coded(stream, grant, header)
            return
        with grant.lock:
            if grant.revoked:
                raise _Refusal(Verdict.REVOKED)
        stream.write(Buffers([memoryview(pack_reply(Verdict.DONE))]), _GREETING_SECONDS)

    def _admit(self, header: Header) -> _OpenGrant:
        """The grant that a frame goes by. Raises _Refusal unless it covers all that the frame asks."""
        with self._lock:
            grant = self._grants.get(header.key)
        if grant is None:
            raise _Refusal(Verdict.UNKNOWN_TICKET)
        if not hmac.compare_digest(grant.secret, header.secret):
            raise _Refusal(Verdict.WRONG_SECRET)
        if header.layout != self._layout:
            raise _Refusal(Verdict.OTHER_LAYOUT)
        if header.count > len(grant.blocks) or not grant.blocks.issuperset(
            range(header.first, header.first + header.count)
        ):
            raise _Refusal(Verdict.OUTSIDE_GRANT)
        if header.codec != EXACT and header.codec not in self._codecs:
            raise _Refusal(Verdict.CODEC_NOT_ALLOWED)
        return grant

    def _receive(self, stream: Stream, grant: _OpenGrant, memory: Buffers) -> None:
        while memory.left:
            with grant.lock:
                if grant.revoked:
                    raise _Refusal(Verdict.REVOKED)
                received = stream.receive_some(memory)
            if not received:
                stream.wait(select.POLLIN, None)

    def _receive_coded(self, stream: Stream, grant: _OpenGrant, header: Header) -> None:
        codec, end = self._codecs[header.codec], header.first + header.count
        most = blocks_at_a_time(codec.layout)
        for first in range(header.first, end, most):
            records = np.empty((min(most, end - first), codec.record_bytes), np.uint8)
            self._receive(stream, grant, Buffers([records.reshape(-1).data]))
            with grant.lock:
                if grant.revoked:
                    raise _Refusal(Verdict.REVOKED)
                try:
                    codec.decode(records, self._arena.bytes[:, first : first + len(records)])
                except CannotDecode:
                    raise _Refusal(Verdict.MALFORMED_RECORDS) from None


class TcpSession:
    """Writes of one ticket over a connection of their own; see `base.Session`."""

    transport = NAME

    def __init__(
        self, connection: socket.socket, arena: Arena, ticket: TicketId, secret: bytes, patience: float
    ) -> None:
        """Announces the ticket; raises TransferError if it is refused."""
        self._connection = connection
        self._stream = Stream(connection)
        self._peer = "{}:{}".format(*connection.getpeername()[:2])
        self._arena = arena
        self._ticket = ticket
        self._key = ticket_key(ticket)
        self._secret = secret
        self._layout = layout_digest(arena.layout)
        self._patience = patience
        self._using = Lock()
        self._closed = False
        self._ask(Kind.ANNOUNCE)

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
        self._send(Buffers([memoryview(self._header(Kind.WRITE, span.target, span.count, codec)), *blocks]))

    def _idle_since(self, begun: float) -> float:
        """Seconds since `begun` if the link has run out of bytes meanwhile, though perhaps only just now."""
        return 0.0 if self._stream.has_unsent() else perf_counter() - begun

    def flush(self) -> None:
        self._ask(Kind.FLUSH)

    def _ask(self, kind: Kind) -> None:
        with self._failing_well(kind.name.lower()):
            self._send(Buffers([memoryview(self._header(kind))]))
            self._read_reply()

    def _header(self, kind: Kind, first: int = 0, count: int = 0, codec: str = EXACT) -> bytes:
        return Header(kind, self._key, self._secret, self._layout, first, count, codec).pack()

    def _send(self, memory: Buffers) -> None:
        """Send all, but stop when the receiver says anything before it takes more: during a write that is a refusal."""
        while memory.left:
            if self._stream.send_some(memory):
                continue
            if self._stream.wait(select.POLLIN | select.POLLOUT, self._patience) & ~select.POLLOUT:
                self._read_reply()
                raise Malformed("an answer that nothing asked for")

    def _read_reply(self) -> None:
        reply = self._stream.read(REPLY_BYTES, self._patience)
        if not reply:
            raise ConnectionError("the receiver closed the connection")
        verdict = unpack_reply(reply)
        if verdict is not Verdict.DONE:
            raise TransferError(
                f"the receiver at {self._peer} refused ticket {self._ticket}: {verdict.words}; "
                "prepare the handoff again"
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
    """Sends blocks of `arena`; gives a receiver up that takes nothing for `patience` seconds. See `base.Sender`."""

    transport = NAME

    def __init__(self, arena: Arena, patience: float = 20.0) -> None:
        self._arena = arena
        self._patience = patience
        self._lock = Lock()
        self._sessions: WeakSet[TcpSession] = WeakSet()

    def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> TcpSession:
        host, _, port = endpoint.address.rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=self._patience)
        except (OSError, ValueError) as error:
            raise TransferError(
                f"cannot reach the KV receiver at {endpoint.address} over tcp: {error}; "
                "check that the worker lives and that no firewall is between"
            ) from error
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = TcpSession(connection, self._arena, ticket, secret, self._patience)
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


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Its buffers are left to the kernel, which grows them further than it lets a program ask for."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening
