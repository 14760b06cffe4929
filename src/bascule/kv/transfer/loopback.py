"""A transport within one process: the in-memory twin of the real ones, with the same promises."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Sequence
from itertools import count
from threading import Lock

import numpy as np

from bascule.kv.arena import Arena
from bascule.kv.transfer.base import Endpoint, Grant, Move, OnSafe, TransferError, check_grant, machine_id, spans
from bascule.types import TicketId

NAME = "loopback"


class LoopbackNetwork:
    """What the receivers and senders of one process have in common: the receivers by address."""

    def __init__(self) -> None:
        self.receivers: dict[str, LoopbackReceiver] = {}
        self.addresses = count()


class LoopbackReceiver:
    """Takes blocks from senders on the same network; see `base.Receiver`."""

    def __init__(self, arena: Arena, on_safe: OnSafe, network: LoopbackNetwork) -> None:
        self.refusals: Counter[str] = Counter()
        self._arena = arena
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

    def write(self, ticket: TicketId, secret: bytes, arena: Arena, moves: Sequence[Move]) -> None:
        """Copy `moves` from a sender's arena; with none, only check the grant. Raises TransferError if refused."""
        with self._lock:
            grant = self._grants.get(ticket)
            if grant is None:
                reason = "unknown or revoked ticket"
            elif not hmac.compare_digest(grant.secret, secret):
                reason = "wrong secret"
            elif arena.layout != self._arena.layout:
                reason = "other layout"
            elif not {move.target for move in moves} <= set(grant.blocks):
                reason = "outside the grant"
            else:
                for span in spans(moves):
                    np.copyto(
                        self._arena.bytes[:, span.target : span.target + span.count],
                        arena.bytes[:, span.source : span.source + span.count],
                    )
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
        self._write(())

    def push(self, moves: Sequence[Move]) -> int:
        for move in moves:
            self._write([move])
        return len(moves) * self._arena.layout.block_bytes

    def flush(self) -> None:
        self._write(())

    def _write(self, moves: Sequence[Move]) -> None:
        with self._lock:
            receiver = self._network.receivers.get(self._address)
            if receiver is None:
                raise TransferError(f"no receiver at loopback address {self._address}: it was closed, choose another")
            if self._closed:
                raise TransferError(f"the session for ticket {self._ticket} is closed")
            receiver.write(self._ticket, self._secret, self._arena, moves)

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
