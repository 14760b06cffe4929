"""The operator's HTTP application, on a port of its own: the cluster's state, its workers, its decisions."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from bascule.api.app import application, health, json_response
from bascule.api.decisions import decision_routes
from bascule.api.openapi import PATH, admin_document
from bascule.api.operations import operation_routes, worker_fields
from bascule.observe.decisions import DecisionRecords
from bascule.observe.state import ClusterState
from bascule.router.backend import Backend, Operations


def create_admin_app(
    backend: Backend, records: DecisionRecords, operations: Operations, keys: Sequence[str] = ()
) -> ASGIApp:
    """The application that operators and scripts talk to; with `keys`, those that bring one."""

    async def state(_request: Request) -> Response:
        return json_response(_state_fields(backend.state()))

    async def document(_request: Request) -> Response:
        return json_response(admin_document())

    routes = [Route("/admin/state", state), *operation_routes(operations), *decision_routes(records)]
    return application([*routes, Route("/health", health), Route(PATH, document)], keys, "The admin API")


def _state_fields(state: ClusterState) -> dict[str, object]:
    return {
        "queued": state.queued,
        "active": state.active,
        "integrity_violations": state.integrity_violations,
        "workers": [worker_fields(worker) for worker in state.workers],
    }
