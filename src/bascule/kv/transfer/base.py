"""What every transport promises: a sender writes into a peer's arena, only where and as long as the peer grants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from bascule.errors import BasculeError
from bascule.kv.codecs.base import Codec
from bascule.types import TicketId

SECRET_BYTES = 16

OnSafe = Callable[[TicketId], None]
"""Told, from any thread, that a ticket whose `revoke` was False can have no late write any more."""


class TransferError(BasculeError):
    """KV that could not be moved; what was pushed may or may not have arrived."""


class Endpoint(Struct, frozen=True):
    """Where a receiver listens. `machine` names its host (see `machine_id`): shared memory works on one host only."""

    transport: str
    address: str
    machine: str


class Grant(Struct, frozen=True):
    """The right of whoever knows `secret` (16 bytes) to write the destination blocks `blocks` for `ticket`."""

    ticket: TicketId
    secret: bytes
    blocks: tuple[int, ...]


class Move(Struct, frozen=True):
    """One block: from `source` in the sender's arena to `target` in the receiver's."""

    source: int
    target: int


class Span(Struct, frozen=True):
    """`count` blocks that are adjacent on both sides."""

    source: int
    target: int
    count: int


class Pushed(Struct, frozen=True):
    """What became of a push."""

    wire_bytes: int
    """Bytes that were moved: fewer than those of the blocks where some were coded."""
    idle_s: float = 0.0
    """Seconds of coding in which the link had nothing to send."""
    coded: dict[int, bytes] = {}
    """Checksums of the blocks that arrive otherwise than they were, by their places in the moves: of what has to lie in
    the receiver's arena."""


def spans(moves: Sequence[Move]) -> list[Span]:
    """Join moves that follow each other on both sides, so that they can be moved as one."""
    joined: list[Span] = []
    first = 0
    for index in range(1, len(moves) + 1):
        if (
            index == len(moves)
            or moves[index].source != moves[index - 1].source + 1
            or moves[index].target != moves[index - 1].target + 1
        ):
            joined.append(Span(moves[first].source, moves[first].target, index - first))
            first = index
    return joined


def machine_id() -> str:
    """The same for all processes of one running kernel, different for any other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def check_grant(grant: Grant, num_blocks: int) -> None:
    """Raises ValueError for a grant that makes no sense in an arena of `num_blocks` blocks."""
    if len(grant.secret) != SECRET_BYTES:
        raise ValueError(f"a grant's secret has {SECRET_BYTES} bytes, not {len(grant.secret)}")
    if any(not 0 <= block < num_blocks for block in grant.blocks):
        raise ValueError(f"ticket {grant.ticket} grants blocks outside the arena's {num_blocks}: {grant.blocks}")


class Receiver(Protocol):
    """The destination's side of one transport. Its methods may be called from any thread and return at once.

    `on_safe` and the arena are given to the constructor. The books' side of a revocation: quarantine the lease, then
    `revoke`; lift it if the answer is True, else on `on_safe` or the writer's own word that it has closed.
    """

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def refusals(self) -> dict[str, int]:
        """How many writers were refused since the start, by reason."""
        ...

    def open(self, grant: Grant) -> None:
        """Admit writes under `grant`. Raises ValueError if its ticket is open or a block is not in the arena."""
        ...

    def revoke(self, ticket: TicketId) -> bool:
        """Refuse the ticket's writes from now on. True: no late write is possible.

        False: a writer may still hold the memory; the blocks must stay out of use until `on_safe(ticket)` is called
        or the writer answers that it has closed (then tell `closed`). True for a ticket that is not open.
        """
        ...

    def closed(self, ticket: TicketId) -> None:
        """The writer has said by other means that it will not write for `ticket` any more: wait for it no longer."""
        ...

    def finish(self, ticket: TicketId) -> None:
        """The normal end, after a verified commit: forget the grant. Idempotent."""
        ...

    def close(self) -> None:
        """Refuse everything and let go of sockets and threads. Idempotent."""
        ...


class Session(Protocol):
    """A sender's writes for one ticket. One thread pushes; any thread may close."""

    transport: str

    def push(self, moves: Sequence[Move], codec: Codec | None = None) -> Pushed:
        """Write blocks, blocking; adjacent ones go as one.

        With a lossy `codec`, for full blocks only, they cross the link smaller, but for what it has no code for; where
        memory is shared they always go as they are.

        Raises TransferError if the receiver refuses, is gone or makes no progress, or if the session is closed.
        """
        ...

    def flush(self) -> None:
        """Return when everything pushed lies in the peer's arena; raises TransferError if that is not certain."""
        ...

    def close(self) -> None:
        """When it returns, this session never writes again; a `push` under way in another thread fails. Idempotent."""
        ...


class Sender(Protocol):
    """The source's side of one transport; its arena is given to the constructor."""

    transport: str

    def open(self, endpoint: Endpoint, ticket: TicketId, secret: bytes) -> Session:
        """Announce the ticket. Raises TransferError, saying what to do, if the receiver is out of reach or refuses."""
        ...

    def close(self) -> None:
        """Close all sessions and connections. Idempotent."""
        ...
