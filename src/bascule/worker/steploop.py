"""The worker's own thread for engine steps: nothing else runs in it, and nothing else waits for it."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable

from bascule.clock import Clock, WallClock
from bascule.engine.core import Engine, StepResult
from bascule.engine.work import UnderWay
from bascule.wire import TokenItem

log = logging.getLogger(__name__)

HUNG_EXIT = 70
"""What a worker's process ends with whose step did not."""
LOOK_S = 0.5
"""Between two looks at the running step."""

_IDLE_CHECK_S = 0.5
_TIMES, _LEAST_S = 20.0, 30.0
_FIRST_STEPS, _FIRST_S = 16, 300.0
"""Of a process: they may have to read the weights from a disk, or to compile."""


def items_of(result: StepResult) -> tuple[TokenItem, ...]:
    """A step's tokens as the router is told of them."""
    return tuple(
        TokenItem(
            output.request,
            output.attempt,
            output.position,
            output.token,
            output.cached_tokens,
            output.finish,
            output.logprobs,
        )
        for output in result.outputs
    )


def patience_s(step: UnderWay) -> float:
    """Seconds for which a step may run before it counts as one that never ends."""
    least_s = _LEAST_S if step.steps >= _FIRST_STEPS else _FIRST_S
    return max(least_s, _TIMES * step.expected_s)


class StepWatch:
    """For how long a step has run, by who looks at it each `LOOK_S`.

    A look that comes late adds no more than two that come in time: then this whole process was stopped, or did not get
    to run, and its step stood still as well.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._ran_s = 0.0
        self._looked_at = 0.0

    def look(self, step: UnderWay | None, now: float) -> float:
        """Seconds (of `now`, a clock's) that this step has been seen to run."""
        number = step.steps if step is not None else None
        if number is None or number != self._step:
            self._ran_s = 0.0
        else:
            self._ran_s += min(now - self._looked_at, 2 * LOOK_S)
        self._step, self._looked_at = number, now
        return self._ran_s


def end_process() -> None:
    """At once and whatever hangs, after telling where each thread is: one that hangs cannot be waited for."""
    faulthandler.dump_traceback()
    os._exit(HUNG_EXIT)


class StepLoop:
    """Steps the engine while there is work; when idle, audits its books now and then.

    `on_result` is called in this thread after each step that brought something; `on_failure` if the loop itself fails:
    a worker that steps no more must not go on as if it did. `on_hang` is called by `watch` if a step does not end.
    """

    def __init__(
        self,
        engine: Engine,
        on_result: Callable[[StepResult], None],
        on_failure: Callable[[Exception], None],
        on_hang: Callable[[], None] = end_process,
        clock: Clock = WallClock(),
    ) -> None:
        self.violations: list[str] = []
        """What the last audit found; must be empty."""
        self._engine = engine
        self._on_result = on_result
        self._on_failure = on_failure
        self._on_hang = on_hang
        self._clock = clock
        self._watch = StepWatch()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something may have become runnable."""
        self._wake.set()

    def watch(self) -> None:
        """Called each `LOOK_S` from another thread: end a worker whose step has run for far too long."""
        step = self._engine.under_way()
        ran_s = self._watch.look(step, self._clock.now())
        if step is not None and ran_s > patience_s(step):
            log.error(
                "a step over %d sequence(s) has run for %.0f s, and was expected to take %.3g s: it hangs (a kernel, a "
                "driver, weights mapped from a dead mount); ending this process, so that its requests go elsewhere",
                step.sequences,
                ran_s,
                step.expected_s,
            )
            self._on_hang()

    def stop(self, timeout: float) -> None:
        """End after the running step; waits for it at most `timeout` seconds."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception as error:
            log.exception("the step loop failed")
            self._on_failure(error)

    def _step_until_stopped(self) -> None:
        audited = False
        while not self._stopping:
            self._wake.clear()
            if self._engine.has_work():
                result = self._engine.step()
                if not result.is_empty:
                    self._on_result(result)
                audited = False
            elif not self._wake.wait(_IDLE_CHECK_S) and not audited:
                self.violations = self._engine.check_integrity()
                for violation in self.violations:
                    log.error("integrity: %s", violation)
                audited = True
