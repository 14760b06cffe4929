"""The KV store as the router sees it: who shares which tier, what is in it, and what loading from it takes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from bascule.kv.prefix_index import Match
from bascule.policies.cost import Floats
from bascule.policies.load import UNMEASURED
from bascule.policies.snapshot import STORE_TIERS, StoreColumns
from bascule.router.detours import Detours
from bascule.router.kv_feed import KvFeed
from bascule.types import LinkCost, Tier
from bascule.wire import KvEvents, StorePlace

_UNBOUNDED = 1_000_000
"""Blocks that the index keeps of a tier without a known bound."""
_SLACK = 2
"""Nobody tells when a tier evicts, so the index may name more blocks than it holds, until they are found missing."""

_NOWHERE = -1

_Place = tuple[Tier, str]


class Stores:
    """One row a worker, as in the columns. What one worker saves, all that share the tier can load."""

    def __init__(self) -> None:
        self.detours = Detours()
        self._sharing: dict[_Place, dict[int, KvFeed]] = {}
        self._places: dict[int, dict[Tier, _Place]] = {}
        self._numbers: dict[_Place, int] = {}
        """One for each place that there has ever been."""
        self._place = np.zeros((0, len(STORE_TIERS)), np.int64)
        self._latency_s = np.zeros((0, len(STORE_TIERS)))
        self._byte_s = np.zeros((0, len(STORE_TIERS)))

    def __bool__(self) -> bool:
        """Whether any worker has a store."""
        return bool(self._sharing)

    @staticmethod
    def capacity(places: Mapping[Tier, StorePlace]) -> dict[Tier, int]:
        """Blocks of each tier that the index is to have room for."""
        return {tier: _SLACK * (place.blocks or _UNBOUNDED) for tier, place in places.items() if tier in STORE_TIERS}

    def join(self, row: int, feed: KvFeed, places: Mapping[Tier, StorePlace]) -> None:
        """A worker with these tiers, perhaps none, has taken a row."""
        if row >= len(self._latency_s):
            more = np.zeros((row + 1 - len(self._latency_s), len(STORE_TIERS)))
            self._latency_s = np.concatenate([self._latency_s, more])
            self._byte_s = np.concatenate([self._byte_s, more])
            self._place = np.concatenate([self._place, np.full(more.shape, _NOWHERE)])
        self._places[row] = {tier: (tier, place.id) for tier, place in places.items() if tier in STORE_TIERS}
        self._place[row] = _NOWHERE
        for tier, place in self._places[row].items():
            self._sharing.setdefault(place, {})[row] = feed
            self._place[row, STORE_TIERS.index(tier)] = self._numbers.setdefault(place, len(self._numbers))
        self.measured(row, {tier: UNMEASURED[tier] for tier in self._places[row]})

    def leave(self, row: int) -> None:
        self.detours.left(row)
        self._place[row] = _NOWHERE
        for place in self._places.pop(row, {}).values():
            rows = self._sharing[place]
            del rows[row]
            if not rows:
                del self._sharing[place]

    def places(self) -> Iterator[tuple[Tier, Collection[int]]]:
        """Each place by its tier, and the rows of the workers that share it."""
        for (tier, _), rows in self._sharing.items():
            yield tier, rows.keys()

    def speaks_for(self, row: int, tier: Tier) -> bool:
        """Whether a worker has that tier, and is of those that share its place the one that has been there longest."""
        place = self._places[row].get(tier)
        return place is not None and next(iter(self._sharing[place])) == row

    def columns(self, now: float) -> StoreColumns | None:
        """What policies see, to be read at once; None where there is no store."""
        if not self:
            return None
        shunned_s = self.detours.shunned(len(self._place), now)
        return StoreColumns(self._place, self._latency_s, self._byte_s, shunned_s)

    def measured(self, row: int, costs: Mapping[Tier, LinkCost]) -> None:
        """What loading from each tier takes this worker."""
        for at, tier in enumerate(STORE_TIERS):
            if (cost := costs.get(tier)) is not None and cost.bytes_per_s > 0:
                self._latency_s[row, at], self._byte_s[row, at] = cost.latency_s, 1 / cost.bytes_per_s

    def seconds(self, row: int, tier: Tier, size: int) -> float:
        """What loading `size` bytes from a tier takes this worker."""
        at = STORE_TIERS.index(tier)
        return float(self._latency_s[row, at] + size * self._byte_s[row, at])

    def changed(self, row: int, events: KvEvents) -> None:
        """A worker's events, which its own feed has applied, go for all that share the tiers, too."""
        for part in events.changes:
            place = self._places[row].get(part.tier)  # type: ignore[call-overload]
            for other, feed in self._sharing.get(place, {}).items():
                if other != row:
                    feed.also(part)

    def stored(self, match: Match, block_tokens: int, token_bytes: int, rows: int) -> tuple[NDArray[np.int64], Floats]:
        """How many tokens of a prompt each of `rows` rows has or can load, and the seconds that loading takes.

        A tier that is asked for nothing costs nothing.
        """
        tokens, seconds = np.zeros(rows, np.int64), np.zeros(rows)
        known = min(len(match.device), len(self._latency_s), rows)
        above = match.device[:known]
        for at, tier in enumerate(STORE_TIERS):
            blocks = match.tiers[tier][:known]
            more = (blocks - above) * block_tokens
            seconds[:known] += (more > 0) * (
                self._latency_s[:known, at] + more * token_bytes * self._byte_s[:known, at]
            )
            above = blocks
        tokens[:known] = above
        return tokens * block_tokens, seconds
