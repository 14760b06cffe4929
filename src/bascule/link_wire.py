"""What a router says of the links between workers, to workers and to who only asks; `wire` has all other messages."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from bascule.types import Count, Epoch, ModelCard, Seconds, Size, WorkerId

LINK_TRANSPORTS = ("shm", "tcp")
MOST_RUNS = 50
MOST_LINK_BYTES = 64 << 20
"""Of one push, which streams on both workers may have to wait for."""


class PeerAddress(Struct, frozen=True):
    """Where a worker listens for its peers' handoff messages, and which incarnation of it is meant."""

    worker: WorkerId
    epoch: Epoch
    address: str


class Neighbour(Struct, frozen=True):
    """Another worker, and all addresses at which its peers reach it."""

    worker: WorkerId
    addresses: tuple[str, ...]


class Neighbours(Struct, frozen=True, tag=True):
    """Other workers of the cluster that have come, all of them at first, and those that are gone."""

    come: tuple[Neighbour, ...] = ()
    gone: tuple[WorkerId, ...] = ()


class TryReach(Struct, frozen=True, tag=True):
    """Try whether you connect to the addresses of somebody who has not joined; answered by `Reached`."""

    question: Annotated[str, Meta(max_length=64)]
    """Names the answer."""
    addresses: tuple[str, ...]


class Reached(Struct, frozen=True, tag=True, kw_only=True):
    """How it came out."""

    worker: WorkerId
    epoch: Epoch
    question: str
    unreachable: Annotated[str, Meta(max_length=1000)] = ""
    """The first address that did not answer, and why."""


class MeasureLink(Struct, frozen=True, tag=True, kw_only=True):
    """Push blocks to another worker, which forgets them; answered by `LinkMeasured`."""

    probe: Annotated[str, Meta(max_length=64)]
    """Names the answer."""
    target: PeerAddress
    transport: str
    blocks: Size
    """Of one push, at most."""
    runs: Annotated[int, Meta(ge=1, le=MOST_RUNS)]


class LinkMeasured(Struct, frozen=True, tag=True, kw_only=True):
    """What the pushes took; without any where there is a reason."""

    worker: WorkerId
    epoch: Epoch
    probe: str
    blocks: Count = 0
    """Of one push."""
    reserve_s: tuple[Seconds, ...] = ()
    """From asking for the blocks until they were reserved."""
    block_s: tuple[Seconds, ...] = ()
    """Of pushing one block."""
    push_s: tuple[Seconds, ...] = ()
    """Of pushing them all, checksums taken."""
    reason: str = ""
    busy: bool = False
    """Why it was not measured will pass."""


class Probe(Struct, frozen=True, tag=True):
    """Asks how a worker would fare here, without being one; answered by `Probed`."""

    version: int
    addresses: tuple[str, ...] = ()
    """`host:port`, where the router is to try whether it can connect."""


class Probed(Struct, frozen=True, tag=True):
    """What a router finds of whoever sent a `Probe`."""

    version: int
    release: str
    clock: float
    """The time of day here, in seconds since 1970."""
    tokenizer: str
    """Digest of the vocabulary that this router uses; empty if it is not known."""
    unreachable: str = ""
    """The first address that did not answer, and why."""
    card: ModelCard | None = None
    """Of the cluster's own workers, which all that join must match; None before the first has joined (and from older
    releases)."""
    members: tuple[Neighbour, ...] = ()
    """All that are there; attached servers have no addresses."""
    attached_vocab: int | None = None
    """Entries of the vocabulary that attached servers are used with; None where there are none."""
    from_workers: dict[WorkerId, str] | None = None
    """Of the cluster's own workers that have tried: the first address that did not answer them, and why; empty where
    all did. None from older releases."""
