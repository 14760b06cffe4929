"""`/admin/decisions`: the decision records of the latest requests, by the id that their clients know."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from bascule.api.app import json_response
from bascule.api.fields import wrong_value
from bascule.errors import NotFound
from bascule.observe.decision_fields import record_fields, summary_fields
from bascule.observe.decisions import KEPT, REFUSED_KEPT, DecisionRecords, Record

_LISTED = 20
_AT_ONCE = 100
"""Records that are read before other requests have their turn again: a few milliseconds."""


def decision_routes(records: DecisionRecords) -> list[BaseRoute]:
    """The routes for the admin application."""

    async def latest(request: Request) -> Response:
        limit = _limit(request.query_params.get("limit"))
        listed = []
        for record in records.latest(limit):
            listed.append(summary_fields(record))
            if len(listed) % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return json_response({"decisions": listed})

    async def one(request: Request) -> Response:
        request_id = request.path_params["id"]
        outputs = _latest_call(records.find(request_id))
        if not outputs:
            raise NotFound(
                f"No decision is known for request {request_id[:200]!r}; the latest {KEPT} requests since the router "
                f"started are kept, and the latest {REFUSED_KEPT} that were answered 429. Use the X-Request-Id of a "
                "response, or see GET /admin/decisions for the latest ids.",
                code="unknown_request",
            )
        fields = [record_fields(record) for record in outputs]
        return json_response({**fields[0], "outputs": fields})

    return [Route("/admin/decisions", latest), Route("/admin/decisions/{id:path}", one)]


def _latest_call(found: list[Record]) -> list[Record]:
    """The outputs of the latest of several calls with one id, by their place in the answer."""
    if not found:
        return []
    call = _call(found[-1])
    return sorted((record for record in found if _call(record) == call), key=lambda record: record.output)


def _call(record: Record) -> str:
    """What the backend's ids of one call's outputs have in common."""
    return record.id.removesuffix(f"-{record.output}")


def _limit(given: str | None) -> int:
    if given is None:
        return _LISTED
    if not (given.isascii() and given.isdigit() and len(given) < 10 and 0 < int(given) <= KEPT):
        raise wrong_value("limit", f"must be a whole number from 1 to {KEPT}, not {given[:40]!r}.")
    return int(given)
