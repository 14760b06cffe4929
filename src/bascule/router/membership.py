"""Who belongs to the cluster: registrations, heartbeats, and the verdict that a worker is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from bascule import __version__
from bascule.clock import Clock
from bascule.config import RoutingConfig
from bascule.errors import RegistrationRefused
from bascule.link_wire import LinkMeasured, Reached
from bascule.router.claims import Claims
from bascule.router.client import NativeClient, WorkerClient
from bascule.router.entrance import Entrance, neighbour
from bascule.router.link import RouterLink
from bascule.router.link_probes import LinkProbes
from bascule.router.operations import MemberOperations
from bascule.router.pulse import HEARTBEAT_S
from bascule.router.service import Service
from bascule.router.silence import Silence
from bascule.router.skew import skewed
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
    Neighbours,
    Probe,
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

TICK_S = 0.1
STOOD_STILL_S = 0.5
"""A tick later than this means that this process was paused, and heartbeats wait unread."""
_UNCONNECTED_S = 1.0
"""How long a worker that could not be sent to is left alone. One that has died is not missed before its heartbeats are,
and until then requests would go back and forth."""
SWEPT_BLOCKS = 8000
"""Blocks of the prefix index to clear of departed workers in each tick, and to audit in one without requests: a
millisecond or two."""
_MOST_STARTING = 1024


class Membership:
    """Applies worker messages to the view and tells the service who joined, who left and what they say."""

    def __init__(
        self,
        link: RouterLink,
        service: Service,
        config: RoutingConfig,
        clock: Clock,
        entrance: Entrance | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Without an `entrance` nobody's addresses are tried; `wall` is the time of day."""
        self.stages: dict[WorkerId, str] = {}
        """What workers that are not ready yet say that they are doing."""
        self._link = link
        self._service = service
        self._view = service.view
        self._config = config
        self._clock = clock
        self._entrance = entrance
        self._wall = wall
        self.links = LinkProbes(service.view, link.send)
        self.operations = MemberOperations(service, config.policy, clock, self.links)
        self._silence = Silence(clock, self.is_current, self.lost)
        self.claims = Claims(clock, self._silence.is_silent, self._register, self._refuse)

    async def run(self) -> None:
        """Serve the worker socket and the clock until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._link.serve(self.apply, self._is_member))
                group.create_task(self._watch())
        finally:
            self._silence.close()
            if self._entrance is not None:
                self._entrance.close()

    def apply(self, sender: Epoch, message: WorkerMessage) -> None:
        """One message of a worker. Nothing is taken from an epoch that is not the member's current one."""
        if isinstance(message, Starting | Register | Probe):
            self._apply_to_outsider(sender, message)
        elif message.epoch != sender:
            _drop_foreign(sender, message.epoch, message)
        elif (member := self._view.current(message.worker, message.epoch)) is None:
            self._answer_stranger(sender, message)
        elif isinstance(message, Heartbeat):
            self._beat(member, message)
        elif isinstance(message, KvEvents):
            self._view.kv_changed(member, message)
            self._keep_in_step(member)
        elif isinstance(message, StepTokens):
            self._stepped(member, message)
        elif isinstance(message, Loaded | Saved | Failed):
            self._apply_to_request(message)
        elif isinstance(message, LinkMeasured):
            self.links.heard(message)
        elif isinstance(message, Reached) and self._entrance is not None:
            self._entrance.heard(message)
        elif isinstance(message, Leaving):
            self._link.send(sender, Draining(self.operations.leaves(member)))
        elif isinstance(message, Goodbye):
            self._lose(member, "has left")

    def _apply_to_outsider(self, sender: Epoch, message: Starting | Register | Probe) -> None:
        if isinstance(message, Starting):
            self._starting(message)
        elif isinstance(message, Register):
            if message.epoch == sender and (self.is_current(message.worker, sender) or not self._is_member(sender)):
                self._register(sender, message)
            else:
                _drop_foreign(sender, message.epoch, message)
        elif self._entrance is not None:
            self._entrance.answer(sender, message)

    def _starting(self, message: Starting) -> None:
        """Of more workers than there can be, only so many are remembered."""
        if message.worker in self.stages or len(self.stages) < _MOST_STARTING:
            self.stages[message.worker] = message.stage

    def _stepped(self, member: Member, message: StepTokens) -> None:
        if message.load is not None:
            self._view.stepped(member, message.load, self._clock.now())
        if (wrong := _unknown_token(message, member.registration.card.vocab)) is None:
            self._service.tokens(message)
            return
        log.error("worker %s sent token %d, which is none of its model's", member.id, wrong)
        for item in message.items:
            self._service.failed(
                Failed(
                    worker=message.worker,
                    epoch=message.epoch,
                    request=item.request,
                    attempt=item.attempt,
                    message=f"it sent token {wrong}, which is none of the model's",
                    retryable=True,
                )
            )

    def _apply_to_request(self, message: Loaded | Saved | Failed) -> None:
        if isinstance(message, Loaded):
            self._service.loaded(message)
        elif isinstance(message, Saved):
            self._service.saved(message)
        else:
            self._service.failed(message)

    def _is_member(self, epoch: Epoch) -> bool:
        """Whether a member has that epoch, under whatever name."""
        return any(member.epoch == epoch for member in self._view.members.values())

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

    def cannot_start(self, worker: WorkerId, why: str) -> None:
        """Who starts a worker has given that up for a while."""
        self.operations.renewal.cannot_start(worker, why)

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
        if not self._is_fit(sender, offer) or self._must_wait(offer):
            return
        if self._entrance is not None:
            self._entrance.admit(sender, offer, self._tried)
        else:
            self._admit(sender, offer)

    def _is_fit(self, sender: Epoch, offer: Register) -> bool:
        """Whether a worker goes with what is there; it is told if not, unless it has to wait."""
        try:
            self._view.check(offer)
        except RegistrationRefused as refusal:
            if self.operations.renewal.awaits(offer):
                return False
            log.error("refused a registration: %s", refusal)
            self._refuse(sender, str(refusal))
            return False
        return True

    def _must_wait(self, offer: Register) -> bool:
        """Whether a live worker has that name."""
        return self.claims.must_wait(self._view.members.get(offer.worker), offer)

    def _refuse(self, sender: Epoch, why: str) -> None:
        self._link.send(sender, RegistrationRefusal(why))

    def _tried(self, sender: Epoch, offer: Register, reached: bool) -> None:
        """A worker answers where it says, or need not; others may have joined meanwhile."""
        if self._is_fit(sender, offer) and not self._must_wait(offer):
            self._admit(sender, offer).reached = reached and self._config.check_reach

    def _admit(self, sender: Epoch, offer: Register) -> Member:
        if (earlier := self._view.members.get(offer.worker)) is not None:
            self._lose(earlier, "was replaced by a new incarnation")
        self._link.send(sender, Registered(offer.epoch, HEARTBEAT_S))
        return self._take_in(offer, NativeClient(self._link, offer.worker, offer.epoch, self._unsent))

    def _unsent(self, worker: WorkerId, submission: Submit) -> None:
        if (member := self._view.members.get(worker)) is not None:
            self.rest(member, self._clock.now() + _UNCONNECTED_S)
        self._service.unsent(worker, submission)

    def _take_in(self, offer: Register, client: WorkerClient, *, attached: bool = False) -> Member:
        member = self._view.add(offer, self._clock.now(), attached=attached)
        self.stages.pop(offer.worker, None)
        self.operations.joined(member)
        log.info("worker %s joined as %s on %s", member.id, member.role, offer.device)
        if offer.release not in ("", __version__):
            log.warning(
                "worker %s is of bascule %s and this router of %s: they understand each other, but run the same "
                "release on all hosts",
                member.id,
                offer.release,
                __version__,
            )
        self._service.joined(member, client)
        if not attached:
            self._introduce(member)
        return member

    def _introduce(self, newcomer: Member) -> None:
        """Let it and the other workers of our own try whether they reach each other."""
        others = self._view.neighbours(newcomer)
        known = tuple(neighbour(other.registration) for other in others)
        self._link.send(newcomer.epoch, Neighbours(known))
        for other in others:
            self._link.send(other.epoch, Neighbours((neighbour(newcomer.registration),)))

    def _beat(self, member: Member, message: Heartbeat) -> None:
        was_suspect = member.suspect
        for peer, why in message.load.unreachable.items():
            if peer not in member.load.unreachable:
                log.warning(
                    "worker %s cannot connect to worker %s at %s: no KV goes there; check --host of %s, and the "
                    "firewalls between them",
                    member.id,
                    peer,
                    why,
                    peer,
                )
        self._service.tallies.heard(member, message.load)
        if self._view.heartbeat(member, message.load, self._clock.now(), message.runs):
            self._compare_clocks(member, message.clock)
        if was_suspect:
            log.warning("worker %s is back", member.id)
        member.kv.claims(message.kv_sequence, message.kv_digest)
        self._keep_in_step(member)

    def _compare_clocks(self, member: Member, sent: float) -> None:
        if sent:
            member.skew.heard(sent, self._wall())
        if member.skew.too_large and not member.skew.told:
            member.skew.told = True
            log.warning("%s", skewed(f"worker {member.id}", member.skew.seconds or 0.0))

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
            self._refuse(sender, f"epoch {message.epoch} was declared dead; start the worker anew")
        else:
            self._link.send(sender, Reregister())

    def _lose(self, member: Member, why: str) -> None:
        level = logging.INFO if member.leaving else logging.WARNING
        log.log(level, "worker %s (pid %d) %s", member.id, member.registration.pid, why)
        self._view.remove(member.id)
        self.links.lost(member.id)
        self._service.lost(member, why)
        if not member.attached:
            for other in self._view.neighbours(member):
                self._link.send(other.epoch, Neighbours(gone=(member.id,)))

    async def _watch(self) -> None:
        last = self._clock.now()
        while True:
            await asyncio.sleep(TICK_S)
            late = self._clock.now() - last - TICK_S
            last = self._clock.now()
            if late > STOOD_STILL_S:
                log.warning("the router stood still for %.1f s", late)
                self._view.excuse(late)
            self._judge_silent()
            self._silence.look(self._view.members.values())
            self.claims.tick(self._view.members)
            self._service.tick()
            self.operations.tick()
            self._view.index.expire(self._clock.now())
            self._view.index.sweep(SWEPT_BLOCKS)
            if not self._service.active:
                self._view.audit_index(SWEPT_BLOCKS)

    def _judge_silent(self) -> None:
        """By missed heartbeats: suspect, then dead."""
        suspects = {member.epoch for member in self._view.members.values() if member.suspect}
        dead = self._view.overdue(self._clock.now(), self._config.suspect_after, self._config.dead_after)
        for member in self._view.members.values():
            if member.suspect and member.epoch not in suspects:
                log.warning(
                    "worker %s has sent no heartbeat for %g s: it gets no requests until it does",
                    member.id,
                    self._config.suspect_after,
                )
        for member in dead:
            self._lose(member, f"sent no heartbeat for {self._config.dead_after:g} s and counts as dead")


def _drop_foreign(sender: Epoch, named: Epoch, message: WorkerMessage) -> None:
    """What one epoch says in the name of another."""
    log.warning("dropped a %s of epoch %s that came from %s", type(message).__name__, named, sender)


def _unknown_token(message: StepTokens, vocab: int) -> int | None:
    """A token that the model does not have, if there is one."""
    for item in message.items:
        if item.token >= vocab:
            return item.token
        if item.logprobs is not None and (wrong := max((token for token, _ in item.logprobs.top), default=0)) >= vocab:
            return wrong
    return None
