"""Handoffs through the KV store: one worker saves, another loads, and neither needs the other alive or reachable.

The first leg is the request cut to one token, on the prefill worker, which says when the prompt's KV is saved. The
second is the request behind that token, on the decode worker, which finds the KV in the store. What it does not find it
computes, so a tier that fails costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from bascule.router.flight import Flight
from bascule.types import RequestId, Tier
from bascule.wire import Submit

PATIENCE_S = 1.0
"""What the second leg waits for the first one's KV to be saved, once it has its token."""


class Relay:
    """Requests between their two legs."""

    def __init__(self) -> None:
        self.count = 0
        """Second legs sent."""
        self._under_way: dict[RequestId, Flight] = {}

    def first_leg(self, flight: Flight, whole: Submit, tier: Tier) -> Submit:
        """What the prefill worker gets."""
        flight.first_leg = True
        self._under_way[flight.request.id] = flight
        sampling = replace(whole.sampling, max_tokens=len(whole.generated) + 1)
        return replace(whole, sampling=sampling, decode=None, save_to=tier)

    def second_leg(self, flight: Flight, now: float) -> Submit | None:
        """What the decode worker gets now, whether the KV is there or not; None if it has it, or needs nothing."""
        self._under_way.pop(flight.request.id, None)
        if not flight.first_leg or flight.ended or flight.placed is None or flight.prefilling:
            return None
        flight.first_leg, flight.handed_over = False, True
        flight.kv.handed()
        self.count += 1
        return replace(flight.submission(now), stored_tokens=flight.known_tokens - 1)

    def overdue(self, now: float) -> Iterator[Flight]:
        """Those that have waited long enough, and those that need no second leg any more, which are forgotten."""
        for request, flight in list(self._under_way.items()):
            if flight.ended or flight.placed is None or not flight.first_leg:
                del self._under_way[request]
            elif not flight.prefilling and now - flight.latest_at > PATIENCE_S:
                yield flight
