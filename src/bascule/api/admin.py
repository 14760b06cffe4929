"""The operator's HTTP application, on a port of its own: the cluster's state, and why requests went where they did."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from bascule.api.app import application, health, json_response
from bascule.api.decisions import decision_routes
from bascule.observe.decisions import DecisionRecords
from bascule.router.backend import Backend
from bascule.types import ClusterState, WorkerStatus


def create_admin_app(backend: Backend, records: DecisionRecords, keys: Sequence[str] = ()) -> ASGIApp:
    """The application that operators and scripts talk to; with `keys`, those that bring one."""

    async def state(_request: Request) -> Response:
        return json_response(_state_fields(backend.state()))

    return application([Route("/admin/state", state), *decision_routes(records), Route("/health", health)], keys)


def _state_fields(state: ClusterState) -> dict[str, object]:
    return {
        "queued": state.queued,
        "active": state.active,
        "integrity_violations": sum(worker.load.integrity_violations for worker in state.workers),
        "workers": [_worker_fields(worker) for worker in state.workers],
    }


def _worker_fields(worker: WorkerStatus) -> dict[str, object]:
    """A worker's fields and those of its load, side by side."""
    load = {name: getattr(worker.load, name) for name in worker.load.__struct_fields__}
    status = {name: getattr(worker, name) for name in worker.__struct_fields__ if name != "load"}
    return {**status, **load}
