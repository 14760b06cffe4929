"""All workers started anew, one after another: with another release, other settings, or other weights."""

from __future__ import annotations

import logging
from collections.abc import Callable

from bascule.clock import Clock
from bascule.errors import Conflict
from bascule.router.backend import ReloadStatus
from bascule.router.view import ClusterView, Member
from bascule.types import Epoch, WorkerId
from bascule.wire import Register

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""For so long a worker may take to come back, unless the operator says otherwise."""
_FORGOTTEN_S = 2.5
"""A worker that waits repeats its registration each second; who has not for so long has given up."""


class Reload:
    """Has the workers of our own end in order, each once the one before has come back; whoever watches over their
    processes starts them anew.

    Workers that come with other weights wait until no worker takes requests that has those of before, and serve from
    then on: two versions never serve new requests side by side, and what has begun with one ends with it. Where a
    worker does not come back, the reload ends there, and what is left serves on.
    """

    def __init__(self, view: ClusterView, clock: Clock, leave: Callable[[Member], object]) -> None:
        """`leave` drains a member and then ends it."""
        self._view = view
        self._clock = clock
        self._leave = leave
        self._workers: list[tuple[WorkerId, Epoch]] = []
        """Those that there were at the beginning."""
        self._asked = 0
        """How many of them have been asked to end."""
        self._gone_at: float | None = None
        """Since when the latest of those is gone."""
        self._patience_s = PATIENCE_S
        self._waiting: dict[WorkerId, float] = {}
        """Workers with other weights, and when they were last heard of (the clock's seconds)."""
        self._failure = ""

    def begin(self, patience_s: float | None) -> ReloadStatus:
        """Raises Conflict while one is under way, and where there is no worker."""
        if self._running:
            raise Conflict(
                "The workers are being reloaded already; GET /admin/reload says how far that is.", code="busy"
            )
        members = [member for member in self._view.members.values() if not member.attached]
        if not members:
            raise Conflict("There is no worker to reload; an attached server is yours to start anew.", code="no_worker")
        self._workers = [(member.id, member.epoch) for member in members]
        self._asked, self._gone_at, self._failure = 0, None, ""
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._view.weights.reloading = True
        log.info("reloading %d workers, one after another", len(members))
        self.tick()
        return self.status()

    def status(self) -> ReloadStatus:
        """How far the latest reload is."""
        state = "failed" if self._failure else "running" if self._running else "done" if self._workers else "none"
        return ReloadStatus(
            state=state,
            workers=len(self._workers),
            done=self._asked - (self._running and self._asked > 0),
            current=self._workers[self._asked - 1][0] if self._running and self._asked else WorkerId(""),
            waiting=tuple(sorted(self._waiting)),
            failure=self._failure,
            fingerprint=self._view.weights.fingerprint,
        )

    def awaits(self, offer: Register) -> bool:
        """Whether a worker that was refused is to wait instead; called each time it offers itself."""
        if not self._view.weights.may_follow(offer.card):
            return False
        if offer.worker not in self._waiting:
            log.info("worker %s has other weights; it waits until those of before serve no longer", offer.worker)
        self._waiting[offer.worker] = self._clock.now()
        return True

    def joined(self, member: Member) -> None:
        """A worker was taken in."""
        self._waiting.pop(member.id, None)

    def tick(self) -> None:
        """Called a few times a second."""
        if not self._running:
            return
        now = self._clock.now()
        self._waiting = {name: heard for name, heard in self._waiting.items() if now - heard <= _FORGOTTEN_S}
        if self._asked and self._is_there(*self._workers[self._asked - 1]):
            return
        if self._asked and self._missing():
            self._gone_at = now if self._gone_at is None else self._gone_at
            if now - self._gone_at > self._patience_s:
                self._end(
                    f"worker {self._workers[self._asked - 1][0]} has ended and not come back in "
                    f"{self._patience_s:g} s; see its log, and call bascule admin reload again once it can start"
                )
            return
        self._next()

    @property
    def _running(self) -> bool:
        return self._view.weights.reloading

    def _next(self) -> None:
        """Ask the next one that is still there to end; with none left, the reload is over."""
        while self._asked < len(self._workers):
            worker, epoch = self._workers[self._asked]
            self._asked, self._gone_at = self._asked + 1, None
            if (member := self._view.current(worker, epoch)) is not None:
                self._leave(member)
                return
        if not self._waiting:
            self._end("")

    def _is_there(self, worker: WorkerId, epoch: Epoch) -> bool:
        return self._view.current(worker, epoch) is not None

    def _missing(self) -> bool:
        """Whether fewer have come than have gone."""
        before = {epoch for _, epoch in self._workers}
        own = [member for member in self._view.members.values() if not member.attached]
        come = {member.id for member in own if member.epoch not in before} | set(self._waiting)
        gone = [worker for worker, epoch in self._workers[: self._asked] if not self._is_there(worker, epoch)]
        return len(come) < len(gone)

    def _end(self, failure: str) -> None:
        self._view.weights.reloading = False
        self._waiting.clear()
        self._failure = failure
        if failure:
            log.error("the reload has stopped: %s", failure)
        else:
            log.info("all workers are reloaded")
