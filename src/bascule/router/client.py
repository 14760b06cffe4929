"""How the router talks to one worker, whatever that worker is."""

from __future__ import annotations

from typing import Protocol

from bascule.router.link import RouterLink
from bascule.types import Epoch, RequestId
from bascule.wire import Cancel, Stop, Submit


class WorkerClient(Protocol):
    """Sends never block and never fail: a worker that is gone is noticed by its heartbeats."""

    def submit(self, submission: Submit) -> None: ...

    def cancel(self, request: RequestId, attempt: int) -> None: ...

    def stop(self) -> None: ...


class NativeClient:
    """A Bascule worker at the other end of the router's socket."""

    def __init__(self, link: RouterLink, epoch: Epoch) -> None:
        self._link = link
        self._epoch = epoch

    def submit(self, submission: Submit) -> None:
        self._link.send(self._epoch, submission)

    def cancel(self, request: RequestId, attempt: int) -> None:
        self._link.send(self._epoch, Cancel(request, attempt))

    def stop(self) -> None:
        self._link.send(self._epoch, Stop())
