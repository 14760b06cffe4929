"""Bodies of requests: what all of them hold together is bounded, and given back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import pytest
from api_rig import WAIT, ApiRig
from starlette.requests import Request
from starlette.types import Message, Receive

from bascule.api import body
from bascule.api.body import SMALL_BYTES, Bodies, Share, read_object
from bascule.api.completions import read_completion
from bascule.api.endpoint import TokenEndpoint
from bascule.errors import Overloaded, TooLarge

LIMIT = 1 << 20
ROOM = 2 * LIMIT - 2 * LIMIT // 8
"""For bodies that are not small."""


@pytest.fixture(autouse=True)
def most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all bodies no more than twice what one may have."""
    monkeypatch.setattr(body, "MOST_BYTES", 0)


def receives(*parts: bytes, ends: bool = True) -> Receive:
    """A client that sends that, and then nothing more."""
    left: Iterator[tuple[int, bytes]] = iter(enumerate(parts, 1))

    async def receive() -> Message:
        if (part := next(left, None)) is None:
            await asyncio.Event().wait()
            raise AssertionError
        return {"type": "http.request", "body": part[1], "more_body": part[0] < len(parts) or not ends}

    return receive


async def read(bodies: Bodies, *parts: bytes, ends: bool = True) -> tuple[Share, dict[str, object]]:
    request, share = Request({"type": "http", "headers": []}, receives(*parts, ends=ends)), Share(bodies)
    return share, await read_object(request, LIMIT, share)


def an_object(size: int) -> bytes:
    return b'{"x":"%b"}' % (b"x" * (size - 8))


def test_bodies_are_read_until_all_together_have_no_room() -> None:
    async def scenario() -> None:
        bodies = Bodies(LIMIT)
        slow = asyncio.create_task(read(bodies, b"{" * 1000, b"x" * (LIMIT - 2000), ends=False))
        share, found = await read(bodies, an_object(LIMIT // 2))
        await asyncio.sleep(0)
        assert len(str(found["x"])) == LIMIT // 2 - 8
        assert bodies.held == LIMIT - 1000 + LIMIT // 2
        left = ROOM - bodies.held
        with pytest.raises(Overloaded, match="send the request again") as refused:
            await read(bodies, b"{", b"x" * SMALL_BYTES, b"x" * left)
        assert (refused.value.code, refused.value.retry_after) == ("too_many_bodies", 1.0)
        share.release()
        share.release()
        slow.cancel()
        await asyncio.wait([slow])

    asyncio.run(scenario())


def test_small_bodies_have_room_when_larger_ones_have_none() -> None:
    async def scenario() -> None:
        bodies = Bodies(LIMIT)
        bodies.held = ROOM
        with pytest.raises(Overloaded):
            await read(bodies, an_object(SMALL_BYTES + 1))
        bodies.held = ROOM
        shares = [(await read(bodies, an_object(SMALL_BYTES)))[0] for _ in range(2 * LIMIT // 8 // SMALL_BYTES)]
        with pytest.raises(Overloaded):
            await read(bodies, an_object(SMALL_BYTES))
        for share in shares:
            share.release()
        assert bodies.held == ROOM

    asyncio.run(scenario())


def test_too_large_a_body_is_refused_before_it_is_counted() -> None:
    bodies = Bodies(LIMIT)
    with pytest.raises(TooLarge):
        asyncio.run(read(bodies, b"x" * LIMIT, b"x"))
    assert bodies.held == LIMIT, "until its share is released"


def test_a_body_is_given_back_when_it_is_refused_and_as_soon_as_it_is_checked() -> None:
    async def call(endpoint: TokenEndpoint, *parts: bytes) -> None:
        async def send(message: Message) -> None:
            pass

        scope = {"type": "http", "headers": [], "state": {"request_id": "r"}}
        await endpoint(scope, receives(*parts), send)

    with ApiRig(max_body=LIMIT) as rig:
        bodies = Bodies(LIMIT)
        endpoint = TokenEndpoint(rig.context, read_completion, bodies)
        with pytest.raises(TooLarge):
            rig.call(call(endpoint, b"x" * LIMIT, b"x"))
        assert bodies.held == 0
        rig.backend.start_blocked = True
        junk = {"model": "tiny", "prompt": "abc", "what is this": "x" * (LIMIT // 2)}
        asked = asyncio.run_coroutine_threadsafe(call(endpoint, json.dumps(junk).encode()), rig.loop)
        assert rig.backend.started.wait(WAIT)
        assert bodies.held == 0, "the call runs, and has no need of it"
        asked.cancel()
        assert rig.backend.start_cancelled.wait(WAIT)


def test_a_client_is_told_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held, add = [0], Bodies.add

    def noted(self: Bodies, more: int, size: int) -> None:
        add(self, more, size)
        held[0] = self.held

    monkeypatch.setattr(Bodies, "add", noted)
    with ApiRig(max_body=LIMIT) as rig, socket.create_connection(("127.0.0.1", rig.server.port), WAIT) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LIMIT)
        slow.sendall(b"x" * (LIMIT - 1))

        def status() -> int:
            return rig.http.post("/v1/chat/completions", content=b"x" * LIMIT).status_code

        rig.wait_for(lambda: held[0] == LIMIT - 1)  # or the slow one might be refused, as well as the others
        assert status() == 429
        refused = rig.http.post("/v1/chat/completions", content=b"x" * LIMIT)
        assert (refused.json()["error"]["code"], refused.headers["Retry-After"]) == ("too_many_bodies", "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert rig.complete().status_code == 200, "a small one"
        slow.close()
        rig.wait_for(lambda: status() == 400)
