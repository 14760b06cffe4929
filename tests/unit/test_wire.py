"""Bytes that were bent on their way are a message or a `WireError`, and nothing else."""

from __future__ import annotations

from contextlib import suppress

from bascule.peer_wire import HandoffRefused, from_peer
from bascule.types import TicketId
from bascule.wire import WireError, encode


def test_a_message_with_any_one_byte_changed_is_another_one_or_refused() -> None:
    data = encode(HandoffRefused(TicketId("a ticket"), "checksum", "the blocks that arrived are not those"))
    refused = 0
    for at in range(len(data)):
        for value in (0x00, 0x7F, 0xC1, 0xE6, 0xFF):
            with suppress(WireError):
                from_peer(data[:at] + bytes([value]) + data[at + 1 :])
                continue
            refused += 1
    assert refused > len(data)
