"""KV that comes over TCP: received straight into the arena, never past a revocation; the other end is `tcp_sender.py`.

Full blocks may be coded on the way, by pieces: the sender encodes one while the kernel sends the one before, and the
receiver decodes each from memory of its own into the arena. Where the cluster has a key all is sealed, behind that.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import select
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from threading import Lock
from time import monotonic

import numpy as np

from bascule.kv.arena import Arena
from bascule.kv.codecs.base import EXACT, CannotDecode, Codec
from bascule.kv.transfer.base import (
    Endpoint,
    Grant,
    OnSafe,
    TransferError,
    check_grant,
    machine_id,
)
from bascule.kv.transfer.coding import blocks_at_a_time
from bascule.kv.transfer.frames import (
    HEADER_BYTES,
    Buffers,
    Header,
    Kind,
    Malformed,
    Verdict,
    layout_digest,
    pack_reply,
    payload,
    ticket_key,
)
from bascule.kv.transfer.listener import Listener, bound
from bascule.kv.transfer.sealing import CLEAR, SALT_BYTES, Forged, Form, seals
from bascule.kv.transfer.stream import DRAIN_SECONDS, Stream
from bascule.types import TicketId

log = logging.getLogger(__name__)

NAME = "tcp"
_GREETING_SECONDS = 10.0
"""How long a new connection may take to announce a ticket, all that comes before included."""
_STALL_SECONDS = 30.0
"""How long a frame that has begun may stand still."""


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
        self.finished = False
        """Revoked because all has come."""
        self.writers: set[_Writer] = set()

    def require_open(self) -> None:
        """With the lock: raises _Refusal where it is revoked."""
        if self.revoked:
            raise _Refusal(Verdict.REVOKED)

    def end(self, *, finished: bool = False) -> None:
        """When it returns nobody writes any more, and whoever waits for a writer wakes."""
        with self.lock:
            self.revoked, self.finished = True, finished
            for writer in self.writers:
                os.eventfd_write(writer.ended, 1)


class _Writer:
    """A connection, and the grant that its other end has shown to know."""

    def __init__(self, connection: socket.socket) -> None:
        self.stream = Stream(connection)
        self.form: Form = CLEAR
        self.grant: _OpenGrant | None = None
        self.ended = os.eventfd(0, os.EFD_CLOEXEC)
        """Readable once the grant has ended."""
        self._greet_by = monotonic() + _GREETING_SECONDS

    def next_header(self) -> Header | None:
        """None where the connection, or a finished grant, has ended. Raises OSError, Malformed and _Refusal."""
        if self.grant is None:
            patience = self.greeting_left()
        elif self.stream.wait(select.POLLIN, None, self.ended):  # for as long as the grant lives
            patience = _STALL_SECONDS
        elif self.grant.finished:
            return None
        else:
            raise _Refusal(Verdict.REVOKED)
        data = self.stream.read(HEADER_BYTES + self.form.extra, patience)
        return Header.unpack(self.form.unwrap(data)) if data else None

    def greeting_left(self) -> float:
        """Seconds."""
        return max(0.0, self._greet_by - monotonic())

    def join(self, grant: _OpenGrant) -> None:
        """Be told of the grant's end from now on. Raises _Refusal."""
        with grant.lock:
            grant.require_open()
            grant.writers.add(self)
        self.grant = grant

    def receive(self, grant: _OpenGrant, into: list[memoryview]) -> None:
        """A frame's payload. Raises _Refusal once the grant has ended."""
        for memory, settle in self.form.incoming(into):
            while memory.left:
                with grant.lock:
                    grant.require_open()
                    received = self.stream.receive_some(memory)
                if not received:
                    self.stream.wait(select.POLLIN, _STALL_SECONDS, self.ended)
            if settle is not None:
                with grant.lock:
                    grant.require_open()
                    settle()

    def answer(self, verdict: Verdict, seconds: float) -> None:
        self.stream.write(Buffers([memoryview(self.form.wrap(pack_reply(verdict)))]), seconds)

    def close(self) -> None:
        """Does not close the connection."""
        if self.grant is not None:
            with self.grant.lock:
                self.grant.writers.discard(self)
        os.close(self.ended)


class TcpReceiver:
    """Listens on `host` (which is also what peers connect to) and `port` (0: a free one); see `base.Receiver`.

    Blocks may come as they are, or through one of `codecs`; where there is a `key` (`keys.ClusterKey.transfers`), only
    sealed. Bytes go into the arena by calls that wait for no peer, each under its grant's lock after a look at whether
    it is still open. So once `revoke` has had that lock no late write is possible, whatever the writer does.
    """

    def __init__(
        self,
        arena: Arena,
        on_safe: OnSafe,
        host: str,
        port: int = 0,
        codecs: Mapping[str, Codec] = {},
        key: bytes | None = None,
    ) -> None:
        self.refusals: Counter[str] = Counter()
        self._arena = arena
        self._codecs = codecs
        self._key = key
        self._layout = layout_digest(arena.layout)
        self._lock = Lock()
        self._grants: dict[bytes, _OpenGrant] = {}
        try:
            listening = bound(host, port)
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
        if (grant := self._forget(ticket)) is not None:
            grant.end()
        return True

    def closed(self, ticket: TicketId) -> None:
        """Nothing to wait for: a write is over when `revoke` returns."""

    def finish(self, ticket: TicketId) -> None:
        if (grant := self._forget(ticket)) is not None:
            grant.end(finished=True)

    def _forget(self, ticket: TicketId) -> _OpenGrant | None:
        with self._lock:
            return self._grants.pop(ticket_key(ticket), None)

    def close(self) -> None:
        with self._lock:
            grants = list(self._grants.values())
            self._grants.clear()
        for grant in grants:
            grant.end()
        self._listener.close()

    def _serve(self, connection: socket.socket, admitted: Callable[[], None]) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that loses power says no goodbye: without this its connection would stay for good.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
        with closing(_Writer(connection)) as writer:
            try:
                while (header := writer.next_header()) is not None:
                    if writer.form is CLEAR and (header.kind is Kind.SEAL or self._key is not None):
                        self._seal(writer, header)
                    else:
                        self._take(writer, header, admitted)
            except (_Refusal, Malformed) as error:
                self._refuse(writer, error)

    def _refuse(self, writer: _Writer, error: _Refusal | Malformed) -> None:
        """The last word to this writer."""
        verdict = _verdict_on(error)
        with self._lock:
            self.refusals[verdict.words] += 1
        if verdict is Verdict.FORGED:
            said = "refused KV from %s that is not authentic; look for what changes or forges data between the hosts"
            log.warning(said, writer.stream.peer())
        writer.answer(verdict, DRAIN_SECONDS)
        writer.stream.drain()

    def _seal(self, writer: _Writer, header: Header) -> None:
        """Answer one who begins; nothing it says after that counts unless it has the ticket's secret and our key."""
        if self._key is None:
            raise _Refusal(Verdict.NO_KEY)
        if header.kind is not Kind.SEAL:
            raise _Refusal(Verdict.NOT_SEALED)
        grant = self._grant_of(header)
        salt = secrets.token_bytes(SALT_BYTES)
        writer.stream.write(Buffers([memoryview(pack_reply(Verdict.DONE) + salt)]), writer.greeting_left())
        writer.form = seals(self._key, grant.secret, header, salt)[1]

    def _take(self, writer: _Writer, header: Header, admitted: Callable[[], None]) -> None:
        """Do what a frame asks; everything before it on this connection lies in the arena."""
        grant = self._admit(header)
        if writer.grant is None:
            writer.join(grant)
            admitted()
        elif writer.grant is not grant:
            raise Malformed("a connection is for one ticket")
        if header.kind is Kind.WRITE:
            if header.codec == EXACT:
                writer.receive(grant, payload(self._arena, header.first, header.count))
            else:
                self._receive_coded(writer, grant, header)
            return
        with grant.lock:
            grant.require_open()
        writer.answer(Verdict.DONE, _STALL_SECONDS)

    def _grant_of(self, header: Header) -> _OpenGrant:
        with self._lock:
            grant = self._grants.get(header.key)
        if grant is None:
            raise _Refusal(Verdict.UNKNOWN_TICKET)
        return grant

    def _admit(self, header: Header) -> _OpenGrant:
        """The grant that a frame goes by. Raises _Refusal unless it covers all that the frame asks."""
        if header.kind is Kind.SEAL:
            raise _Refusal(Verdict.MALFORMED)
        grant = self._grant_of(header)
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

    def _receive_coded(self, writer: _Writer, grant: _OpenGrant, header: Header) -> None:
        codec, end = self._codecs[header.codec], header.first + header.count
        most = blocks_at_a_time(codec.layout)
        for first in range(header.first, end, most):
            records = np.empty((min(most, end - first), codec.record_bytes), np.uint8)
            writer.receive(grant, [records.reshape(-1).data])
            with grant.lock:
                grant.require_open()
                try:
                    codec.decode(records, self._arena.bytes[:, first : first + len(records)])
                except CannotDecode:
                    raise _Refusal(Verdict.MALFORMED_RECORDS) from None


def _verdict_on(error: Exception) -> Verdict:
    if isinstance(error, _Refusal):
        return error.verdict
    return Verdict.FORGED if isinstance(error, Forged) else Verdict.MALFORMED
