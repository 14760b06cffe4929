"""`/admin/workers`: single workers drained, resumed and used in another role; `/admin/links`: links measured;
`/admin/reload`: all workers started anew."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from bascule.api.app import json_response
from bascule.api.body import read_object
from bascule.api.fields import check_integer, check_number, check_text, wrong_value
from bascule.link_wire import LINK_TRANSPORTS, MOST_LINK_BYTES, MOST_RUNS
from bascule.router.backend import LinkEnds, Operations
from bascule.types import Role, WorkerId, WorkerStatus

_MOST_BODY = 4096
"""Bytes."""
_MOST_TIMEOUT_S = 1e6


def operation_routes(operations: Operations) -> list[BaseRoute]:
    """The routes for the admin application. Those of a worker answer with it as in `/admin/state`."""

    async def drain(request: Request) -> Response:
        return json_response(worker_fields(operations.drain(_worker(request), await _timeout(request))))

    async def resume(request: Request) -> Response:
        await _fields(request)
        return json_response(worker_fields(operations.resume(_worker(request))))

    async def role(request: Request) -> Response:
        given = await _fields(request, "role")
        chosen = next((role for role in Role if role == given.get("role")), None)
        if chosen is None:
            raise wrong_value("role", f"must be one of {', '.join(Role)}.")
        return json_response(worker_fields(operations.set_role(_worker(request), chosen)))

    async def link(request: Request) -> Response:
        given = await _fields(request, "from", "to", "transport", "bytes", "runs")
        transport = given.get("transport")
        if transport not in LINK_TRANSPORTS:
            raise wrong_value("transport", f"must be one of {', '.join(LINK_TRANSPORTS)}.")
        ends = LinkEnds(
            WorkerId(check_text("from", given.get("from"))), WorkerId(check_text("to", given.get("to"))), str(transport)
        )
        size = check_integer("bytes", given.get("bytes", 8 << 20), 1, MOST_LINK_BYTES)
        runs = check_integer("runs", given.get("runs", 5), 1, MOST_RUNS)
        return json_response(await operations.measure_link(ends, size, runs))

    async def reload(request: Request) -> Response:
        if request.method == "POST":
            return json_response(operations.reload(await _timeout(request)))
        return json_response(operations.reload_status())

    return [
        Route("/admin/reload", reload, methods=["GET", "POST"]),
        Route("/admin/links", link, methods=["POST"]),
        *(
            Route(f"/admin/workers/{{id:path}}/{name}", call, methods=["POST"])
            for name, call in (("drain", drain), ("resume", resume), ("role", role))
        ),
    ]


def worker_fields(worker: WorkerStatus) -> dict[str, object]:
    """A worker's fields and those of its load, side by side."""
    load = {name: getattr(worker.load, name) for name in worker.load.__struct_fields__}
    status = {name: getattr(worker, name) for name in worker.__struct_fields__ if name != "load"}
    return {**status, **load}


def _worker(request: Request) -> WorkerId:
    return WorkerId(request.path_params["id"])


async def _timeout(request: Request) -> float | None:
    """The only field of the body (seconds), which may be left out."""
    given = (await _fields(request, "timeout")).get("timeout")
    return None if given is None else check_number("timeout", given, 0, _MOST_TIMEOUT_S)


async def _fields(request: Request, *names: str) -> dict[str, object]:
    """The body's fields, none where there is no body; raises InvalidRequest for one that is not among `names`.

    A browser says which page a request is from, and no page has any business here.
    """
    if (page := request.headers.get("origin")) is not None:
        raise wrong_value("Origin", f"is {page[:64]!r}: nothing is asked of workers from web pages; use bascule admin.")
    given = await read_object(request, _MOST_BODY, empty=True)
    for name in given:
        if name not in names:
            known = f"there is only {', '.join(names)}" if names else "leave the body out"
            raise wrong_value(name[:64], f"is not known here; {known}.")
    return given
