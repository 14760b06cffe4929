"""Who belongs to the cluster: registrations, heartbeats, and the verdict that a worker is lost."""

from __future__ import annotations

import asyncio
import logging

from bascule.clock import Clock
from bascule.config import RoutingConfig
from bascule.errors import RegistrationRefused
from bascule.router.client import NativeClient, WorkerClient
from bascule.router.link import RouterLink
from bascule.router.operations import MemberOperations
from bascule.router.service import Service
from bascule.router.view import Member
from bascule.types import Epoch, WorkerId
from bascule.wire import (
    Draining,
    Failed,
    Goodbye,
    Heartbeat,
    KvEvents,
    Leaving,
    Loaded,
    Register,
    Registered,
    RegistrationRefusal,
    Reregister,
    Resync,
    Saved,
    Starting,
    StepTokens,
    Stop,
    Submit,
    WorkerMessage,
)

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
TICK_S = 0.1
STOOD_STILL_S = 0.5
"""A tick later than this means that this process was paused, and heartbeats wait unread."""
_UNCONNECTED_S = 1.0
"""How long a worker that could not be sent to is left alone. One that has died is not missed before its heartbeats are,
and until then each request would use up its tries on it."""
_SWEPT_BLOCKS = 8000
"""Blocks of the prefix index to clear of departed workers in each tick: a millisecond or two."""


class Membership:
    """Applies worker messages to the view and tells the service who joined, who left and what they say."""

    def __init__(self, link: RouterLink, service: Service, config: RoutingConfig, clock: Clock) -> None:
        self.stages: dict[WorkerId, str] = {}
        """What workers that are not ready yet say that they are doing."""
        self._link = link
        self._service = service
        self._view = service.view
        self._config = config
        self._clock = clock
        self.operations = MemberOperations(service, config.policy, clock)

    async def run(self) -> None:
        """Serve the worker socket and the clock until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.serve(self.apply))
            group.create_task(self._watch())

    def apply(self, sender: Epoch, message: WorkerMessage) -> None:
        """One message of a worker. Nothing is taken from an epoch that is not the member's current one."""
        if isinstance(message, Starting):
            self.stages[message.worker] = message.stage
        elif isinstance(message, Register):
            self._register(sender, message)
        elif (member := self._view.current(message.worker, message.epoch)) is None or message.epoch != sender:
            self._answer_stranger(sender, message)
        elif isinstance(message, Heartbeat):
            self._beat(member, message)
        elif isinstance(message, KvEvents):
            self._view.kv_changed(member, message)
            self._keep_in_step(member)
        elif isinstance(message, StepTokens):
            if message.load is not None:
                self._view.stepped(member, message.load, self._clock.now())
            self._service.tokens(message)
        elif isinstance(message, Loaded | Saved | Failed):
            self._apply_to_request(message)
        elif isinstance(message, Leaving):
            self._link.send(sender, Draining(self.operations.leaves(member)))
        elif isinstance(message, Goodbye):
            self._lose(member, "has left")

    def _apply_to_request(self, message: Loaded | Saved | Failed) -> None:
        if isinstance(message, Loaded):
            self._service.loaded(message)
        elif isinstance(message, Saved):
            self._service.saved(message)
        else:
            self._service.failed(message)

    def is_current(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Whether that epoch of the worker is a member, and not lost or replaced."""
        return self._view.current(worker, epoch) is not None

    def rest(self, member: Member, until: float) -> None:
        """Give a member no requests until then (the clock's seconds)."""
        self._view.rest(member, until, self._clock.now())

    def lost(self, worker: WorkerId, why: str, epoch: Epoch | None = None) -> None:
        """A worker (that epoch of it, where given) is known to be gone: its process ended, say."""
        member = self._view.members.get(worker)
        if member is not None and epoch in (None, member.epoch):
            self._lose(member, why)

    def attach(self, offer: Register, client: WorkerClient) -> Member:
        """Take in an attached server under a new epoch; what it says comes through `apply` as any worker's.

        Raises RegistrationRefused.
        """
        self._view.check_server(offer)
        return self._take_in(offer, client, attached=True)

    def _register(self, sender: Epoch, offer: Register) -> None:
        if (known := self._view.current(offer.worker, offer.epoch)) is not None:
            known.last_seen = self._clock.now()
            self._link.send(sender, Registered(offer.epoch, HEARTBEAT_S))
            return
        try:
            self._view.check(offer)
        except RegistrationRefused as refusal:
            log.error("refused a registration: %s", refusal)
            self._link.send(sender, RegistrationRefusal(str(refusal)))
            return
        if (earlier := self._view.members.get(offer.worker)) is not None:
            self._lose(earlier, "was replaced by a new incarnation")
        self._link.send(sender, Registered(offer.epoch, HEARTBEAT_S))
        self._take_in(offer, NativeClient(self._link, offer.worker, offer.epoch, self._unsent))

    def _unsent(self, worker: WorkerId, submission: Submit) -> None:
        if (member := self._view.members.get(worker)) is not None:
            self.rest(member, self._clock.now() + _UNCONNECTED_S)
        self._service.unsent(worker, submission)

    def _take_in(self, offer: Register, client: WorkerClient, *, attached: bool = False) -> Member:
        member = self._view.add(offer, self._clock.now(), attached=attached)
        self.stages.pop(offer.worker, None)
        self.operations.joined(member)
        log.info("worker %s joined as %s on %s", member.id, member.role, offer.device)
        self._service.joined(member, client)
        return member

    def _beat(self, member: Member, message: Heartbeat) -> None:
        was_suspect = member.suspect
        self._view.heartbeat(member, message.load, self._clock.now())
        if was_suspect:
            log.warning("worker %s is back", member.id)
        member.kv.told(message.kv_sequence)
        self._keep_in_step(member)

    def _keep_in_step(self, member: Member) -> None:
        """Have a worker tell its cache anew if what the index knows of it may be wrong."""
        if member.kv.should_ask(self._clock.now()):
            log.info("asking worker %s to tell anew which blocks it has", member.id)
            self._link.send(member.epoch, Resync())

    def _answer_stranger(self, sender: Epoch, message: WorkerMessage) -> None:
        """A burned epoch must stop; one that this router has never seen (it restarted) is asked to register again.

        What leaves and is no member has nothing that anybody waits for.
        """
        if isinstance(message, KvEvents):
            self._view.kv_faults["stranger"] += 1
        if isinstance(message, Leaving):
            self._link.send(sender, Stop())
        if not isinstance(message, Heartbeat):
            return
        if message.epoch in self._view.burned:
            self._link.send(
                sender, RegistrationRefusal(f"epoch {message.epoch} was declared dead; start the worker anew")
            )
        else:
            self._link.send(sender, Reregister())

    def _lose(self, member: Member, why: str) -> None:
        log.warning("worker %s (pid %d) %s", member.id, member.registration.pid, why)
        self._view.remove(member.id)
        self._service.lost(member, why)

    async def _watch(self) -> None:
        last = self._clock.now()
        while True:
            await asyncio.sleep(TICK_S)
            late = self._clock.now() - last - TICK_S
            last = self._clock.now()
            if late > STOOD_STILL_S:
                log.warning("the router stood still for %.1f s", late)
                self._view.excuse(late)
            dead = self._view.overdue(self._clock.now(), self._config.suspect_after, self._config.dead_after)
            for member in dead:
                self._lose(member, f"sent no heartbeat for {self._config.dead_after:g} s and counts as dead")
            self._service.tick()
            self.operations.tick()
            self._view.index.expire(self._clock.now())
            self._view.index.sweep(_SWEPT_BLOCKS)
