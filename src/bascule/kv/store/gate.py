"""Calls to a place that may hang: made on threads, waited for while they progress, spared after a failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic

from bascule.clock import Clock, WallClock
from bascule.errors import short
from bascule.kv.store.base import Fault
from bascule.kv.store.breaker import Breaker

log = logging.getLogger(__name__)

Step = Callable[[], None]

_STOOD_STILL_S = 1.0
"""By so much a wait has to be longer than asked for, to mean that this process was paused."""


def _nothing() -> None:
    pass


class Job:
    """Steps under way on a lane. `completed` of them are done, a number that stands once `Gate.finish` has returned."""

    def __init__(self, steps: Sequence[Step], now: float) -> None:
        self.steps = steps
        self.completed = 0
        self.begun = False
        self.abandoned = False
        self.moved_at = now
        self.error: Exception | None = None
        self.done = Event()


class Gate:
    """The way to one place: at most `lanes` jobs at once, each step of which may take `timeout_s` seconds.

    With no lanes, jobs run in the caller's thread: for places that cannot hang. A job that fails or stops moving closes
    the gate; `probe`, called now and then on a thread of its own, opens it again when it returns. `interrupt` is called
    for a job that is given up and should make its step end.
    """

    def __init__(
        self,
        place: str,
        *,
        lanes: int,
        timeout_s: float,
        classify: Callable[[Exception], Fault],
        probe: Step,
        interrupt: Step = _nothing,
        clock: Clock | None = None,
    ) -> None:
        self.closed = False
        self.lanes = lanes
        self._place = place
        self._timeout_s = timeout_s
        self._classify = classify
        self._probe = probe
        self._interrupt = interrupt
        self._clock = clock or WallClock()
        self._breaker = Breaker(self._clock)
        self._lock = Lock()
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = 0
        self._outstanding = 0
        self._moved_at = 0.0
        """When any job last completed a step: one that waits behind it is waiting for something that works."""

    @property
    def busy(self) -> bool:
        """A lane is at a job, one that was given up perhaps."""
        with self._lock:
            return self._outstanding > 0

    def is_open(self) -> bool:
        """Whether a job may begin; while the place is spared, asking has it probed when that is due."""
        with self._lock:
            return self._is_open()

    def _is_open(self) -> bool:
        if self.closed:
            return False
        if self._breaker.take_probe() and not _spawn(self._run_probe, f"{self._place} probe"):
            self._breaker.probed(False)
        return not self._breaker.open

    def start(self, steps: Sequence[Step]) -> Job | None:
        """Begin a job, to be told to `finish`; None if the gate is shut or closed."""
        with self._lock:
            if not self._is_open():
                return None
            job = Job(steps, self._clock.now())
            if self.lanes:
                if not self._has_lane():
                    return None
                self._outstanding += 1
                self._queue.put(job)
        if not self.lanes:
            self._work(job)
        return job

    def finish(self, job: Job) -> Fault | None:
        """Wait for a job to end or to stop moving; None if all its steps are done."""
        while not self._ends_within(job, max(0.0, self._deadline(job) - self._clock.now())):
            with self._lock:
                if self._clock.now() < self._deadline(job):
                    continue
                job.abandoned = True
                fault = Fault.SLOW if job.begun else Fault.BUSY
                self._shut(fault)
            self._interrupt()
            return fault
        if job.error is None:
            return None
        fault = self._classify(job.error)
        with self._lock:
            self._shut(fault, short(str(job.error)))
        return fault

    def _ends_within(self, job: Job, seconds: float) -> bool:
        """Wait for a job, and once more if this process itself was paused meanwhile: that is not the place's doing."""
        begun = monotonic()
        ended = job.done.wait(seconds)
        if not ended and monotonic() - begun - seconds > _STOOD_STILL_S:
            ended = job.done.wait(self._timeout_s)
        return ended

    def close(self) -> None:
        """Take no more jobs and interrupt those under way. Idempotent."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for _ in range(self._threads):
                self._queue.put(None)
        self._interrupt()

    def _has_lane(self) -> bool:
        """Whether there is a thread for one more job, a new one if need and limit be."""
        if self._threads < self.lanes and self._threads <= self._outstanding:
            self._threads += _spawn(self._run_lane, self._place)
        return self._threads > 0

    def _deadline(self, job: Job) -> float:
        moved_at = job.moved_at if job.begun else max(job.moved_at, self._moved_at)
        return moved_at + self._timeout_s

    def _shut(self, fault: Fault, why: str = "") -> None:
        if not self._breaker.open and not self.closed:
            reason = f"{fault} ({why})" if why else fault
            log.warning("KV store: %s is %s; doing without it until it answers again", self._place, reason)
        self._breaker.failed()

    def _run_lane(self) -> None:
        while (job := self._queue.get()) is not None:
            self._work(job)
            with self._lock:
                self._outstanding -= 1

    def _work(self, job: Job) -> None:
        for step in job.steps:
            with self._lock:
                if job.abandoned:
                    break
                job.begun, job.moved_at = True, self._clock.now()
            try:
                step()
            except Exception as error:
                job.error = error
                break
            with self._lock:
                self._moved_at = job.moved_at = self._clock.now()
                job.completed += not job.abandoned
        job.done.set()

    def _run_probe(self) -> None:
        try:
            self._probe()
        except Exception:
            succeeded = False
        else:
            succeeded = True
            log.info("KV store: %s answers again", self._place)
        with self._lock:
            self._breaker.probed(succeeded)


def _spawn(target: Step, name: str) -> bool:
    """Start a daemon thread; False if the machine has no more of them."""
    try:
        Thread(target=target, name=f"kv-store {name}", daemon=True).start()
    except RuntimeError:
        return False
    return True
