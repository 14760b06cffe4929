"""Every message between processes: plain structs in MessagePack, decoded against their types; no pickle anywhere."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from bascule.errors import BasculeError
from bascule.types import (
    BlockHash,
    CostModel,
    Epoch,
    FinishReason,
    KVLayout,
    ModelCard,
    RequestId,
    Role,
    SamplingParams,
    Slo,
    StepLoad,
    TicketId,
    Tier,
    TokenLogprobs,
    WorkerId,
    WorkerLoad,
)

VERSION = 3
"""Of this protocol; a worker and a router of different versions refuse each other."""

MAX_MESSAGE = 64 << 20
"""Bytes; a longer message is dropped by the socket and its connection closed."""


class WireError(BasculeError):
    """Bytes that are no message of this protocol."""


class PeerAddress(Struct, frozen=True):
    """Where a worker listens for its peers' handoff messages, and which incarnation of it is meant."""

    worker: WorkerId
    epoch: Epoch
    address: str


# ---------------------------------------------------------------- worker -> router


class Starting(Struct, frozen=True, tag=True):
    """A worker that is not ready yet says what it is doing."""

    worker: WorkerId
    stage: str


class StorePlace(Struct, frozen=True):
    """A tier's place: equal ids mean that what one worker saves there, the other finds."""

    id: str
    blocks: int
    """Most blocks of this worker's layout that it holds; 0 where no bound is known."""


class Register(Struct, frozen=True, tag=True, kw_only=True):
    """A worker offers itself; answered by `Registered` or `Refused`."""

    version: int
    worker: WorkerId
    epoch: Epoch
    role: Role
    card: ModelCard
    device: str
    pid: int
    peer: PeerAddress
    max_sequences: int
    kv_blocks: int
    machine: str
    """Equal where workers share memory."""
    stores: dict[Tier, StorePlace] = {}
    """The tiers of the KV store that this worker has."""
    cost: CostModel


class Heartbeat(Struct, frozen=True, tag=True):
    worker: WorkerId
    epoch: Epoch
    load: WorkerLoad
    kv_sequence: int = 0
    """Of the last `KvEvents` sent before this, so that a lost one is noticed though none follows; 0 before the first.
    """


class TokenItem(Struct, frozen=True, array_like=True):
    """One token of one request. `position` counts output tokens from 0 over all attempts."""

    request: RequestId
    attempt: int
    position: int
    token: int
    cached_tokens: int
    finish: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


class StepTokens(Struct, frozen=True, tag=True):
    """All tokens of one step: one message, whatever the number of streams."""

    worker: WorkerId
    epoch: Epoch
    items: tuple[TokenItem, ...]
    load: StepLoad | None = None
    """What the worker has before it now."""


class Loaded(Struct, frozen=True, tag=True, kw_only=True):
    """KV of a request's prompt that was loaded from the store and not computed: all so far, told before its tokens."""

    worker: WorkerId
    epoch: Epoch
    request: RequestId
    attempt: int
    tokens: dict[Tier, int]
    """By the tier that they came from."""
    seconds: float
    """That the request waited for it before the engine had it."""


class Saved(Struct, frozen=True, tag=True):
    """What a request with `save_to` computed is in the store, or will not come there."""

    worker: WorkerId
    epoch: Epoch
    request: RequestId
    attempt: int


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """A worker gives a request up. `retryable` says whether another worker may succeed."""

    worker: WorkerId
    epoch: Epoch
    request: RequestId
    attempt: int
    message: str
    retryable: bool


class TierChanges(Struct, frozen=True, array_like=True):
    """Blocks that came into one tier and left it. Hashes lie one after another, 16 bytes each."""

    tier: str
    """A `Tier`; an unknown one must not make the whole message unreadable."""
    stored: bytes
    removed: bytes


class KvEvents(Struct, frozen=True, tag=True, kw_only=True):
    """What has changed in a worker's cache. A block that moves leaves one tier and comes into another at once."""

    worker: WorkerId
    epoch: Epoch
    sequence: int
    """One more than that of the message before; a gap means that the router has to ask for everything."""
    anew: bool
    """Nothing told before counts any more: this message, and those that follow, say what is there."""
    changes: tuple[TierChanges, ...]


class Goodbye(Struct, frozen=True, tag=True):
    """A worker leaves on purpose; nothing of its epoch comes after this."""

    worker: WorkerId
    epoch: Epoch


WorkerMessage = Starting | Register | Heartbeat | StepTokens | Loaded | Saved | Failed | KvEvents | Goodbye


# ---------------------------------------------------------------- router -> worker


class Registered(Struct, frozen=True, tag=True):
    epoch: Epoch
    heartbeat_s: float


class Reregister(Struct, frozen=True, tag=True):
    """The router does not know this worker (it has been restarted): register again.

    What the worker still runs is nobody's; the router cancels it when its tokens arrive.
    """


class RegistrationRefusal(Struct, frozen=True, tag=True):
    """The router does not take this worker, or has declared its epoch dead; the worker stops."""

    reason: str


class Submit(Struct, frozen=True, tag=True, kw_only=True):
    """Run this request; with `decode`, prefill it and hand it to that worker."""

    request: RequestId
    attempt: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    """Output tokens that the client has already: teacher-forced, never drawn again."""
    sampling: SamplingParams
    decode: PeerAddress | None = None
    slo: Slo | None = None
    """What this request asks for itself; None for what the worker was started with."""
    stored_tokens: int = 0
    """Leading tokens that the worker is expected to have once it has loaded what the store holds; 0 if none of them
    are to be loaded."""
    save_to: Tier | None = None
    """Answer `Saved` once the prompt's KV is in that tier of the store."""


class Cancel(Struct, frozen=True, tag=True):
    """Stop this attempt wherever it is; unknown ones are ignored."""

    request: RequestId
    attempt: int


class Resync(Struct, frozen=True, tag=True):
    """The router has lost track of this worker's cache: tell anew what is there."""


class Stop(Struct, frozen=True, tag=True):
    """Leave at once: say goodbye and end the process."""


RouterMessage = Registered | Reregister | RegistrationRefusal | Submit | Cancel | Resync | Stop


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
    attempt: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    """Output tokens known before this attempt (the first token of this one comes with `Commit`)."""
    sampling: SamplingParams
    fingerprint: str
    layout: KVLayout
    slo: Slo | None = None


class Reserved(Struct, frozen=True, tag=True, kw_only=True):
    """Blocks are leased. `blocks` is the whole table; its first `have_blocks` are held already and not to be sent."""

    ticket: TicketId
    epoch: Epoch
    blocks: tuple[int, ...]
    have_blocks: int
    endpoints: tuple[TransferEndpoint, ...]


class Manifest(Struct, frozen=True, kw_only=True):
    """What the decode side checks before it trusts the blocks."""

    fingerprint: str
    layout: KVLayout
    source_epoch: Epoch
    target_epoch: Epoch
    attempt: int
    tokens: int
    """Positions whose KV the blocks hold."""
    have_blocks: int
    hashes: tuple[BlockHash, ...]
    """Chained hashes of all full blocks, from position 0 on."""
    checksums: tuple[bytes, ...]
    """Of each block that was sent, in order, taken when it was computed."""


class Written(Struct, frozen=True, tag=True):
    """The first `blocks` blocks of the reservation's table lie in the decode side's arena, those it had included.

    It may check them from now on. Only saves time: a commit says the same of all blocks.
    """

    ticket: TicketId
    blocks: int


class Commit(Struct, frozen=True, tag=True):
    """All blocks are sent. Idempotent: repeated until a verdict comes."""

    ticket: TicketId
    first_token: int
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
    """The decode side takes the right to write back; the prefill side stops writing and answers `Abort`."""

    ticket: TicketId


class Renew(Struct, frozen=True, tag=True):
    """The prefill side still works on these tickets; their leases and promises live on."""

    tickets: tuple[TicketId, ...]


PeerMessage = Prepare | Reserved | Written | Commit | Accepted | HandoffRefused | Abort | Revoked | Renew

Message = WorkerMessage | RouterMessage | PeerMessage

_encoder = msgspec.msgpack.Encoder()
_from_worker = msgspec.msgpack.Decoder(WorkerMessage)
_from_router = msgspec.msgpack.Decoder(RouterMessage)
_from_peer = msgspec.msgpack.Decoder(PeerMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def from_worker(data: bytes) -> WorkerMessage:
    """Decode what a router receives; raises WireError."""
    message: WorkerMessage = _decode(_from_worker, data)
    return message


def from_router(data: bytes) -> RouterMessage:
    """Decode what a worker receives from its router; raises WireError."""
    message: RouterMessage = _decode(_from_router, data)
    return message


def from_peer(data: bytes) -> PeerMessage:
    """Decode what a worker receives from another worker; raises WireError."""
    message: PeerMessage = _decode(_from_peer, data)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise WireError(f"not a message of this protocol: {error}") from error
