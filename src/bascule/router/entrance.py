"""At the door of the cluster: can those who would join be reached where they say; and answers to who only asks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from bascule import __version__
from bascule.config import RoutingConfig
from bascule.reach import first_unreachable
from bascule.router.link import RouterLink
from bascule.router.view import ClusterView
from bascule.types import Epoch
from bascule.wire import VERSION, Neighbour, Probe, Probed, Register, RegistrationRefusal

log = logging.getLogger(__name__)

TakeIn = Callable[[Epoch, Register, bool], None]
"""Called with who sent it, the registration, and whether all of its addresses have answered."""

_MOST_PROBED = 4
"""Addresses in one question."""
_MOST_AT_ONCE = 256


class Entrance:
    """Opens a connection to each address that a worker offers before it is taken in; in the running event loop.

    One that cannot be reached would fail every handoff later. Where KV goes by way of the store, or an operator has
    said that only workers reach each other, it is told of and taken in all the same.
    """

    def __init__(self, link: RouterLink, config: RoutingConfig, view: ClusterView) -> None:
        """Who only asks is told of `view` what a worker would meet."""
        self._link = link
        self._view = view
        self._refuses = config.check_reach and config.handoff != "store"
        self._trying: dict[Epoch, asyncio.Task[None]] = {}

    def admit(self, sender: Epoch, offer: Register, take_in: TakeIn) -> None:
        """Call `take_in` once the worker has been tried, or refuse it; what it repeats meanwhile is ignored."""
        self._begin(sender, self._admit(sender, offer, take_in))

    def answer(self, sender: Epoch, probe: Probe) -> None:
        """Tell who only asks what a worker would meet."""
        self._begin(sender, self._answer(sender, probe))

    def _begin(self, sender: Epoch, work: Coroutine[None, None, None]) -> None:
        if sender in self._trying or len(self._trying) >= _MOST_AT_ONCE:
            work.close()
            return
        task = self._trying[sender] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._trying.pop(sender))

    async def _admit(self, sender: Epoch, offer: Register, take_in: TakeIn) -> None:
        if (unreached := await first_unreachable(neighbour(offer).addresses)) is not None:
            trouble = (
                f"the router cannot connect to worker {offer.worker} at {unreached}: give it --host with an address of "
                "its machine that the others reach, and let them through to it in the firewall"
            )
            if self._refuses:
                trouble += "; where workers reach each other and the router need not, start it with --no-check-reach"
                log.error("refused a registration: %s", trouble)
                self._link.send(sender, RegistrationRefusal(trouble))
                return
            log.warning("%s", trouble)
        take_in(sender, offer, unreached is None)

    async def _answer(self, sender: Epoch, probe: Probe) -> None:
        unreached = await first_unreachable(probe.addresses[:_MOST_PROBED])
        members = self._view.members.values()
        answer = Probed(
            VERSION,
            __version__,
            time.time(),
            self._view.tokenizer,
            unreached or "",
            self._view.weights.card,
            tuple(Neighbour(one.id, ()) if one.attached else neighbour(one.registration) for one in members),
            next((one.registration.card.vocab for one in members if one.attached), None),
        )
        self._link.send(sender, answer)

    def close(self) -> None:
        for task in self._trying.values():
            task.cancel()


def neighbour(offer: Register) -> Neighbour:
    """A worker, with where its peers reach it: for messages, and for KV over TCP."""
    return Neighbour(offer.worker, (offer.peer.address, *offer.kv_addresses))
