"""How the router talks to one worker, whatever that worker is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bascule.router.link import RouterLink
from bascule.types import Epoch, RequestId, WorkerId
from bascule.wire import Cancel, Stop, Submit


class WorkerClient(Protocol):
    """Sends never block. A submission that cannot be sent is reported; all else is noticed by missing heartbeats."""

    def submit(self, submission: Submit) -> None: ...

    def cancel(self, request: RequestId, attempt: int) -> None: ...

    def stop(self) -> None: ...


class NativeClient:
    """A Bascule worker at the other end of the router's socket."""

    def __init__(
        self, link: RouterLink, worker: WorkerId, epoch: Epoch, on_unsent: Callable[[WorkerId, Submit], None]
    ) -> None:
        self._link = link
        self._worker = worker
        self._epoch = epoch
        self._on_unsent = on_unsent

    def submit(self, submission: Submit) -> None:
        self._link.send(self._epoch, submission, lambda: self._on_unsent(self._worker, submission))

    def cancel(self, request: RequestId, attempt: int) -> None:
        self._link.send(self._epoch, Cancel(request, attempt))

    def stop(self) -> None:
        self._link.send(self._epoch, Stop())
