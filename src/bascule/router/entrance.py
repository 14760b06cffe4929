"""At the door of the cluster: can those who would join be reached where they say; and answers to who only asks."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine

from bascule import __version__
from bascule.config import RoutingConfig
from bascule.link_wire import Reached, TryReach
from bascule.reach import CONNECT_S, first_unreachable
from bascule.router.link import RouterLink
from bascule.router.view import ClusterView
from bascule.types import Epoch, WorkerId
from bascule.wire import VERSION, Neighbour, Probe, Probed, Register, RegistrationRefusal

log = logging.getLogger(__name__)

TakeIn = Callable[[Epoch, Register, bool], None]
"""Called with who sent it, the registration, and whether all of its addresses have answered."""

_MOST_PROBED = 4
"""Addresses in one question."""
_MOST_AT_ONCE = 256
_MOST_ASKED = 64
"""Workers that try an address of who only asks, all at once."""
_HEAR_S = CONNECT_S + 1.0


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
        self._asking: dict[str, dict[WorkerId, asyncio.Future[str]]] = {}
        """The answers to each question that are waited for."""

    def admit(self, sender: Epoch, offer: Register, take_in: TakeIn) -> None:
        """Call `take_in` once the worker has been tried, or refuse it; what it repeats meanwhile is ignored."""
        self._begin(sender, self._admit(sender, offer, take_in))

    def answer(self, sender: Epoch, probe: Probe) -> None:
        """Tell who only asks what a worker would meet."""
        self._begin(sender, self._answer(sender, probe))

    def heard(self, answer: Reached) -> None:
        """A worker has tried addresses; what comes late is ignored."""
        waited_for = self._asking.get(answer.question, {}).get(answer.worker)
        if waited_for is not None and not waited_for.done():
            waited_for.set_result(answer.unreachable)

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
        addresses = probe.addresses[:_MOST_PROBED]
        unreached, from_workers = await asyncio.gather(first_unreachable(addresses), self._from_workers(addresses))
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
            from_workers,
        )
        self._link.send(sender, answer)

    async def _from_workers(self, addresses: tuple[str, ...]) -> dict[WorkerId, str]:
        """How those fared of our own workers that have tried the addresses; some may not answer in time."""
        workers = [member for member in self._view.members.values() if not member.attached][:_MOST_ASKED]
        if not workers:
            return {}
        loop, question = asyncio.get_running_loop(), uuid.uuid4().hex
        answers = self._asking[question] = {member.id: loop.create_future() for member in workers}
        try:
            for member in workers:
                self._link.send(member.epoch, TryReach(question, addresses))
            await asyncio.wait(answers.values(), timeout=_HEAR_S)
        finally:
            del self._asking[question]
        return {worker: answer.result() for worker, answer in answers.items() if answer.done()}

    def close(self) -> None:
        for task in self._trying.values():
            task.cancel()


def neighbour(offer: Register) -> Neighbour:
    """A worker, with where its peers reach it: for messages, and for KV over TCP."""
    return Neighbour(offer.worker, (offer.peer.address, *offer.kv_addresses))
