"""Which transports a worker offers and uses, in order of preference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bascule.kv.arena import Arena
from bascule.kv.codecs.base import Codec
from bascule.kv.transfer.base import Endpoint, OnSafe, Receiver, Sender, Session, TransferError
from bascule.kv.transfer.shm import ShmReceiver, ShmSender
from bascule.kv.transfer.tcp import TcpReceiver
from bascule.kv.transfer.tcp_sender import TcpSender
from bascule.types import TicketId

TRANSPORTS = ("shm", "tcp")


def open_receivers(
    arena: Arena,
    transfer: str,
    host: str,
    on_safe: OnSafe,
    codecs: Mapping[str, Codec] = {},
    key: bytes | None = None,
) -> dict[str, Receiver]:
    """The receivers for `transfer`: `auto` for all, or one by name; tcp listens on `host`, allows `codecs`, and takes
    nothing that is not sealed where there is a `key` (`keys.ClusterKey.transfers`)."""
    receivers: dict[str, Receiver] = {}
    if transfer in ("auto", "shm"):
        receivers["shm"] = ShmReceiver(arena, on_safe)
    if transfer in ("auto", "tcp"):
        receivers["tcp"] = TcpReceiver(arena, on_safe, host, codecs=codecs, key=key)
    return receivers


def open_senders(arena: Arena, transfer: str, key: bytes | None = None) -> dict[str, Sender]:
    """The senders for `transfer`, by transport; with a `key` tcp seals."""
    senders: dict[str, Sender] = {}
    if transfer in ("auto", "shm"):
        senders["shm"] = ShmSender(arena)
    if transfer in ("auto", "tcp"):
        senders["tcp"] = TcpSender(arena, key=key)
    return senders


def open_session(
    senders: Mapping[str, Sender], endpoints: Iterable[Endpoint], ticket: TicketId, secret: bytes
) -> Session:
    """A session by the first of the peer's `endpoints` that works from here; blocks.

    Raises TransferError with what is wrong with each, if none does.
    """
    errors = []
    for endpoint in endpoints:
        if (sender := senders.get(endpoint.transport)) is not None:
            try:
                return sender.open(endpoint, ticket, secret)
            except (TransferError, TimeoutError) as error:
                errors.append(f"{endpoint.transport}: {error}")
    raise TransferError("; ".join(errors) or "the two workers have no transport in common; check --transfer on both")
