"""What workers count, for the metrics: once what several of them see, and for good what they did who have left."""

from __future__ import annotations

from collections import Counter

from bascule.observe.totals import Key, Totals
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
