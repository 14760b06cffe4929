"""The router's picture of the cluster: a plain state that events are applied to; no sockets, no clock of its own."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from msgspec.structs import replace

from bascule.errors import RegistrationRefused
from bascule.kv.hashing import BlockHasher
from bascule.kv.index_audit import IndexAudit
from bascule.kv.prefix_index import PrefixIndex
from bascule.policies.cost import PrefillPart, decode_seconds, step_seconds
from bascule.policies.snapshot import ROLES, Candidate, Prediction, Snapshot
from bascule.router.columns import Columns
from bascule.router.found import Found, find
from bascule.router.kv_feed import KvFeed
from bascule.router.link_costs import LinkCosts
from bascule.router.pulse import Pulse
from bascule.router.skew import ClockSkew
from bascule.router.stores import Stores
from bascule.router.weights import Weights
from bascule.types import (
    BlockHash,
    CostModel,
    Epoch,
    ModelCard,
    Placement,
    RequestId,
    Role,
    StepLoad,
    Tier,
    WorkerId,
    WorkerLoad,
    WorkerStatus,
)
from bascule.wire import VERSION, FetchFrom, KvEvents, Register, version_mismatch

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Member:
    """One registered worker; what the router has placed on it is in its row of the columns."""

    registration: Register
    role: Role
    """What new placements use it for; at first what it registered with."""
    row: int
    """Its place in the columns and in the prefix index; given to another worker once it has left."""
    last_seen: float
    kv: KvFeed
    since: float = 0.0
    """When it joined (the clock's seconds)."""
    pulse: Pulse = field(default_factory=Pulse)
    skew: ClockSkew = field(default_factory=ClockSkew)
    load: WorkerLoad = field(default_factory=WorkerLoad)
    suspect: bool = False
    reached: bool = False
    """The router has connected to its addresses, so that a refusal there means something."""
    attached: bool = False
    """A server of its own behind HTTP: whole requests only."""
    rest_until: float = 0.0
    """Until then it asked to be left alone, or is not trusted, and gets no new requests (the clock's seconds)."""
    resting: bool = False
    strikes: int = 0
    """Requests that it has failed since one went well."""
    rested_at: float = -math.inf
    """When it was last left alone for that."""
    runs: frozenset[tuple[RequestId, int]] | None = None
    """Requests and attempts that it had when it last sent a heartbeat; None where it does not say."""
    draining: bool = False
    """It gets nothing new; what it has may end there."""
    drained: bool = False
    """Draining, and nothing needs it any more."""
    leaving: bool = False
    """It has said that it will end once it is drained."""
    drain_by: float = math.inf
    """When what is left goes elsewhere (the clock's seconds)."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV memory holds."""
        return self.registration.kv_blocks * self.registration.card.layout.block_size

    @property
    def state(self) -> str:
        """As in `WorkerStatus`."""
        if self.draining:
            return "drained" if self.drained else "draining"
        return "suspect" if self.suspect or self.resting else "ready"

    @property
    def id(self) -> WorkerId:
        return self.registration.worker

    @property
    def epoch(self) -> Epoch:
        return self.registration.epoch


@dataclass(slots=True)
class ClusterView:
    """Members by id; an epoch that left or died is burned and never used again."""

    prefill_window: int = 4096
    """Prompt tokens in flight to a worker beyond which requests wait at the router, where a policy goes by tokens."""
    members: dict[WorkerId, Member] = field(default_factory=dict)
    card: ModelCard | None = None
    """What workers of our own serve, or else the first attached server; its context is that of the attached server
    with the shortest."""
    burned: set[Epoch] = field(default_factory=set)
    decisions: int = 0
    columns: Columns = field(default_factory=Columns)
    links: LinkCosts = field(default_factory=LinkCosts)
    _machines: dict[str, int] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)
    """What workers of our own serve."""
    tokenizer: str = ""
    """Digest of the vocabulary that the router itself uses; empty if it is not known."""
    index: PrefixIndex = field(default_factory=PrefixIndex)
    audit: IndexAudit = field(init=False)
    stores: Stores = field(default_factory=Stores)
    hasher: Callable[[str, int], BlockHasher] = BlockHasher
    """Makes what names the blocks of prompts, of a model's fingerprint and block size."""
    kv_faults: Counter[str] = field(default_factory=Counter)
    """KV events that could not be used as they came, by kind."""

    def __post_init__(self) -> None:
        self.audit = IndexAudit(self.index)

    def check(self, offer: Register) -> None:
        """Raises RegistrationRefused, whose message names both sides of a mismatch."""
        if offer.version != VERSION:
            raise RegistrationRefused(version_mismatch(offer.worker, offer.version))
        if offer.epoch in self.burned:
            raise RegistrationRefused(f"worker {offer.worker}: epoch {offer.epoch} has ended; restart the worker")
        self._check_attached(offer)
        if self.tokenizer and offer.card.tokenizer not in ("", self.tokenizer):
            raise RegistrationRefused(
                f"worker {offer.worker} serves {offer.card.name} with another vocabulary than this router's: its "
                "tokens would be other text; start router and workers with the same model"
            )
        self.weights.check(offer, any(not member.draining for member in self.of_weights(self.weights.fingerprint)))

    def check_server(self, offer: Register) -> None:
        """The same for an attached server, whose KV is its own affair; raises RegistrationRefused."""
        if self.card is not None and offer.card.vocab != self.card.vocab:
            raise RegistrationRefused(
                f"{offer.device} is to be used with a vocabulary of {offer.card.vocab}, but this cluster serves "
                f"{self.card.name} with {self.card.vocab}; start the router with the workers' model"
            )

    def add(self, offer: Register, now: float, *, attached: bool = False) -> Member:
        """Take in a worker that `check` (or `check_server`) let pass and whose id is free."""
        taken = {member.row for member in self.members.values()}
        row = next(row for row in count() if row not in taken)
        held = {Tier.DEVICE: 0 if attached else offer.kv_blocks}
        self.index.join(row, held | self.stores.capacity(offer.stores))
        feed = KvFeed(self.index, row, self.kv_faults)
        self.stores.join(row, feed, offer.stores)
        member = self.members[offer.worker] = Member(offer, offer.role, row, now, feed, now, attached=attached)
        if not attached and self.weights.fingerprint != offer.card.fingerprint:
            self.weights.card = offer.card
        self._update_card()
        self.columns.add(
            row,
            offer.worker,
            offer.role,
            slots=offer.max_sequences,
            kv_tokens=member.kv_tokens,
            machine=self._machines.setdefault(offer.machine, len(self._machines)),
            hands_off=not attached,
            lends=offer.lends,
            chunk_tokens=offer.chunk_tokens,
        )
        self.columns.cost.put(row, offer.cost)
        return member

    def current(self, worker: WorkerId, epoch: Epoch) -> Member | None:
        """The member, if that epoch of it is the one in use."""
        member = self.members.get(worker)
        return member if member is not None and member.epoch == epoch else None

    def heartbeat(
        self, member: Member, load: WorkerLoad, now: float, runs: tuple[tuple[RequestId, int], ...] | None = None
    ) -> bool:
        """What a worker says of itself; returns whether the heartbeat counts (see `Pulse`)."""
        self.links.told(member.id, member.load.links, load.links)
        if load.unreachable or member.load.unreachable:
            rows = (self.members[peer].row for peer in load.unreachable if peer in self.members)
            self.columns.reaches(member.row, frozenset(rows))
        member.load = load
        member.last_seen = now
        member.runs = None if runs is None else frozenset(runs)
        self._suspect(member, False)
        if load.step is not None:
            self.columns.report(member.row, load.step)
        if load.cost is not None:
            self.columns.cost.put(member.row, load.cost)
        self.stores.measured(member.row, {tier: store.cost for tier, store in load.stores.items() if store.cost})
        return member.pulse.beat(now)

    def stepped(self, member: Member, load: StepLoad, now: float) -> None:
        """What a worker has before it after a step."""
        alone_s = decode_seconds(self.cost_of(member), load.streams, load.context_tokens)
        self.columns.stepped(member.row, alone_s, now)
        self.columns.report(member.row, load)

    def arrived(self, placement: Placement, uncached: int, terms: Prediction, actual_s: float) -> None:
        """A first token has come, `actual_s` after its prompt was placed with these predictions."""
        if (member := self.members.get(placement.prefill)) is not None:
            chunked = uncached > member.registration.chunk_tokens
            own_s = terms.load_s + terms.prefill_s
            self.columns.arrived(member.row, chunked=chunked, queue_s=terms.queue_s, own_s=own_s, actual_s=actual_s)

    def excuse(self, seconds: float) -> None:
        """Silence does not count while nobody listened: the router itself stood still for that long."""
        for member in self.members.values():
            member.last_seen += seconds

    def overdue(self, now: float, suspect_after: float, dead_after: float) -> list[Member]:
        """Mark members suspect by missed heartbeats; returns those to be declared dead (seconds)."""
        for member in self.members.values():
            member.resting = now < member.rest_until
            self._suspect(member, now - member.last_seen > suspect_after)
        return [member for member in self.members.values() if now - member.last_seen > dead_after]

    def rest(self, member: Member, until: float, now: float) -> None:
        """Place nothing on a member until then."""
        member.rest_until, member.resting = until, now < until
        self._suspect(member, member.suspect)

    def drain(self, member: Member, draining: bool, by: float = math.inf) -> None:
        """Place nothing on a member, or place on it again."""
        member.draining, member.drained, member.drain_by = draining, False, by
        self._suspect(member, member.suspect)

    def set_role(self, member: Member, role: Role) -> None:
        """New placements use the member for that; what runs goes on as it is."""
        member.role = role
        self.columns.role[member.row] = ROLES.index(role)

    def _suspect(self, member: Member, suspect: bool) -> None:
        member.suspect = suspect
        self.columns.placeable[member.row] = not (suspect or member.resting or member.draining)

    def remove(self, worker: WorkerId) -> None:
        """Forget a worker and burn its epoch."""
        member = self.members.pop(worker, None)
        if member is not None:
            self.burned.add(member.epoch)
            self.columns.remove(member.row)
            self.links.left(worker)
            self._update_card()
            self.index.leave(member.row)
            self.stores.leave(member.row)

    def place(self, placement: Placement, uncached: int, context: float, now: float) -> None:
        """Count a request on its workers before they report it: tokens to compute, and of context while it decodes."""
        self.decisions += 1
        prefill, decode = self.members[placement.prefill], self.members[placement.decode]
        work_s = step_seconds(self.cost_of(prefill), [PrefillPart(uncached, 0)], 0, 0)
        self.columns.submitted(prefill.row, uncached, work_s, now)
        self.columns.decoding[decode.row] += 1
        self.columns.context_tokens[decode.row] += context

    def prefilled(self, placement: Placement, uncached: int) -> None:
        """The first token has come (or the request has ended without one): the prefill worker is done with it."""
        if (member := self.members.get(placement.prefill)) is not None:
            self.columns.computed(member.row, uncached)

    def decoded(self, placement: Placement, context: float) -> None:
        """The request has ended or left: its decode slot is free."""
        if (member := self.members.get(placement.decode)) is not None:
            self.columns.decoding[member.row] -= 1
            self.columns.context_tokens[member.row] -= context

    def of_weights(self, fingerprint: str) -> list[Member]:
        """The workers of our own with these weights."""
        own = (member for member in self.members.values() if not member.attached)
        return [member for member in own if member.registration.card.fingerprint == fingerprint]

    def neighbours(self, worker: Member) -> list[Member]:
        """The other workers of our own that it may exchange KV with."""
        return [one for one in self.of_weights(worker.registration.card.fingerprint) if one is not worker]

    def cost_of(self, member: Member) -> CostModel:
        """The member's cost model as it last reported it."""
        return member.load.cost or member.registration.cost

    @property
    def kv_tokens(self) -> int:
        """The smallest KV memory of any member, in tokens: what fits there fits wherever it is placed."""
        return min((member.kv_tokens for member in self.members.values()), default=0)

    def takers(self, besides: WorkerId) -> list[Member]:
        """The other members that requests are placed on now."""
        return [one for one in self.members.values() if one.id != besides and self.columns.placeable[one.row]]

    @property
    def ready(self) -> bool:
        """Whether there is a member that neither lacks heartbeats nor drains."""
        return any(not (member.suspect or member.draining) for member in self.members.values())

    @property
    def draining(self) -> bool:
        """Whether there is a member that drains and could take requests else."""
        return any(member.draining and not member.suspect for member in self.members.values())

    def found(self, hashes: Sequence[BlockHash]) -> Found:
        """What workers, and the store, have of a prompt with these blocks."""
        if not hashes or self.card is None:
            return Found(np.zeros(len(self.columns.ids), np.int64))
        lends = self.columns.lends & self.columns.placeable
        return find(self.index, self.stores, hashes, self.card.layout, lends)

    def lender(self, chosen: Candidate) -> FetchFrom | None:
        """Where a placement fetches KV from, if it does."""
        if chosen.fetch_from is None:
            return None
        return FetchFrom(self.members[chosen.fetch_from].registration.peer, chosen.cached_tokens)

    def kv_changed(self, member: Member, events: KvEvents) -> None:
        """What a worker's cache and the tiers below it hold has changed."""
        if member.kv.apply(events):
            self.stores.changed(member.row, events)

    def audit_index(self, most: int) -> None:
        """Look over about `most` blocks of the index: call it while there is nothing else to do.

        Where something is wrong in it, all workers are to tell anew what they have.
        """
        digests = {member.row: digest for member in self.members.values() if (digest := member.kv.digest) is not None}
        if not self.audit.step(most, digests):
            return
        for violation in self.audit.violations:
            log.error("integrity: %s", violation)
        for member in self.members.values():
            if self.audit.violations and member.row in digests:
                member.kv.strayed()

    def expect(self, placement: Placement, hashes: Sequence[BlockHash], now: float) -> None:
        """The worker that computes these blocks will have them soon: siblings that come there wait for them.

        Where they are handed over to, they come after the last one is computed, and nothing there waits for them.
        """
        self.index.expect(self.members[placement.prefill].row, hashes, now)

    def snapshot(self, now: float) -> Snapshot:
        return self.columns.snapshot(now, self.decisions, self.links, self.prefill_window, self.stores.columns(now))

    def statuses(self, requests: Mapping[WorkerId, int] | None = None) -> tuple[WorkerStatus, ...]:
        """All members as an operator sees them; `requests` says how many need each."""
        return tuple(
            WorkerStatus(
                id=member.id,
                role=member.role,
                state=member.state,
                epoch=member.epoch,
                pid=member.registration.pid,
                device=member.registration.device,
                requests=requests.get(member.id, 0) if requests else 0,
                clock_skew_s=member.skew.seconds,
                load=member.load,
            )
            for member in self.members.values()
        )

    def _check_attached(self, offer: Register) -> None:
        """An attached server's id is taken, and its vocabulary binds workers that come later."""
        servers = [member for member in self.members.values() if member.attached]
        if any(server.id == offer.worker for server in servers):
            raise RegistrationRefused(f"{offer.worker} is an attached server's id; start the worker with another --id")
        if servers and servers[0].registration.card.vocab != offer.card.vocab:
            raise RegistrationRefused(
                f"worker {offer.worker} has a vocabulary of {offer.card.vocab}, but the attached servers are used with "
                f"{servers[0].registration.card.vocab}; start workers and router with the same model"
            )

    def _update_card(self) -> None:
        """Bound the context by the attached servers'; with no member left, the card stays as it was."""
        servers = [member.registration.card for member in self.members.values() if member.attached]
        base = self.weights.card or (servers[0] if servers else self.card)
        if base is not None:
            self.card = replace(
                base, context=min(base.context, *(card.context for card in servers)) if servers else base.context
            )
