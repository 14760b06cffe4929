"""What handing KV from one worker to another takes: as its workers told last, or else as was expected."""

from __future__ import annotations

from collections.abc import Mapping

from bascule.types import LinkCost, WorkerId

Ends = tuple[WorkerId, WorkerId]


class LinkCosts(dict[Ends, LinkCost]):
    """By the two workers; links of which nothing is known are not in it."""

    def __init__(self) -> None:
        super().__init__()
        self._expected: dict[Ends, LinkCost] = {}

    def expect(self, costs: Mapping[Ends, LinkCost]) -> None:
        """What links are taken to cost while their workers say nothing of them."""
        self._expected = dict(costs)
        self.update({ends: cost for ends, cost in costs.items() if ends not in self})

    def told(self, worker: WorkerId, before: Mapping[WorkerId, LinkCost], now: Mapping[WorkerId, LinkCost]) -> None:
        """A worker says what its links take; of those that it spoke of `before` and does not now, it has forgotten."""
        for peer in before.keys() - now.keys():
            self._forget((worker, peer))
        for peer, cost in now.items():
            self[worker, peer] = cost

    def left(self, worker: WorkerId) -> None:
        """What was measured of its links no longer counts."""
        for ends in [ends for ends in self if worker in ends]:
            self._forget(ends)

    def _forget(self, ends: Ends) -> None:
        self.pop(ends, None)
        if ends in self._expected:
            self[ends] = self._expected[ends]
