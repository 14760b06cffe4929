"""What one turn of the event loop writes to a client leaves in one piece, and nothing of it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bascule.api.connection import GatheringTransport


class Wire(asyncio.Transport):
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 7)})
        self.sent: list[bytes] = []
        self.closing = False

    def write(self, data: object) -> None:
        assert not self.closing, "written after the end"
        self.sent.append(bytes(data))  # type: ignore[call-overload]

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing


def run(script: Callable[[GatheringTransport, Wire], object]) -> Wire:
    async def work() -> Wire:
        wire = Wire()
        await script(GatheringTransport(wire, asyncio.get_running_loop()), wire)  # type: ignore[misc]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return wire

    return asyncio.run(work())


def test_writes_of_one_turn_leave_together_and_those_of_the_next_on_their_own() -> None:
    async def script(transport: GatheringTransport, wire: Wire) -> None:
        transport.write(b"status ")
        transport.write(b"chunk")
        assert wire.sent == []
        await asyncio.sleep(0)
        assert wire.sent == [b"status chunk"]
        transport.write(b"next")

    assert run(script).sent == [b"status chunk", b"next"]


def test_what_was_written_before_closing_is_sent() -> None:
    async def script(transport: GatheringTransport, wire: Wire) -> None:
        transport.write(b"last words")
        transport.close()

    wire = run(script)
    assert (wire.sent, wire.closing) == ([b"last words"], True)


def test_what_is_written_to_a_connection_that_has_gone_is_dropped() -> None:
    async def script(transport: GatheringTransport, wire: Wire) -> None:
        transport.write(b"too late")
        transport.abort()

    assert run(script).sent == []


def test_all_else_is_the_transports_own() -> None:
    async def script(transport: GatheringTransport, wire: Wire) -> None:
        assert transport.get_extra_info("peername") == ("127.0.0.1", 7)
        assert not transport.is_closing()

    run(script)
