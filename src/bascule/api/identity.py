"""The outermost layer: gives every request an id, every response that id, and every exception OpenAI's shape."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bascule.api.context import REQUEST_ID, request_id_of
from bascule.api.errors import ClientGone, error_response, internal_error, let_go, wrong_method
from bascule.errors import RequestError

_HEADER = REQUEST_ID.lower().encode()

log = logging.getLogger(__name__)


class IdentityMiddleware:
    """ASGI middleware; the id is in `request.state.request_id` for what lies below."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        scope["app"] = self
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (_HEADER, request_id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone as gone:
            let_go(gone)
        except HTTPException as error:  # the router's way to say that a path has other methods
            answer = wrong_method(scope["method"], scope["path"], (error.headers or {}).get("Allow", ""))
            await answer(scope, receive, send_with_id)
        except RequestError as error:
            let_go(error)
            await error_response(error)(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            await error_response(internal_error(request_id))(scope, receive, send_with_id)
