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
_REMEMBERED = 1000
_TIMES = 3
"""As many times the workers of the beginning are asked to end at most, where weights change while a reload runs."""
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
        """Those that there were at the beginning, and who has to go besides because files have changed since."""
        self._asked = 0
        """How many of them have been asked to end."""
        self._gone_at: float | None = None
        """Since when the latest of those is gone."""
        self._patience_s = PATIENCE_S
        self._names: dict[WorkerId, None] = {}
        """Of workers that there have been, the latest last."""
        self._before: frozenset[WorkerId] = frozenset()
        """Those of them when the reload began: who comes back under one of these stands for nobody else."""
        self._done = self._most = 0
        """Those of the latest reload that were replaced, once it is over; and how many it may ask in all."""
        self._waiting: dict[WorkerId, tuple[float, str]] = {}
        """Workers with other weights: when they were last heard of (the clock's seconds), and the fingerprint."""
        self._state, self._failure = "none", ""

    def begin(self, patience_s: float | None) -> ReloadStatus:
        """Raises Conflict while one is under way, and where there has never been a worker.

        Where there has, and is none now, the first that comes decides which weights are served.
        """
        if self._running:
            raise Conflict(
                "The workers are being reloaded already; GET /admin/reload says how far that is.", code="busy"
            )
        members = self._own()
        if not members and not self._view.weights.fingerprint:
            raise Conflict(
                "No worker has joined yet that could be reloaded; an attached server is yours to start anew.",
                code="no_worker",
            )
        self._workers = [(member.id, member.epoch) for member in members]
        self._before = frozenset(self._names)
        self._asked, self._gone_at, self._failure = 0, None, ""
        self._most = len(members) * _TIMES
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._view.weights.reloading, self._state = True, "running"
        log.info("reloading %d workers, one after another", len(members))
        self.tick()
        return self.status()

    def status(self) -> ReloadStatus:
        """How far the latest reload is."""
        return ReloadStatus(
            state=self._state,
            workers=len(dict(self._workers)),
            done=self._replaced()[0] if self._running else self._done,
            current=self._workers[self._asked - 1][0] if self._running and self._asked else WorkerId(""),
            ended=self._running and self._asked > 0 and self._gone_at is not None,
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
        self._waiting[offer.worker] = self._clock.now(), offer.card.fingerprint
        return True

    def joined(self, member: Member) -> None:
        """A worker was taken in."""
        self._waiting.pop(member.id, None)
        self._names.pop(member.id, None)
        self._names[member.id] = None
        if len(self._names) > _REMEMBERED:
            del self._names[next(iter(self._names))]

    def cannot_start(self, worker: WorkerId, why: str) -> None:
        """Who watches over processes has tried and given up, for now."""
        if self._running and worker in (name for name, _ in self._workers[: self._asked]):
            self._end(
                f"worker {worker} {why}; mend that (or put the files of before back), and call bascule admin reload"
            )

    def tick(self) -> None:
        """Called a few times a second."""
        if not self._running:
            return
        now = self._clock.now()
        self._waiting = {name: last for name, last in self._waiting.items() if now - last[0] <= _FORGOTTEN_S}
        if self._asked and self._is_there(*self._workers[self._asked - 1]):
            return
        if self._replaced()[1] if self._workers else not self._own():
            self._gone_at = now if self._gone_at is None else self._gone_at
            if now - self._gone_at > self._patience_s:
                who = (
                    f"worker {self._workers[self._asked - 1][0]} has ended and not" if self._asked else "no worker has"
                )
                self._end(
                    f"{who} come back in {self._patience_s:g} s; see the log, and call bascule admin reload again once "
                    "it can start"
                )
            return
        self._gone_at = None
        self._next()

    @property
    def _running(self) -> bool:
        return self._view.weights.reloading

    def _next(self) -> None:
        """Ask the next one that is still there to end; with none left, the reload is over.

        Unless somebody waits with weights that are not served: then the files have changed in between, and who has come
        before that is asked to end, too.
        """
        served = self._view.weights.fingerprint
        behind = any(fingerprint != served for _, fingerprint in self._waiting.values())
        if self._asked == len(self._workers) and behind:
            asked, now_served = set(self._workers), self._view.of_weights(served)
            fresh = [each for member in now_served if (each := (member.id, member.epoch)) not in asked]
            self._workers += fresh[: self._most - len(self._workers)]
        while self._asked < len(self._workers):
            worker, epoch = self._workers[self._asked]
            self._asked += 1
            if (member := self._view.current(worker, epoch)) is not None:
                self._leave(member)
                return
        if not self._waiting:
            self._end("")
        elif behind and len(self._workers) >= self._most:
            self._end(
                f"workers {', '.join(sorted(self._waiting))} go on coming with other weights than those that are "
                "served: see that all have the same files, and call bascule admin reload again"
            )

    def _own(self) -> list[Member]:
        return [member for member in self._view.members.values() if not member.attached]

    def _is_there(self, worker: WorkerId, epoch: Epoch) -> bool:
        return self._view.current(worker, epoch) is not None

    def _replaced(self) -> tuple[int, int]:
        """How many of those that are gone have somebody in their place, by their own name or a new one; and how many
        have not."""
        asked = self._workers[: self._asked]
        epochs = {epoch for _, epoch in asked}
        come = {member.id for member in self._own() if member.epoch not in epochs} | set(self._waiting)
        gone = {worker for worker, epoch in dict(asked).items() if not self._is_there(worker, epoch)}
        missing = max(len(gone - come) - len(come - self._before), 0)
        return len(gone) - missing, missing

    def _end(self, failure: str) -> None:
        self._done = self._replaced()[0]
        self._view.weights.reloading = False
        self._waiting.clear()
        self._failure, self._state = failure, "failed" if failure else "done"
        if failure:
            log.error("the reload has stopped: %s", failure)
        else:
            log.info("all workers are reloaded")
