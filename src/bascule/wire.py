"""Messages between router and workers, and how all messages look: MessagePack, decoded against its types, no pickle.

Those between workers are in `peer_wire`.
"""

from __future__ import annotations

import contextlib
import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from bascule.errors import UNREADABLE, BasculeError
from bascule.link_wire import LinkMeasured, MeasureLink, Reached, TryReach
from bascule.link_wire import Neighbour as Neighbour
from bascule.link_wire import Neighbours as Neighbours
from bascule.link_wire import PeerAddress as PeerAddress
from bascule.link_wire import Probe as Probe
from bascule.link_wire import Probed as Probed
from bascule.types import (
    Brought,
    CostModel,
    Count,
    Epoch,
    FinishReason,
    ModelCard,
    RequestId,
    Role,
    Salt,
    SamplingParams,
    Size,
    Slo,
    StepLoad,
    Tier,
    Token,
    TokenLogprobs,
    WorkerId,
    WorkerLoad,
    check_salt,
)

VERSION = 9
"""Of this protocol; a worker and a router of different versions refuse each other."""

MAX_MESSAGE = 64 << 20
"""Bytes; a longer message is dropped by the socket and its connection closed."""

Name = Annotated[WorkerId, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
"""What a worker may call itself: its id stands in headers, metrics and command lines."""
Stage = Annotated[str, Meta(max_length=1000)]
Attempt = Annotated[int, Meta(ge=0, le=2**31)]


class WireError(BasculeError):
    """Bytes that are no message of this protocol."""


class OtherVersion(WireError):
    """A worker of another version of this protocol, whatever else it says."""


# ---------------------------------------------------------------- worker -> router


class Starting(Struct, frozen=True, tag=True):
    """A worker that is not ready yet says what it is doing."""

    worker: Name
    stage: Stage


class StorePlace(Struct, frozen=True):
    """A tier's place: equal ids mean that what one worker saves there, the other finds."""

    id: str
    blocks: Count
    """Most blocks of this worker's layout that it holds; 0 where no bound is known."""


class Register(Struct, frozen=True, tag=True, kw_only=True):
    """A worker offers itself; answered by `Registered` or `Refused`."""

    version: int
    worker: Name
    epoch: Epoch
    role: Role
    card: ModelCard
    device: str
    pid: Count
    peer: PeerAddress
    max_sequences: Size
    kv_blocks: Size
    machine: str
    """Equal where workers share memory."""
    stores: dict[Tier, StorePlace] = {}
    """The tiers of the KV store that this worker has."""
    lends: bool = False
    """Peers may fetch what it has computed."""
    keeps_apart: bool = True
    """What it has cached for requests with a `cache_salt`, no others find."""
    chunk_tokens: Size = 512
    """Most prompt tokens that it computes in a step."""
    cost: CostModel
    release: str = ""
    """Of the package."""
    kv_addresses: tuple[str, ...] = ()
    """Where it takes KV over TCP, `host:port`."""


class Heartbeat(Struct, frozen=True, tag=True):
    worker: WorkerId
    epoch: Epoch
    load: WorkerLoad
    kv_sequence: int = 0
    """Of the last `KvEvents` sent before this, so that a lost one is noticed though none follows; 0 before the first.
    """
    runs: tuple[tuple[RequestId, int], ...] | None = None
    """Requests and attempts that the worker has, so that what was lost on the way to it, or of what it said last of
    them, is noticed too; None where that is not known."""
    clock: float = 0.0
    """The time of day there when it was sent, in seconds since 1970; 0 if it is not told."""
    kv_digest: bytes = b""
    """Of the device's blocks that these have told of, as `BlockDigest` has it; empty where none have."""


class TokenItem(Struct, frozen=True, array_like=True):
    """One token of one request. `position` counts output tokens from 0 over all attempts."""

    request: RequestId
    attempt: Attempt
    position: Count
    token: Token
    cached_tokens: Count
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
    """KV of a request's prompt that came from a peer or the store and was not computed: all so far, told before its
    tokens."""

    worker: WorkerId
    epoch: Epoch
    request: RequestId
    attempt: Attempt
    brought: Brought


class Saved(Struct, frozen=True, tag=True):
    """What a request with `save_to` computed is in the store, or will not come there."""

    worker: WorkerId
    epoch: Epoch
    request: RequestId
    attempt: Attempt
    bytes: dict[str, Count] = {}
    """Of its KV that this worker has written there, by tier, as they are stored."""
    missing: Count = 0
    """Blocks of its KV from the first on that the tier has not taken, as far as is known."""


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """A worker gives a request up. `retryable` says whether another worker may succeed."""

    worker: WorkerId
    epoch: Epoch
    request: RequestId
    attempt: Attempt
    message: str
    retryable: bool
    failing: WorkerId | None = None
    """Another worker, where it was that one which failed."""
    unfit: str = ""
    """The parameter of the request for which this worker could never take it; nothing is wrong with the worker then."""


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


class Leaving(Struct, frozen=True, tag=True):
    """A worker would like to end: it is to get nothing new, and `Stop` once nothing needs it. Repeated until then."""

    worker: WorkerId
    epoch: Epoch


class Goodbye(Struct, frozen=True, tag=True):
    """A worker leaves on purpose; nothing of its epoch comes after this."""

    worker: WorkerId
    epoch: Epoch


WorkerMessage = (
    Starting
    | Register
    | Heartbeat
    | StepTokens
    | Loaded
    | Saved
    | Failed
    | KvEvents
    | LinkMeasured
    | Reached
    | Leaving
    | Goodbye
    | Probe
)


# ---------------------------------------------------------------- router -> worker


class Registered(Struct, frozen=True, tag=True):
    epoch: Epoch
    heartbeat_s: Annotated[float, Meta(gt=0, le=1e6)]


class Reregister(Struct, frozen=True, tag=True):
    """The router does not know this worker (it has been restarted): register again.

    What the worker still runs is nobody's; the router cancels it when its tokens arrive.
    """


class RegistrationRefusal(Struct, frozen=True, tag=True):
    """The router does not take this worker, or has declared its epoch dead; the worker stops."""

    reason: str


class FetchFrom(Struct, frozen=True):
    """A peer that has the KV of a prompt's first `tokens` tokens."""

    peer: PeerAddress
    tokens: Count


class Submit(Struct, frozen=True, tag=True, kw_only=True):
    """Run this request; with `decode`, prefill it and hand it to that worker."""

    request: RequestId
    attempt: Attempt
    prompt: tuple[Token, ...]
    generated: tuple[Token, ...]
    """Output tokens that the client has already: teacher-forced, never drawn again."""
    sampling: SamplingParams
    decode: PeerAddress | None = None
    slo: Slo | None = None
    """What this request asks for itself; None for what the worker was started with."""
    stored_tokens: Count = 0
    """Leading tokens that the worker is expected to have once it has loaded what the store holds; 0 if none of them
    are to be loaded."""
    fetch: FetchFrom | None = None
    """Where to fetch the prompt's KV from before computing the rest."""
    timeout_s: float = math.inf
    """Seconds that the request has left."""
    save_to: Tier | None = None
    """Answer `Saved` once the prompt's KV is in that tier of the store."""
    salt: Salt = b""
    """Its KV is for requests of the same salt only, wherever it comes to lie."""
    priority: int = 0
    """Lower goes first."""

    def __post_init__(self) -> None:
        check_salt(self.salt)


class Cancel(Struct, frozen=True, tag=True):
    """Stop this attempt wherever it is; unknown ones are ignored."""

    request: RequestId
    attempt: Attempt


class Resync(Struct, frozen=True, tag=True):
    """The router has lost track of this worker's cache: tell anew what is there."""


class Draining(Struct, frozen=True, tag=True):
    """Answers `Leaving`: nothing new comes, and so many requests still need the worker."""

    requests: Count


class Stop(Struct, frozen=True, tag=True):
    """Leave at once: say goodbye and end the process."""


RouterMessage = (
    Registered
    | Neighbours
    | Probed
    | Reregister
    | RegistrationRefusal
    | Submit
    | Cancel
    | Resync
    | MeasureLink
    | TryReach
    | Draining
    | Stop
)


class _AnyRegister(Struct, frozen=True, tag="Register"):
    """What registrations of all versions of this protocol have."""

    version: int
    worker: WorkerId


_encoder = msgspec.msgpack.Encoder()
_from_worker = msgspec.msgpack.Decoder(WorkerMessage)
_from_router = msgspec.msgpack.Decoder(RouterMessage)
_from_any = msgspec.msgpack.Decoder(_AnyRegister)


def encode(message: Struct) -> bytes:
    return _encoder.encode(message)


def from_worker(data: bytes) -> WorkerMessage:
    """Decode what a router receives; raises WireError, OtherVersion for the registration of another release."""
    try:
        message: WorkerMessage = decode(_from_worker, data)
    except WireError:
        with contextlib.suppress(*UNREADABLE):
            if (other := _from_any.decode(data)).version != VERSION:
                raise OtherVersion(version_mismatch(other.worker, other.version)) from None
        raise
    return message


def version_mismatch(worker: str, version: int) -> str:
    """What is said of a worker that speaks another version of this protocol."""
    return (
        f"worker {worker} speaks protocol version {version}, this router {VERSION}; run the same release of bascule on "
        "both"
    )


def from_router(data: bytes) -> RouterMessage:
    """Decode what a worker receives from its router; raises WireError."""
    message: RouterMessage = decode(_from_router, data)
    return message


def decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    """Decode against the decoder's type; raises WireError."""
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        raise WireError(f"not a message of this protocol: {error}") from error
