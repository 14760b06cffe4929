"""Names of live workers: another process that comes with one waits until it is free, or is refused with one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bascule.clock import Clock
from bascule.router.view import Member
from bascule.types import Epoch, WorkerId
from bascule.wire import Register

log = logging.getLogger(__name__)

PATIENCE_S = 4.0
"""For so long who comes with a live worker's name may repeat its registration; they come each second."""
_FORGOTTEN_S = 2.5
"""Who has not repeated it for so long has given up."""
_MOST = 256
"""Who wait at once; more are not remembered, and neither taken nor refused."""


@dataclass(slots=True)
class _Claim:
    offer: Register
    since: float
    repeated: float


class Claims:
    """Newcomers that wait for a name. A worker that is heard of cannot be ousted, only one that is silent or leaves."""

    def __init__(
        self,
        clock: Clock,
        is_silent: Callable[[Member], bool],
        register: Callable[[Epoch, Register], None],
        refuse: Callable[[Epoch, str], None],
    ) -> None:
        """`register` is called again for who has waited, once the name is free; `refuse` is told why."""
        self._clock = clock
        self._is_silent = is_silent
        self._register = register
        self._refuse = refuse
        self._waiting: dict[Epoch, _Claim] = {}

    def must_wait(self, holder: Member | None, offer: Register) -> bool:
        """Whether `holder`, the member of the offer's name, is alive. Then it was noted, or refused for good."""
        if holder is None or self._is_silent(holder):
            self._waiting.pop(offer.epoch, None)
            return False
        now = self._clock.now()
        claim = self._waiting.get(offer.epoch)
        if claim is None:
            if len(self._waiting) < _MOST:
                self._waiting[offer.epoch] = _Claim(offer, now, now)
            return True
        claim.repeated = now
        if now - claim.since >= PATIENCE_S and not holder.leaving:
            del self._waiting[offer.epoch]
            why = _taken(holder, offer, now)
            log.error("refused a registration: %s", why)
            self._refuse(offer.epoch, why)
        return True

    def tick(self, members: Mapping[WorkerId, Member]) -> None:
        """Called a few times a second: lets those in whose name is free by now, in the order in which they came."""
        now = self._clock.now()
        for epoch, claim in list(self._waiting.items()):
            if now - claim.repeated > _FORGOTTEN_S:
                del self._waiting[epoch]
            elif (holder := members.get(claim.offer.worker)) is None or self._is_silent(holder):
                del self._waiting[epoch]
                self._register(epoch, claim.offer)


def _taken(holder: Member, offer: Register, now: float) -> str:
    """What is said of a name that a live worker has."""
    theirs = holder.registration
    where = "on the same machine" if theirs.machine == offer.machine else "on another machine"
    return (
        f"another live worker has the name {offer.worker}: process {theirs.pid} {where}, at {theirs.peer.address}, for "
        f"{now - holder.since:.0f} s; start this one (process {offer.pid}) with another --id, or end that one first"
    )
