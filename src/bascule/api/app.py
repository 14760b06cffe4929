"""The public HTTP application: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from bascule.api.body import Bodies
from bascule.api.chat import read_chat
from bascule.api.completions import read_completion
from bascule.api.context import Context
from bascule.api.endpoint import TokenEndpoint
from bascule.api.errors import unknown_path
from bascule.api.guard import KeyGuard
from bascule.api.identity import IdentityMiddleware
from bascule.api.openapi import PATH, api_document
from bascule.api.parameters import unknown_model
from bascule.observe.metrics import CONTENT_TYPE
from bascule.types import ModelCard


def create_app(context: Context, keys: Sequence[str] = ()) -> ASGIApp:
    """The application that clients talk to; with `keys`, those that bring one."""
    probes = Probes(context)
    bodies = Bodies(context.max_body)
    models = Models(context)

    async def document(_request: Request) -> Response:
        return json_response(api_document(context.backend.card))

    routes = [
        Route("/v1/completions", TokenEndpoint(context, read_completion, bodies), methods=["POST"]),
        Route("/v1/chat/completions", TokenEndpoint(context, read_chat, bodies), methods=["POST"]),
        Route("/v1/models", models.list),
        Route("/v1/models/{model:path}", models.get),
        Route("/health", probes.health),
        Route("/ready", probes.ready),
        Route("/metrics", probes.metrics),
        Route(PATH, document),
    ]
    return application(routes, keys)


def application(routes: Sequence[BaseRoute], keys: Sequence[str] = (), name: str = "This server") -> ASGIApp:
    """An application whose every response has a request id, and whose every error has OpenAI's shape.

    A router and one layer around it: Starlette's application would wrap every chunk's `send` in two more.
    """

    async def refuse_path(scope: Scope, receive: Receive, send: Send) -> None:
        await unknown_path(Request(scope).url.path)(scope, receive, send)

    router = Router(routes, redirect_slashes=False, default=refuse_path)
    return IdentityMiddleware(KeyGuard(router, keys, name) if keys else router)


def json_response(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def health(_request: Request) -> Response:
    """200 while the process lives, whatever the workers do."""
    return json_response({"status": "ok"})


class Probes:
    """What load balancers, orchestrators and Prometheus ask."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.health = health

    async def ready(self, _request: Request) -> Response:
        """200 while requests can be placed, else 503 with the reason."""
        self._context.check_ready()
        return json_response({"status": "ready"})

    async def metrics(self, _request: Request) -> Response:
        return Response(self._context.metrics.exposition(), headers={"content-type": CONTENT_TYPE})


class Models:
    """OpenAI's list of models, which here has one, or none before the first worker has registered."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._created = int(time.time())

    async def list(self, _request: Request) -> Response:
        card = self._context.backend.card
        return json_response({"object": "list", "data": [] if card is None else [self._entry(card)]})

    async def get(self, request: Request) -> Response:
        card = self._context.served().card
        name = request.path_params["model"]
        if name != card.name:
            raise unknown_model(name, card)
        return json_response(self._entry(card))

    def _entry(self, card: ModelCard) -> dict[str, object]:
        return {
            "id": card.name,
            "object": "model",
            "created": self._created,
            "owned_by": "bascule",
            "max_model_len": card.context,
        }
