"""Blocks of this worker that a peer may write: none is used again while a late write to it is possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from bascule.kv.books import Lease
from bascule.kv.transfer.base import Grant, Receiver
from bascule.kv.transfer.frames import Verdict
from bascule.peer_wire import TransferEndpoint
from bascule.types import TicketId

_NOT_AUTHENTIC = (Verdict.FORGED.words, Verdict.NOT_SEALED.words)


class Grants:
    """Tickets that are open at the receivers, and the leases of revoked ones. Runs in the asyncio loop."""

    def __init__(self) -> None:
        self.receivers: Mapping[str, Receiver] = {}
        """By transport, in order of preference; set before the first message."""
        self._quarantined: dict[TicketId, Lease] = {}

    @property
    def not_authentic(self) -> Counter[str]:
        """Writers that were turned away because nobody with the cluster's key can have sent what came, by reason."""
        found: Counter[str] = Counter()
        for receiver in self.receivers.values():
            found.update({reason: receiver.refusals.get(reason, 0) for reason in _NOT_AUTHENTIC})
        return +found

    @property
    def tcp_addresses(self) -> tuple[str, ...]:
        """Where other hosts connect to, `host:port`."""
        endpoints = [receiver.endpoint for receiver in self.receivers.values()]
        return tuple(endpoint.address for endpoint in endpoints if endpoint.transport == "tcp")

    def open(self, ticket: TicketId, secret: bytes, lease: Lease) -> tuple[TransferEndpoint, ...]:
        """Let whoever knows `secret` write the lease's fresh blocks; says where."""
        grant = Grant(ticket, secret, tuple(lease.blocks[lease.cached :]))
        for receiver in self.receivers.values():
            receiver.open(grant)
        endpoints = [receiver.endpoint for receiver in self.receivers.values()]
        return tuple(TransferEndpoint(each.transport, each.address, each.machine) for each in endpoints)

    def finish(self, ticket: TicketId) -> None:
        """The normal end: the writer has said that all is written."""
        for receiver in self.receivers.values():
            receiver.finish(ticket)

    def give_back(self, ticket: TicketId, lease: Lease) -> bool:
        """Let go of a lease that was granted.

        False: its writer may still write, and is to be told `Revoked`; the blocks stay out of use until `safe`.
        """
        lease.quarantine()
        safe = [receiver.revoke(ticket) for receiver in self.receivers.values()]
        if all(safe):
            lease.lift()
            return True
        self._quarantined[ticket] = lease
        return False

    def closed(self, ticket: TicketId) -> bool:
        """The writer says that it writes no more; True if that sets blocks free."""
        for receiver in self.receivers.values():
            receiver.closed(ticket)
        return self.safe(ticket)

    def safe(self, ticket: TicketId) -> bool:
        """No late write is possible any more: the blocks leave quarantine. False if they were not there."""
        lease = self._quarantined.pop(ticket, None)
        if lease is not None:
            lease.lift()
        return lease is not None

    def holds(self, ticket: TicketId) -> bool:
        """Whether its blocks are in quarantine."""
        return ticket in self._quarantined

    def close(self) -> None:
        for receiver in self.receivers.values():
            receiver.close()
