"""Handoffs and fetches over sealed connections: what somebody on the way changes costs a second try, never a token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_rig import BLOCK, reference
from fetch_rig import Two, play, prompt_of
from handoff_rig import PROMPT, SAMPLING, pair, verdicts

from bascule.kv.transfer.frames import Buffers, Kind
from bascule.kv.transfer.tcp_sender import TcpSession

Bend = Callable[[bytes], bytes]
BENDS: dict[str, Bend] = {
    "forged": lambda data: bytes(len(data)),
    "changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "repeated": lambda data: data + data,
}


@pytest.fixture
def bent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """The first write is bent on its way; it is in the list, once it is."""
    send, done = TcpSession._send, list[Kind]()

    def bending(self: TcpSession, kind: Kind, memory: Buffers) -> None:
        if kind is Kind.WRITE and not done:
            done.append(kind)
            memory = Buffers([memoryview(BENDS[request.param](b"".join(memory.pending())))])
        send(self, kind, memory)

    monkeypatch.setattr(TcpSession, "_send", bending)
    return done


@pytest.mark.parametrize("bent", BENDS, indirect=True)
def test_a_handoff_that_is_tampered_with_is_counted_and_done_again(bent: list[Kind]) -> None:
    with pair("sealed") as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert bent and verdicts(both) == ["aborted", "accepted"]
        assert both.grants.not_authentic == {"forged": 1}


@pytest.mark.parametrize("bent", BENDS, indirect=True)
def test_a_fetch_that_is_tampered_with_is_counted_and_the_prompt_is_computed(bent: list[Kind]) -> None:
    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 0
        assert bent and two.fetches.figures().failed == {"refused": 1}
        assert two.grants.not_authentic == {"forged": 1}
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 10, "the next one is left alone"
        assert two.compute(0, [*prompt_of(1), 7]) == 10 * BLOCK

    play(scenario, "sealed")
