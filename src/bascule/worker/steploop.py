"""The worker's own thread for engine steps: nothing else runs in it, and nothing else waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from bascule.engine.core import Engine, StepResult
from bascule.wire import TokenItem

log = logging.getLogger(__name__)

_IDLE_CHECK_S = 0.5


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


class StepLoop:
    """Steps the engine while there is work; when idle, audits its books now and then.

    `on_result` is called in this thread after each step that brought something; `on_failure` if the loop itself fails:
    a worker that steps no more must not go on as if it did.
    """

    def __init__(
        self, engine: Engine, on_result: Callable[[StepResult], None], on_failure: Callable[[Exception], None]
    ) -> None:
        self.violations: list[str] = []
        """What the last audit found; must be empty."""
        self._engine = engine
        self._on_result = on_result
        self._on_failure = on_failure
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something may have become runnable."""
        self._wake.set()

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
                if result.executed:
                    self._on_result(result)
                audited = False
            elif not self._wake.wait(_IDLE_CHECK_S) and not audited:
                self.violations = self._engine.check_integrity()
                for violation in self.violations:
                    log.error("integrity: %s", violation)
                audited = True
