"""What the router knows of a request when it asks a policy: its blocks, who has them, its SLO, what it may become."""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from typing import Literal

from msgspec.structs import replace

from bascule.policies.cost import PrefillPart, step_seconds
from bascule.policies.snapshot import RouteQuery, Snapshot
from bascule.router.flight import Flight
from bascule.router.refusals import unfit
from bascule.router.view import ClusterView
from bascule.types import Salt, Slo, WorkerId

_REMEMBERED = 256
"""Outputs whose lengths say what the next one's will be."""
_FIRST_GUESS = 64.0
_SESSIONS = 10_000
"""Conversations whose last worker is remembered; the ones heard of longest ago are forgotten first."""


class Queries:
    """Makes the query of each request that waits, and learns from those that end."""

    def __init__(self, view: ClusterView, slo: Slo, handoff: Literal["push", "store", "auto"] = "push") -> None:
        self._view = view
        self._handoff = handoff
        self.slo = slo
        """What requests are to meet that ask for nothing else."""
        self._hasher = view.hasher("", 1)
        self._hashed = ""
        """Fingerprint that the hasher is made for; that of the first attached server gives way to our own model's."""
        self._lengths: deque[int] = deque(maxlen=_REMEMBERED)
        self._usual = _FIRST_GUESS
        self._sessions: OrderedDict[tuple[Salt, str], WorkerId] = OrderedDict()

    def prepare(self, flight: Flight) -> None:
        """Hash what the request's current attempt has to compute."""
        card = self._view.card
        if card is None:
            return
        if self._hashed != card.fingerprint:
            self._hasher = self._view.hasher(card.fingerprint, card.layout.block_size)
            self._hashed = card.fingerprint
        known = flight.request.prompt + tuple(flight.tokens)
        full = (len(known) - 1) // card.layout.block_size
        flight.hashes = tuple(self._hasher.chain(known, flight.request.salt)[:full])
        flight.weights = self._view.weights.fingerprint

    def snapshot(self, flight: Flight, now: float) -> Snapshot:
        """The cluster at this moment, but for workers that could never take the request: these are not placeable."""
        snapshot, members = self._view.snapshot(now), self._view.members
        rows = [members[worker].row for worker in unfit(flight, members.values()) if worker in members]
        if not rows:
            return snapshot
        placeable = snapshot.placeable.copy()
        placeable[rows] = False
        return replace(snapshot, placeable=placeable)

    def query(self, flight: Flight, now: float, line_s: float = 0.0) -> RouteQuery:
        """What the policy is to know, at this moment; the prompts of others that wait unbound are `line_s` of work."""
        card = self._view.card
        found = self._view.found(flight.hashes)
        last = self._view.members.get(self._sessions.get(_session_of(flight), WorkerId("")))
        return RouteQuery(
            request=flight.request.id,
            prompt_tokens=flight.known_tokens,
            max_tokens=flight.request.sampling.max_tokens - len(flight.tokens),
            cached=found.cached,
            stored=found.stored,
            load_s=found.load_s,
            peer=found.peer.row,
            peer_tokens=found.peer.tokens,
            peer_load_s=found.peer.load_s,
            output_tokens=self.output_tokens(flight),
            slo=self.slo_of(flight),
            waited_s=now - flight.received,
            kv_token_bytes=card.layout.block_bytes // card.layout.block_size if card else 0,
            handoff=self._handoff,
            gap_planned_s=self.slo.gap_s,
            tpot_planned_s=self.slo.tpot_s,
            line_s=line_s,
            session=last.row if last is not None else -1,
            portable=flight.portable,
            excluded=flight.excluded,
        )

    def slo_of(self, flight: Flight) -> Slo:
        """The request's own bounds, or the cluster's."""
        return flight.request.slo or self.slo

    def due(self, flight: Flight) -> float:
        """By when its first token should be there."""
        return flight.received + min(self.slo_of(flight).ttft_s, flight.request.timeout)

    def output_tokens(self, flight: Flight) -> float:
        """Tokens that are probably still to come: what outputs have lately been, and no more than was asked for."""
        return max(1.0, min(self._usual, flight.request.sampling.max_tokens - len(flight.tokens)))

    def work_s(self, flight: Flight) -> float:
        """Seconds that computing the prompt takes where most of it is cached, by the first worker's cost model."""
        member = next(iter(self._view.members.values()), None)
        if member is None:
            return 0.0
        cached = int(self._view.found(flight.hashes).cached.max(initial=0))
        part = PrefillPart(flight.known_tokens - cached, cached)
        return step_seconds(self._view.cost_of(member), [part], 0, 0)

    def ended(self, flight: Flight) -> None:
        """A request has come to its end: its length and its worker are remembered."""
        self._lengths.append(len(flight.tokens))
        self._usual = float(statistics.median(self._lengths))
        if flight.request.session:
            session = _session_of(flight)
            self._sessions[session] = flight.placement.decode
            self._sessions.move_to_end(session)
            if len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)


def _session_of(flight: Flight) -> tuple[Salt, str]:
    """Tenants who give conversations the same name do not mean the same one."""
    return flight.request.salt, flight.request.session
