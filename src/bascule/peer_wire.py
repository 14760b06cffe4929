"""Messages between workers: handoffs from a prefill to a decode worker, and what one fetches from another."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from bascule.types import (
    BlockHash,
    Count,
    Epoch,
    KVLayout,
    RequestId,
    Salt,
    SamplingParams,
    Slo,
    TicketId,
    Token,
    WorkerId,
    check_salt,
)
from bascule.wire import Attempt, PeerAddress, decode

BlockNumber = Annotated[int, Meta(ge=0, le=2**32 - 1)]
"""A block's place in an arena, as transfers write it."""

# ---------------------------------------------------------------- prefill worker <-> decode worker


class TransferEndpoint(Struct, frozen=True):
    """One way to reach a worker's arena: `shm` or `tcp`; `machine` names the host that shm works on."""

    transport: str
    address: str
    machine: str


class Prepare(Struct, frozen=True, tag=True, kw_only=True):
    """Opens a handoff: asks for blocks for a request whose KV the sender is computing."""

    ticket: TicketId
    secret: bytes
    source: PeerAddress
    request: RequestId
    attempt: Attempt
    prompt: tuple[Token, ...]
    generated: tuple[Token, ...]
    """Output tokens known before this attempt (the first token of this one comes with `Commit`)."""
    sampling: SamplingParams
    fingerprint: str
    layout: KVLayout
    slo: Slo | None = None
    timeout_s: float = math.inf
    """Seconds that the request has left."""
    salt: Salt = b""
    """Both sides hash the tokens with it."""
    priority: int = 0
    """As in `Submit`."""

    def __post_init__(self) -> None:
        check_salt(self.salt)


class Reserved(Struct, frozen=True, tag=True, kw_only=True):
    """Blocks are leased. `blocks` is the whole table; its first `have_blocks` are held already and not to be sent."""

    ticket: TicketId
    epoch: Epoch
    blocks: tuple[BlockNumber, ...]
    have_blocks: Count
    endpoints: tuple[TransferEndpoint, ...]


class Manifest(Struct, frozen=True, kw_only=True):
    """What the decode side checks before it trusts the blocks."""

    fingerprint: str
    layout: KVLayout
    source_epoch: Epoch
    target_epoch: Epoch
    attempt: Attempt
    tokens: Count
    """Positions whose KV the blocks hold."""
    have_blocks: Count
    hashes: tuple[BlockHash, ...]
    """Chained hashes of all full blocks, from position 0 on."""
    checksums: tuple[bytes, ...]
    """Of each block that was sent, in order, taken when it was computed."""


class Written(Struct, frozen=True, tag=True):
    """The first `blocks` blocks of the reservation's table lie in the decode side's arena, those it had included.

    It may check them from now on. Only saves time: a commit says the same of all blocks.
    """

    ticket: TicketId
    blocks: Count


class Commit(Struct, frozen=True, tag=True):
    """All blocks are sent. Idempotent: repeated until a verdict comes."""

    ticket: TicketId
    first_token: Token
    manifest: Manifest


class Accepted(Struct, frozen=True, tag=True):
    """The decode side checked the blocks and goes on from here."""

    ticket: TicketId


class HandoffRefused(Struct, frozen=True, tag=True):
    """The decode side will not use this ticket. `kind` is one word for counting, `reason` a sentence."""

    ticket: TicketId
    kind: str
    reason: str


class Abort(Struct, frozen=True, tag=True):
    """The prefill side gives the ticket up and has stopped writing for it. Idempotent."""

    ticket: TicketId


class Revoked(Struct, frozen=True, tag=True):
    """The right to write is taken back: whoever has the ticket stops writing and answers `Abort` (or `Fetched`)."""

    ticket: TicketId


class Renew(Struct, frozen=True, tag=True):
    """The prefill side still works on these tickets; their leases and promises live on."""

    tickets: tuple[TicketId, ...]


# ---------------------------------------------------------------- one worker <-> another


class Fetch(Struct, frozen=True, tag=True, kw_only=True):
    """Asks a peer for KV that it has computed. Answered by `Fetched`; taken back by `Revoked`."""

    ticket: TicketId
    secret: bytes
    worker: WorkerId
    """Who asks."""
    fingerprint: str
    layout: KVLayout
    tokens: tuple[Token, ...]
    """Of full blocks, from the beginning of the prompt on."""
    have_blocks: Count
    """The first of them that are not wanted."""
    blocks: tuple[BlockNumber, ...]
    """Where the others are to be written, in order."""
    endpoints: tuple[TransferEndpoint, ...]
    salt: Salt = b""
    """Both sides hash the tokens with it."""

    def __post_init__(self) -> None:
        check_salt(self.salt)


class Fetched(Struct, frozen=True, tag=True):
    """The peer writes no more for this ticket: the first blocks wanted are there, as many as it has checksums of."""

    ticket: TicketId
    checksums: tuple[bytes, ...] = ()
    reason: str = ""
    """Why there are none."""


PeerMessage = (
    Prepare | Reserved | Written | Commit | Accepted | HandoffRefused | Abort | Revoked | Renew | Fetch | Fetched
)

_from_peer = msgspec.msgpack.Decoder(PeerMessage)


def from_peer(data: bytes) -> PeerMessage:
    """Decode what a worker receives from another worker; raises WireError."""
    message: PeerMessage = decode(_from_peer, data)
    return message
