"""Handoffs through the KV store: one worker saves, another loads, and neither needs the other alive or reachable.

The first leg is the request cut to one token, on the prefill worker, which says when the prompt's KV is saved. The
second is the request behind that token, on the decode worker, which finds the KV in the store. What it does not find it
computes, so a tier that fails costs time and nothing else. What it is known not to find there it fetches from the
prefill worker, if it may, and a tier that handoffs come to nothing by is left out for a while (`detours.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from bascule.policies.handoff import OTHER_MACHINE, SAME_MACHINE
from bascule.policies.load import prompt_seconds
from bascule.router.flight import Flight
from bascule.router.view import ClusterView, Member
from bascule.types import CostModel, Placement, RequestId, Tier, WorkerId
from bascule.wire import FetchFrom, Saved, Submit

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""What the second leg waits for the first one's KV to be saved, once it has its token."""
_LITTLE = 0.25
"""A handoff has come to nothing if less of its blocks came by its tier."""


class _Handing(Struct):
    """One handoff."""

    flight: Flight
    attempt: int
    placement: Placement
    tier: Tier
    begun: float
    blocks: int
    """Full ones of what its first leg knows."""
    missing: int = 0
    """Those of them that the prefill worker takes not to be there."""

    @property
    def over(self) -> bool:
        return self.flight.ended or self.flight.placed is None or self.flight.attempt != self.attempt


class Relay:
    """Requests in two legs, until the decode worker has sent a token."""

    def __init__(self, view: ClusterView) -> None:
        self.count = 0
        """Second legs sent."""
        self._view = view
        self._first: dict[RequestId, _Handing] = {}
        self._second: dict[RequestId, _Handing] = {}

    def first_leg(self, flight: Flight, whole: Submit, placement: Placement, tier: Tier, now: float) -> Submit:
        """What the prefill worker gets."""
        flight.first_leg = True
        handing = _Handing(flight, flight.attempt, placement, tier, now, len(flight.hashes))
        self._first[flight.request.id] = handing
        for worker in (placement.prefill, placement.decode):
            self._view.stores.detours.began(self._view.members[worker].row, tier, flight.request.id, now)
        sampling = replace(whole.sampling, max_tokens=len(whole.generated) + 1)
        return replace(whole, sampling=sampling, decode=None, save_to=tier)

    def second_leg(self, flight: Flight, now: float, saved: Saved | None = None) -> Submit | None:
        """What the decode worker gets now, whether the KV is there or not; None if it has it, or needs nothing.

        `saved` is what the prefill worker says of the KV, if it has said anything by now.
        """
        handing = self._first.pop(flight.request.id, None)
        if handing is None or not flight.first_leg or flight.ended or flight.placed is None or flight.prefilling:
            return None
        flight.first_leg, flight.handed_over = False, True
        flight.kv.handed()
        self.count += 1
        missing = handing.missing = handing.blocks if saved is None else saved.missing
        if saved is not None:
            self._second[flight.request.id] = handing
            if not missing and any(saved.bytes.values()):
                self._kept(handing, handing.placement.prefill, handing.blocks, now)
        elif missing:  # whatever comes of it, it has been waited for
            self._failed(handing, handing.placement.prefill, now)
        known = flight.known_tokens - 1
        submission = replace(flight.submission(now), stored_tokens=known)
        return replace(submission, fetch=self._source(handing.placement, known)) if missing else submission

    def brought(self, flight: Flight, worker: WorkerId, now: float) -> None:
        """A worker has sent a token: the decode worker's first one shows what came by way of the tier."""
        handing = self._second.get(flight.request.id)
        if handing is None or worker != handing.placement.decode:
            return
        del self._second[flight.request.id]
        if handing.over and not flight.ended:
            return
        came, lost = flight.kv.came_and_lost(len(flight.request.prompt), flight.prompt_blocks, self._block_tokens)
        prefill, decode = handing.placement.prefill, handing.placement.decode
        if came >= _LITTLE * (came + lost):
            self._kept(handing, prefill, came, now)
            self._kept(handing, decode, came, now)
        elif handing.missing:
            self._failed(handing, prefill, now)
            self._kept(handing, decode, 0, now)
        else:
            self._failed(handing, decode, now)
            self._kept(handing, prefill, 0, now)

    def overdue(self, now: float) -> Iterator[Flight]:
        """Those that have waited long enough, and those that need no second leg any more, which are forgotten."""
        self._second = {request: handing for request, handing in self._second.items() if not handing.over}
        for request, handing in list(self._first.items()):
            flight = handing.flight
            if handing.over or not flight.first_leg:
                del self._first[request]
            elif not flight.prefilling and now - flight.latest_at > PATIENCE_S:
                yield flight

    @property
    def _block_tokens(self) -> int:
        return self._view.card.layout.block_size if self._view.card is not None else 1

    def _failed(self, handing: _Handing, worker: WorkerId, now: float) -> None:
        if (member := self._view.members.get(worker)) is not None:
            detours, request = self._view.stores.detours, handing.flight.request.id
            if detours.failed(member.row, handing.tier, request, handing.blocks, handing.begun, now):
                log.warning(
                    "worker %s: handoffs by way of the %s tier come to nothing; trying it now and then",
                    worker,
                    handing.tier,
                )

    def _kept(self, handing: _Handing, worker: WorkerId, blocks: int, now: float) -> None:
        if (member := self._view.members.get(worker)) is not None:
            detours, request = self._view.stores.detours, handing.flight.request.id
            if detours.kept(member.row, handing.tier, request, blocks, now):
                log.info("worker %s: handoffs go by way of the %s tier again", worker, handing.tier)

    def _source(self, placement: Placement, tokens: int) -> FetchFrom | None:
        """The prefill worker, to fetch so many tokens' KV from; None where it does not lend, or cannot be reached, or
        where computing is quicker."""
        lender, taker = (self._view.members.get(worker) for worker in (placement.prefill, placement.decode))
        if lender is None or taker is None or not self._view.columns.lends[lender.row]:
            return None
        if lender.row in self._view.columns.unreached.get(taker.row, ()):
            return None
        compute_s = prompt_seconds(self._view.cost_of(taker), tokens, 0)
        known = self._view.cost_of(taker) != CostModel()
        if known and self._fetch_seconds(lender, taker, tokens) > compute_s:
            return None
        return FetchFrom(lender.registration.peer, tokens)

    def _fetch_seconds(self, lender: Member, taker: Member, tokens: int) -> float:
        layout = lender.registration.card.layout
        near = lender.registration.machine == taker.registration.machine
        link = self._view.links.get((lender.id, taker.id), SAME_MACHINE if near else OTHER_MACHINE)
        return link.latency_s + tokens * layout.block_bytes / layout.block_size / link.bytes_per_s
