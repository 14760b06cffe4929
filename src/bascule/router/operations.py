"""What operators, and workers that leave, want of members: to be drained and resumed, or used in another role."""

from __future__ import annotations

import logging
import math

from bascule.clock import Clock
from bascule.errors import Conflict, NotFound
from bascule.router.backend import LinkEnds, LinkReport, ReloadStatus
from bascule.router.link_probes import LinkProbes
from bascule.router.policy import lacking
from bascule.router.reload import Reload
from bascule.router.service import Service
from bascule.router.view import Member
from bascule.types import Role, WorkerId, WorkerStatus

log = logging.getLogger(__name__)


class MemberOperations:
    """The `Operations` behind the admin API.

    What an operator has said of a worker holds for its id, however often it is started, until he says otherwise or the
    router ends: a worker that was put aside must not come back because it has crashed.
    """

    def __init__(self, service: Service, policy: str, clock: Clock, links: LinkProbes) -> None:
        """`policy` is the routing policy's name."""
        self._links = links
        self._service = service
        self._view = service.view
        self._policy = policy
        self._clock = clock
        self._put_aside: set[WorkerId] = set()
        self._roles: dict[WorkerId, Role] = {}
        self.renewal = Reload(service.view, clock, self.leaves)

    # ------------------------------------------------------------ what the admin API calls

    def drain(self, worker: WorkerId, timeout: float | None = None) -> WorkerStatus:
        """See `Operations`. A second call sets the time anew."""
        member = self._member(worker)
        self._put_aside.add(worker)
        self._drain(member, math.inf if timeout is None else self._clock.now() + timeout)
        return self._status(member)

    def resume(self, worker: WorkerId) -> WorkerStatus:
        """See `Operations`."""
        member = self._member(worker)
        self._put_aside.discard(worker)
        if member.leaving:
            raise Conflict(
                f"Worker {worker} is about to end, as its process was told to; what is started in its place takes "
                "requests at once.",
                code="leaving",
            )
        if not member.attached and member.registration.card.fingerprint != self._view.weights.fingerprint:
            raise Conflict(
                f"Worker {worker} has weights that are no longer served; start it anew.", code="other_weights"
            )
        if member.draining:
            log.info("worker %s takes requests again", worker)
            self._view.drain(member, False)
            self._service.tick()
        return self._status(member)

    def set_role(self, worker: WorkerId, role: Role) -> WorkerStatus:
        """See `Operations`. Workers that are drained do not count as those that a policy needs."""
        member = self._member(worker)
        if member.attached:
            raise Conflict(
                f"{worker} is an attached server, which takes whole requests whatever its role; attach it or not.",
                code="no_role",
            )
        others = [one for one in self._own() if one is not member and not one.draining]
        missing = lacking(self._policy, {role, *(one.role for one in others)})
        if missing and role != member.role:
            raise Conflict(
                f"{worker} cannot become {role}: {missing}. Give another worker the role {member.role} first, or "
                "resume one that has it.",
                code="role_needed",
            )
        self._roles[worker] = role
        if role != member.role:
            log.info("worker %s is %s now, and was %s", worker, role, member.role)
            self._view.set_role(member, role)
            self._service.tick()
        return self._status(member)

    async def measure_link(self, ends: LinkEnds, size: int, runs: int) -> LinkReport:
        """See `Operations`."""
        source, target = self._member(ends.source), self._member(ends.target)
        return await self._links.measure(source, target, ends.transport, size, runs)

    def reload(self, timeout: float | None = None) -> ReloadStatus:
        """See `Operations`."""
        return self.renewal.begin(timeout)

    def reload_status(self) -> ReloadStatus:
        """See `Operations`."""
        return self.renewal.status()

    # ------------------------------------------------------------ what membership calls

    def joined(self, member: Member) -> None:
        """A member is there (again), and nothing is placed on it yet."""
        self.renewal.joined(member)
        if member.id in self._roles and not member.attached:
            self._view.set_role(member, self._roles[member.id])
        if member.id in self._put_aside:
            log.warning("worker %s was drained before it was started anew, and stays so until it is resumed", member.id)
            self._drain(member, math.inf)

    def leaves(self, member: Member) -> int:
        """A member wants to end; returns how many requests use it still. With none left it has been told to stop."""
        if not member.leaving:
            log.info("worker %s wants to end; it gets nothing new", member.id)
            member.leaving = True
            self._drain(member, member.drain_by)
        elif member.drained:
            self._service.clients[member.id].stop()
        return self._service.needed()[member.id]

    def tick(self) -> None:
        """Called a few times a second: what has its time over goes elsewhere, what is empty counts as drained."""
        self.renewal.tick()
        draining = [member for member in self._view.members.values() if member.draining and not member.drained]
        for member in draining:
            if self._clock.now() >= member.drain_by:
                self._service.move_away(member.id)
        if not draining:
            return
        needed = self._service.needed()
        for member in draining:
            if not needed[member.id]:
                self._drained(member)

    # ------------------------------------------------------------ inside

    def _drain(self, member: Member, by: float) -> None:
        self._view.drain(member, True, by)
        log.info("worker %s is draining", member.id)
        self.tick()

    def _drained(self, member: Member) -> None:
        member.drained = True
        log.info("worker %s is drained: nothing needs it", member.id)
        if member.leaving:
            self._service.clients[member.id].stop()

    def _own(self) -> list[Member]:
        return [member for member in self._view.members.values() if not member.attached]

    def _member(self, worker: WorkerId) -> Member:
        member = self._view.members.get(worker)
        if member is None:
            there = ", ".join(sorted(self._view.members)) or "none"
            raise NotFound(f"There is no worker {worker[:64]!r} now; there are: {there}.", code="unknown_worker")
        return member

    def _status(self, member: Member) -> WorkerStatus:
        statuses = self._view.statuses(self._service.needed())
        return next(status for status in statuses if status.id == member.id)
