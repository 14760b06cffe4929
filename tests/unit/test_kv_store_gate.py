"""Calls to a place that may hang are waited for while they progress, and not tried while it is out of order."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from threading import Event, Lock, Semaphore, current_thread
from time import monotonic, sleep

import pytest

from bascule.clock import Clock, VirtualClock
from bascule.kv.store.base import Fault
from bascule.kv.store.breaker import FIRST_PAUSE_S, MOST_PAUSE_S, Breaker
from bascule.kv.store.gate import Gate, Job, Step

WAIT = 20.0


class Stage:
    """A gate before a place that can be made to hang or to fail."""

    def __init__(self, lanes: int = 2, timeout_s: float = WAIT, clock: Clock | None = None) -> None:
        self.free = Event()
        self.hanging = Semaphore(0)
        self.well = True
        self.interrupted = 0
        self.probed = Event()
        self.done: list[int] = []
        self._lock = Lock()
        self.gate = Gate(
            "stage",
            lanes=lanes,
            timeout_s=timeout_s,
            classify=lambda error: Fault.GONE if isinstance(error, OSError) else Fault.BROKEN,
            probe=self._probe,
            interrupt=self._interrupt,
            clock=clock,
        )

    def hang(self) -> None:
        self.hanging.release()
        assert self.free.wait(WAIT)

    def note(self, number: int) -> Step:
        def step() -> None:
            with self._lock:
                self.done.append(number)

        return step

    def fail(self) -> None:
        raise OSError("broken")

    def begin(self, *steps: Step) -> Job:
        job = self.gate.start(steps)
        assert job is not None
        return job

    def _probe(self) -> None:
        self.probed.set()
        if not self.well:
            raise OSError("still broken")

    def _interrupt(self) -> None:
        self.interrupted += 1


@pytest.fixture
def stage() -> Iterator[Stage]:
    """One that waits long, for tests in which nothing hangs."""
    yield from used(Stage())


@pytest.fixture
def hasty() -> Iterator[Stage]:
    yield from used(Stage(timeout_s=0.2))


def used(stage: Stage) -> Iterator[Stage]:
    yield stage
    stage.free.set()
    stage.gate.close()


def dawdling(clock: VirtualClock) -> list[Step]:
    """Steps that take 0.1 s each by the clock, and some time by which whoever waits for them may look at it."""

    def step() -> None:
        clock.advance(0.1)
        sleep(0.05)

    return [step] * 13


def test_steps_are_done_in_order(stage: Stage) -> None:
    job = stage.begin(*map(stage.note, range(20)))
    assert stage.gate.finish(job) is None
    assert (job.completed, stage.done) == (20, list(range(20)))


def test_without_lanes_the_caller_does_the_work() -> None:
    stage = Stage(lanes=0)
    where: list[str] = []
    job = stage.begin(lambda: where.append(current_thread().name), stage.note(1))
    assert where == [current_thread().name]
    assert stage.gate.finish(job) is None
    assert stage.done == [1]


def test_a_step_that_hangs_is_given_up_and_what_follows_is_not_done(hasty: Stage) -> None:
    job = hasty.begin(hasty.note(1), hasty.hang, hasty.note(2))
    assert hasty.hanging.acquire(timeout=WAIT)
    began = monotonic()
    assert hasty.gate.finish(job) is Fault.SLOW
    assert monotonic() - began < WAIT / 2
    assert (job.completed, hasty.interrupted) == (1, 1)
    hasty.free.set()
    assert job.done.wait(WAIT)
    assert hasty.done == [1]
    assert job.completed == 1


def test_a_job_that_progresses_may_take_longer_than_the_timeout() -> None:
    clock = VirtualClock()
    stage = Stage(timeout_s=0.3, clock=clock)
    job = stage.begin(*dawdling(clock))
    assert stage.gate.finish(job) is None
    stage.gate.close()


def test_a_job_behind_others_that_progress_waits_its_turn() -> None:
    clock = VirtualClock()
    stage = Stage(lanes=1, timeout_s=0.3, clock=clock)
    first = stage.begin(*dawdling(clock))
    second = stage.begin(stage.note(1))
    assert stage.gate.finish(second) is None
    assert stage.gate.finish(first) is None
    stage.gate.close()


def test_a_job_behind_others_that_hang_is_given_up_too(hasty: Stage) -> None:
    hanging = [hasty.begin(hasty.hang) for _ in range(2)]
    assert all(hasty.hanging.acquire(timeout=WAIT) for _ in hanging)
    behind = hasty.begin(hasty.note(1))
    assert hasty.gate.finish(behind) is Fault.BUSY
    assert [hasty.gate.finish(job) for job in hanging] == [Fault.SLOW] * 2
    assert hasty.done == []


def test_after_a_failure_nothing_is_tried_until_a_probe_succeeds(stage: Stage) -> None:
    stage.well = False
    assert stage.gate.finish(stage.begin(stage.fail, stage.note(1))) is Fault.GONE
    assert stage.gate.start([stage.note(2)]) is None
    deadline = monotonic() + WAIT
    while not stage.probed.is_set():
        assert monotonic() < deadline
        assert stage.gate.start([stage.note(3)]) is None
        sleep(0.02)
    stage.well = True
    while (job := stage.gate.start([stage.note(4)])) is None:
        assert monotonic() < deadline
        sleep(0.02)
    assert stage.gate.finish(job) is None
    assert stage.done == [4]


def test_asking_whether_a_gate_is_open_has_the_place_probed(stage: Stage) -> None:
    assert stage.gate.is_open()
    stage.gate.finish(stage.begin(stage.fail))
    assert not stage.gate.is_open()
    deadline = monotonic() + WAIT
    while not stage.gate.is_open():
        assert monotonic() < deadline
        sleep(0.02)
    assert stage.probed.is_set()


def test_a_closed_gate_takes_nothing(stage: Stage) -> None:
    stage.gate.close()
    stage.gate.close()
    assert stage.gate.start([stage.note(1)]) is None
    assert stage.gate.closed and not stage.gate.is_open()


def test_probes_are_due_after_pauses_that_double_up_to_a_bound() -> None:
    clock = VirtualClock()
    breaker = Breaker(clock)
    assert not breaker.take_probe()
    breaker.failed()
    pause = FIRST_PAUSE_S
    for _ in range(8):
        breaker.failed()
        clock.advance(0.9 * pause)
        assert not breaker.take_probe()
        clock.advance(0.2 * pause)
        assert breaker.take_probe()
        assert not breaker.take_probe()
        breaker.probed(False)
        pause = min(2 * pause, MOST_PAUSE_S)
        assert breaker.open
    clock.advance(MOST_PAUSE_S)
    assert breaker.take_probe()
    breaker.probed(True)
    assert not breaker.open
    breaker.failed()
    clock.advance(FIRST_PAUSE_S)
    assert breaker.take_probe()


PAUSED = """
import sys, time
from bascule.kv.store.base import Fault
from bascule.kv.store.gate import Gate

gate = Gate("stage", lanes=1, timeout_s=0.5, classify=lambda error: Fault.BROKEN, probe=lambda: None)

def step():
    print("begun", flush=True)
    for _ in range(3):
        time.sleep(0.1)

job = gate.start([step])
print(gate.finish(job), flush=True)
"""


@pytest.mark.timeout(60)
def test_a_place_is_not_blamed_for_a_pause_of_the_process_itself() -> None:
    """A machine that is busy may let the step itself take too long; but not every time."""
    ends: list[str] = []
    while "None" not in ends and len(ends) < 5:
        with subprocess.Popen([sys.executable, "-c", PAUSED], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGSTOP)
            sleep(2.5)
            process.send_signal(signal.SIGCONT)
            ends.append(process.stdout.readline().strip())
    assert ends[-1] == "None", ends
