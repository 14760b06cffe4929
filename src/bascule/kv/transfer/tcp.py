"""KV that comes over TCP: received straight into the arena, never past a revocation; the other end is `tcp_sender.py`.

Full blocks may be coded on the way, by pieces: the sender encodes one while the kernel sends the one before, and the
receiver decodes each from memory of its own into the arena. Where the cluster has a key all is sealed, behind that.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import select
import socket
from collections import Counter
from collections.abc import Mapping
from threading import Lock

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

    def require_open(self) -> None:
        """With the lock: raises _Refusal where it is revoked."""
        if self.revoked:
            raise _Refusal(Verdict.REVOKED)


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
        stream, form = Stream(connection), CLEAR
        try:
            patience: float | None = _GREETING_SECONDS
            while data := stream.read(HEADER_BYTES + form.extra, patience):
                header = Header.unpack(form.unwrap(data))
                if form is CLEAR and (header.kind is Kind.SEAL or self._key is not None):
                    form = self._seal(stream, header)
                else:
                    self._take(stream, form, header)
                    patience = None
        except (_Refusal, Malformed) as error:
            verdict = _verdict_on(error)
            with self._lock:
                self.refusals[verdict.words] += 1
            if verdict is Verdict.FORGED:
                said = (
                    "refused KV from %s that is not authentic; look for what changes or forges data between the hosts"
                )
                log.warning(said, stream.peer())
            stream.write(Buffers([memoryview(form.wrap(pack_reply(verdict)))]), DRAIN_SECONDS)
            stream.drain()

    def _seal(self, stream: Stream, header: Header) -> Form:
        """Answer one who begins; nothing it says after that counts unless it has the ticket's secret and our key."""
        if self._key is None:
            raise _Refusal(Verdict.NO_KEY)
        if header.kind is not Kind.SEAL:
            raise _Refusal(Verdict.NOT_SEALED)
        grant = self._grant_of(header)
        salt = secrets.token_bytes(SALT_BYTES)
        stream.write(Buffers([memoryview(pack_reply(Verdict.DONE) + salt)]), _GREETING_SECONDS)
        return seals(self._key, grant.secret, header, salt)[1]

    def _take(self, stream: Stream, form: Form, header: Header) -> None:
        """Do what a frame asks; everything before it on this connection lies in the arena."""
        grant = self._admit(header)
        if header.kind is Kind.WRITE:
            if header.codec == EXACT:
                self._receive(stream, form, grant, payload(self._arena, header.first, header.count))
            else:
                self._receive_coded(stream, form, grant, header)
            return
        with grant.lock:
            grant.require_open()
        stream.write(Buffers([memoryview(form.wrap(pack_reply(Verdict.DONE)))]), _GREETING_SECONDS)

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

    def _receive(self, stream: Stream, form: Form, grant: _OpenGrant, into: list[memoryview]) -> None:
        for memory, settle in form.incoming(into):
            while memory.left:
                with grant.lock:
                    grant.require_open()
                    received = stream.receive_some(memory)
                if not received:
                    stream.wait(select.POLLIN, None)
            if settle is not None:
                with grant.lock:
                    grant.require_open()
                    settle()

    def _receive_coded(self, stream: Stream, form: Form, grant: _OpenGrant, header: Header) -> None:
        codec, end = self._codecs[header.codec], header.first + header.count
        most = blocks_at_a_time(codec.layout)
        for first in range(header.first, end, most):
            records = np.empty((min(most, end - first), codec.record_bytes), np.uint8)
            self._receive(stream, form, grant, [records.reshape(-1).data])
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
