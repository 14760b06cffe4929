"""What the cluster has of one prompt's KV: on devices, in the store, and on a worker that others may fetch it from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.kv.prefix_index import Match, PrefixIndex
from bascule.policies.cost import Floats
from bascule.router.stores import Stores
from bascule.types import BlockHash, KVLayout, Tier

_LENT = (Tier.DEVICE, Tier.HOST)
"""Where a worker takes from what it lends."""
_LEAST_BLOCKS = 4
"""A peer that has less than this more than another is not asked."""
_TRIED = 3
"""Workers that may have most of a prompt; the first may only be expected to have it."""


class Peer(Struct, frozen=True):
    """A worker that lends. With row -1 there is none."""

    row: int = -1
    tokens: int = 0
    load_s: float = 0.0
    """What it has to load from its host's memory first."""


class Found(Struct, frozen=True):
    """By row of the columns, in tokens from the beginning of the prompt on."""

    cached: NDArray[np.int64]
    """What each worker has on its device, or will have shortly."""
    stored: NDArray[np.int64] | None = None
    """What each has or can load from the store; None where there is no store."""
    load_s: Floats | None = None
    """Seconds that loading the difference takes."""
    peer: Peer = Peer()


def find(
    index: PrefixIndex,
    stores: Stores,
    hashes: Sequence[BlockHash],
    layout: KVLayout,
    lends: NDArray[np.bool_],
) -> Found:
    """Look a prompt up, once for all rows; `lends` says which of these may be fetched from."""
    match, size = index.match(hashes), layout.block_size
    cached = np.zeros(len(lends), np.int64)
    known = match.device[: len(lends)]
    cached[: len(known)] = known
    cached *= size
    peer = _peer(index, stores, match, hashes, layout, lends)
    if not stores:
        return Found(cached, peer=peer)
    stored, load_s = stores.stored(match, size, layout.block_bytes // size, len(lends))
    return Found(cached, stored, load_s, peer)


def _peer(
    index: PrefixIndex,
    stores: Stores,
    match: Match,
    hashes: Sequence[BlockHash],
    layout: KVLayout,
    lends: NDArray[np.bool_],
) -> Peer:
    """The worker that has most, of equals the one that has most on its device."""
    if len(hashes) < _LEAST_BLOCKS:
        return Peer()
    device, near = match.device[: len(lends)], match.tiers[Tier.HOST][: len(lends)]
    lending = lends[: len(near)]
    if int(lending.sum()) == 0 or int(near.max(initial=0)) - int(device.min(initial=0)) < _LEAST_BLOCKS:
        return Peer()
    worth = np.where(lending, near * (len(hashes) + 1.0) + device, -1.0)
    best = Peer()
    for _ in range(_TRIED):
        row = int(worth.argmax())
        if worth[row] <= best.tokens / layout.block_size * (len(hashes) + 1.0):
            break
        blocks = index.has(row, hashes[: near[row]], _LENT)
        if blocks * layout.block_size > best.tokens:
            below = max(blocks - int(device[row]), 0) * layout.block_bytes
            best = Peer(row, blocks * layout.block_size, stores.seconds(row, Tier.HOST, below) if below else 0.0)
        worth[row] = -1.0
    return best
