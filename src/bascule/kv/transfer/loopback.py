"""A transport within one process: the in-memory twin of the real ones, with the same promises."""

from __future__ import annotations

import contextlib
import hmac
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from threading import Lock

from bascule.kv.arena import Arena
from bascule.kv.codecs.base import EXACT, Bytes, CannotEncode, Codec
from bascule.kv.transfer.base import Endpoint, Grant, Move, OnSafe, Pushed, TransferError, check_grant, machine_id
from bascule.kv.transfer.coding import arriving, arriving_checksums
from bascule.types import KVLayout, TicketId

NAME = "loopback"


class LoopbackNetwork:
    """What the receivers and senders of one process have in common: the receivers by address."""

    def __init__(self) -> None:
        self.receivers: dict[str, LoopbackReceiver] = {}
        self.addresses = count()


class LoopbackReceiver:
    """Takes blocks from senders on the same network; see `base.Receiver`."""

    def __init__(
        self, arena: Arena, on_safe: OnSafe, network: LoopbackNetwork, codecs: Mapping[str, Codec] = {}
    ) -> None:
        self.refusals: Counter[str] = Counter()
        self._arena = arena
        self._codecs = codecs
        self._network = network
        self._address = str(next(network.addresses))
        self._lock = Lock()
        self._grants: dict[TicketId, Grant] = {}
        network.receivers[self._address] = self

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(NAME, self._address, machine_id())

    def open(self, grant: Grant) -> None:
        check_grant(grant, self._arena.num_blocks)
        with self._lock:
            if grant.ticket in self._grants:
                raise ValueError(f"ticket {grant.ticket} is open already")
            self._grants[grant.ticket] = grant

    def revoke(self, ticket: TicketId) -> bool:
        with self._lock:
            self._grants.pop(ticket, None)
        return True

    def closed(self, ticket: TicketId) -> None:
        """Nothing to wait for: a write is over when `revoke` returns."""

    def finish(self, ticket: TicketId) -> None:
        self.revoke(ticket)

    def close(self) -> None:
        self._network.receivers.pop(self._address, None)
        with self._lock:
            self._grants.clear()

    def write(
        self, ticket: TicketId, secret: bytes, layout: KVLayout, blocks: Mapping[int, Bytes] = {}, codec: str = EXACT
    ) -> None:
        """Put `blocks`, [planes, plane_block_bytes] by target, which have been through `codec`, into the arena.

        Without any, only the grant is checked. Raises TransferError if it is refused.
        """
        with self._lock:
            grant = self._grants.get(ticket)
            if grant is None:
                reason = "unknown or revoked ticket"
            elif not hmac.compare_digest(grant.secret, secret):
                reason = "wrong secret"
            elif layout != self._arena.layout:
                reason = "other layout"
            elif not blocks.keys() <= set(grant.blocks):
                reason = "outside the grant"
            elif codec != EXACT and codec not in self._codecs:
                reason = "codec not allowed"
            else:
                for target, block in blocks.items():
                    self._arena.bytes[:, target] = block
                return
            self.refusals[reason] += 1
        raise TransferError(f"the receiver refused ticket {ticket}: {reason}; prepare the handoff again")


class LoopbackSession:
    """Writes of one ticket; see `base.Session`."""

    transport = NAME

    def __init__(self, network: LoopbackNetwork, address: str, arena: Arena, ticket: TicketId, secret: bytes) -> None:
        self._network = network
        self._address = address
        self._arena = arena
        self._ticket = ticket
        self._secret = secret
        self._lock = Lock()
        self._closed = False
        self._write({})

    def push(self, moves: Sequence[Move], codec: Codec | None = None) -> Pushed:
        wire_bytes, block_bytes = 0, self._arena.layout.block_bytes
        coded: dict[int, bytes] = {}
        for place, move in enumerate(moves):
            block, form, size = self._arena.bytes[:, move.source : move.source + 1], EXACT, block_bytes
            if codec is not None:
                with contextlib.suppress(CannotEncode):
                    block = arriving(codec, codec.encode(block))
                    form, size = codec.name, codec.record_bytes
                    [coded[place]] = arriving_checksums(block)
            self._write({move.target: block[:, 0]}, form)
            wire_bytes += size
        return Pushed(wire_bytes, 0.0, coded)

    def flush(self) -> None:
        self._write({})

    def _write(self, blocks: Mapping[int, Bytes], codec: str = EXACT) -> None:
        with self._lock:
            receiver = self._network.receivers.get(self._address)
            if receiver is None:
                raise TransferError(f"no receiver at loopback address {self._address}: it was closed, choose another")
            if self._closed:
                raise TransferError(f"the session for ticket {self._ticket} is closed")
            receiver.write(self._ticket, self._secret, self._arena.layout, blocks, codec)

    def close(self) -> None:
        with self._lock:
            self._closed = True


class LoopbackSender:
    """Opens sessions to receivers on the same network; see `base.Sender`."""

    transport = NAME

    def __init__(self, arena: Arena, network: LoopbackNetwork) -> None:
        self._arena = arena
        self._network = network
        self._sessions: list[LoopbackSession] = []

    def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> LoopbackSession:
        session = LoopbackSession(self._network, endpoint.address, self._arena, ticket, secret)
        self._sessions.append(session)
        return session

    def close(self) -> None:
        for session in self._sessions:
            session.close()
