"""Which transports a worker offers and uses, in order of preference."""

from __future__ import annotations

from collections.abc import Mapping

from bascule.kv.arena import Arena
from bascule.kv.codecs.base import Codec
from bascule.kv.transfer.base import OnSafe, Receiver, Sender
from bascule.kv.transfer.shm import ShmReceiver, ShmSender
from bascule.kv.transfer.tcp import TcpReceiver, TcpSender

TRANSPORTS = ("shm", "tcp")


def open_receivers(
    arena: Arena, transfer: str, host: str, on_safe: OnSafe, codecs: Mapping[str, Codec] = {}
) -> dict[str, Receiver]:
    """The receivers for `transfer`: `auto` for all, or one by name; tcp listens on `host` and allows `codecs`."""
    receivers: dict[str, Receiver] = {}
    if transfer in ("auto", "shm"):
        receivers["shm"] = ShmReceiver(arena, on_safe)
    if transfer in ("auto", "tcp"):
        receivers["tcp"] = TcpReceiver(arena, on_safe, host, codecs=codecs)
    return receivers


def open_senders(arena: Arena, transfer: str) -> dict[str, Sender]:
    """The senders for `transfer`, by transport."""
    senders: dict[str, Sender] = {}
    if transfer in ("auto", "shm"):
        senders["shm"] = ShmSender(arena)
    if transfer in ("auto", "tcp"):
        senders["tcp"] = TcpSender(arena)
    return senders
