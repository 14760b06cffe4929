"""The router's picture of the cluster: a plain state that events are applied to; no sockets, no clock of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from bascule.errors import RegistrationRefused
from bascule.kv.prefix_index import PrefixIndex
from bascule.router.kv_feed import KvFeed
from bascule.types import Epoch, ModelCard, Placement, Snapshot, Tier, WorkerId, WorkerLoad, WorkerStatus, WorkerView
from bascule.wire import VERSION, Register


@dataclass(slots=True)
class Member:
    """One registered worker, with what the router itself has placed on it since it registered."""

    registration: Register
    last_seen: float
    row: int
    """Its place in the prefix index; given to another worker once it has left."""
    kv: KvFeed
    load: WorkerLoad = field(default_factory=WorkerLoad)
    suspect: bool = False
    prefilling: int = 0
    prefill_tokens: int = 0
    decoding: int = 0

    @property
    def id(self) -> WorkerId:
        return self.registration.worker

    @property
    def epoch(self) -> Epoch:
        return self.registration.epoch


@dataclass(slots=True)
class ClusterView:
    """Members by id; an epoch that left or died is burned and never used again."""

    prefill_window: int
    """Prompt tokens in flight to a worker beyond which requests wait at the router."""
    members: dict[WorkerId, Member] = field(default_factory=dict)
    card: ModelCard | None = None
    """What the first worker brought; all others must match it."""
    burned: set[Epoch] = field(default_factory=set)
    decisions: int = 0
    index: PrefixIndex = field(default_factory=PrefixIndex)
    kv_faults: Counter[str] = field(default_factory=Counter)
    """KV events that could not be used as they came, by kind."""

    def check(self, offer: Register) -> None:
        """Raises RegistrationRefused, whose message names both sides of a mismatch."""
        if offer.version != VERSION:
            raise RegistrationRefused(
                f"worker {offer.worker} speaks protocol version {offer.version}, this router {VERSION}; "
                "run the same release of bascule on both"
            )
        if offer.epoch in self.burned:
            raise RegistrationRefused(f"worker {offer.worker}: epoch {offer.epoch} has ended; restart the worker")
        if self.card is not None:
            _require_same_model(self.card, offer)

    def add(self, offer: Register, now: float) -> Member:
        """Take in a worker that `check` let pass and whose id is free."""
        self.card = self.card or offer.card
        taken = {member.row for member in self.members.values()}
        row = next(row for row in count() if row not in taken)
        self.index.join(row, {Tier.DEVICE: offer.kv_blocks})
        feed = KvFeed(self.index, row, self.kv_faults)
        member = self.members[offer.worker] = Member(offer, now, row, feed)
        return member

    def current(self, worker: WorkerId, epoch: Epoch) -> Member | None:
        """The member, if that epoch of it is the one in use."""
        member = self.members.get(worker)
        return member if member is not None and member.epoch == epoch else None

    def heartbeat(self, member: Member, load: WorkerLoad, now: float) -> None:
        member.load = load
        member.last_seen = now
        member.suspect = False

    def excuse(self, seconds: float) -> None:
        """Silence does not count while nobody listened: the router itself stood still for that long."""
        for member in self.members.values():
            member.last_seen += seconds

    def overdue(self, now: float, suspect_after: float, dead_after: float) -> list[Member]:
        """Mark members suspect by missed heartbeats; returns those to be declared dead (seconds)."""
        for member in self.members.values():
            member.suspect = now - member.last_seen > suspect_after
        return [member for member in self.members.values() if now - member.last_seen > dead_after]

    def remove(self, worker: WorkerId) -> None:
        """Forget a worker and burn its epoch."""
        member = self.members.pop(worker, None)
        if member is not None:
            self.burned.add(member.epoch)
            self.index.leave(member.row)

    def place(self, placement: Placement, prompt_tokens: int) -> None:
        """Count a request on its workers before they report it."""
        self.decisions += 1
        prefill, decode = self.members[placement.prefill], self.members[placement.decode]
        prefill.prefilling += 1
        prefill.prefill_tokens += prompt_tokens
        decode.decoding += 1

    def prefilled(self, placement: Placement, prompt_tokens: int) -> None:
        """The first token has come (or the request has ended without one): the prefill worker is done with it."""
        if (member := self.members.get(placement.prefill)) is not None:
            member.prefilling -= 1
            member.prefill_tokens -= prompt_tokens

    def decoded(self, placement: Placement) -> None:
        """The request has ended or left: its decode slot is free."""
        if (member := self.members.get(placement.decode)) is not None:
            member.decoding -= 1

    @property
    def kv_tokens(self) -> int:
        """The smallest KV memory of any member, in tokens: what fits there fits wherever it is placed."""
        return min((_kv_tokens(member) for member in self.members.values()), default=0)

    def snapshot(self) -> Snapshot:
        views = tuple(
            WorkerView(
                id=member.id,
                role=member.registration.role,
                placeable=not member.suspect,
                prefilling=member.prefilling,
                decoding=member.decoding,
                prefill_tokens=member.prefill_tokens,
                slots=member.registration.max_sequences,
                prefill_window=self.prefill_window,
            )
            for member in self.members.values()
        )
        return Snapshot(views, self.decisions)

    def statuses(self) -> tuple[WorkerStatus, ...]:
        return tuple(
            WorkerStatus(
                id=member.id,
                role=member.registration.role,
                state="suspect" if member.suspect else "ready",
                epoch=member.epoch,
                pid=member.registration.pid,
                device=member.registration.device,
                load=member.load,
            )
            for member in self.members.values()
        )


def _kv_tokens(member: Member) -> int:
    return member.registration.kv_blocks * member.registration.card.layout.block_size


def _require_same_model(card: ModelCard, offer: Register) -> None:
    """Two cards must agree in everything that decides whether KV and tokens mean the same."""
    for what, ours, theirs in (
        ("model fingerprint", card.fingerprint, offer.card.fingerprint),
        ("KV layout", card.layout, offer.card.layout),
        ("vocabulary", card.vocab, offer.card.vocab),
        ("context length", card.context, offer.card.context),
    ):
        if ours != theirs:
            raise RegistrationRefused(
                f"worker {offer.worker} serves {offer.card.name} with {what} {theirs}, but this cluster serves "
                f"{card.name} with {what} {ours}; start all workers with the same model, dtype and block size"
            )
