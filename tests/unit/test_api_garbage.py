"""Requests that end with an error leave nothing that only the garbage collector would find."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from api_rig import SLO, ByteTokenizer
from test_router_service import Bench, item, settle

from bascule.api.app import create_app
from bascule.api.context import Context
from bascule.observe.metrics import Metrics
from bascule.types import Epoch, Role, WorkerId
from bascule.wire import Failed

REQUESTS = 20
BODY = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 4, "stream": True}).encode()


class Site(Bench):
    """The application over a service with one worker."""

    def __init__(self, **routing: Any) -> None:
        super().__init__({"a": Role.MIXED}, policy="single", **routing)
        context = Context(
            backend=self.service,
            tokenizer=ByteTokenizer(),
            clock=self.clock,
            metrics=Metrics(self.service.state, self.clock),
            timeout=60.0,
            max_body=1 << 20,
            slo=SLO,
        )
        self.app = create_app(context)


class Client:
    """One HTTP request for a stream."""

    def __init__(self, site: Site, name: str) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._body: bytes | None = BODY
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"x-request-id", name.encode()), (b"content-type", b"application/json")],
            "query_string": b"",
            "root_path": "",
        }
        self.answered = asyncio.create_task(site.app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


async def refused(site: Site, name: str) -> None:
    client = Client(site, name)
    await client.answered
    assert client.sent[0]["status"] == 429


async def late(site: Site, name: str) -> None:
    client = Client(site, name)
    await settle()
    site.clock.advance(61.0)
    site.service.tick()
    await client.answered
    assert client.sent[0]["status"] == 504


async def left(site: Site, name: str) -> None:
    client = Client(site, name)
    await settle()
    assert site.service.active == 1
    client.gone.set()
    await client.answered
    assert client.sent == [] and site.service.active == 0


async def failed_in_its_stream(site: Site, name: str) -> None:
    client = Client(site, name)
    await settle()
    (backend_id,) = site.service._flights
    site.tokens("a", item(0, 7, name=backend_id))
    await settle()
    failure = Failed(
        worker=WorkerId("a"), epoch=Epoch("a-1"), request=backend_id, attempt=0, message="broken", retryable=False
    )
    site.service.failed(failure)
    await client.answered
    assert client.sent[0]["status"] == 200 and b"broken" in client.sent[-1]["body"]


@pytest.mark.parametrize("end", [refused, late, left, failed_in_its_stream])
def test_an_error_leaves_no_circle_of_objects(end: Callable[[Site, str], Awaitable[None]]) -> None:
    async def work() -> int:
        site = Site(queue_limit=0 if end is refused else 9)
        others = [site.start(f"other{number}") for number in range(4 if end is refused else 0)]
        await settle()
        await end(site, "first")  # what is imported or made once
        gc.collect()
        gc.disable()
        try:
            for number in range(REQUESTS):
                await end(site, f"r{number}")
            await settle()
            found = gc.collect()
        finally:
            gc.enable()
        for other in others:
            other.cancel()
        return found

    assert asyncio.run(work()) < REQUESTS, "each request leaves something"
