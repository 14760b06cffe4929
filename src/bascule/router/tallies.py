"""What is counted for the metrics, of workers and of requests.

Of workers once what several of them see, and for good what they did who have left; of requests once, whichever workers
had a part in them.
"""

from __future__ import annotations

import math
from collections import Counter

from bascule.observe.totals import Key, Totals
from bascule.router.flight import Flight
from bascule.router.view import ClusterView, Member
from bascule.types import Tier, WorkerLoad


class Tallies:
    """One for a router."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._totals = Totals()

    def heard(self, member: Member, load: WorkerLoad) -> None:
        """A heartbeat that the view does not know yet. The first one's counts are of the time before this router took
        the worker in: they are where it begins."""
        before = member.load if member.pulse.beats else load
        self._totals.grew(before, load, remote=self._view.stores.speaks_for(member.row, Tier.REMOTE))

    def prefilled(self, flight: Flight) -> None:
        """The current attempt has a token. The first that any has counts: what of the prompt was found is known then,
        but for attached servers."""
        member = self._view.members.get(flight.placement.decode)
        if flight.first_at == math.inf and not (member is not None and member.attached):
            kv = flight.kv
            self._totals.found(len(flight.request.prompt), kv.cached_tokens or 0, kv.brought.tokens)

    def ended(self, flight: Flight) -> None:
        """A request is over."""
        if (handoff := flight.kv.handoff) is not None:
            self._totals.handed_over(handoff)

    def totals(self) -> dict[Key, float]:
        """Since the router started; they never fall."""
        return self._totals.read()

    def store_blocks(self) -> dict[Tier, int]:
        """Blocks in each tier, a place that several workers share counted once."""
        blocks: Counter[Tier] = Counter()
        stores = {member.row: member.load.stores for member in self._view.members.values()}
        for tier, rows in self._view.stores.places():
            blocks[tier] += max((stores[row][tier].blocks for row in rows if tier in stores[row]), default=0)
        return dict(blocks)
